"""Who drew the pictures: the icon sets whose styles are learnt, and those that nothing learns from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """One icon set, `@iconify-json/<package>` on npm.

    `word` names it in captions. Sets of one `family` share geometry, so what is held out is held out in all of them.
    """

    package: str
    word: str
    family: str
    licence: str
    credit: str


LEARNT = (
    Style("noto", "noto", "noto", "Apache-2.0", "Noto Emoji, Google"),
    Style("noto-v1", "blob", "noto", "Apache-2.0", "Noto Emoji of 2016, Google"),
    Style("twemoji", "twemoji", "twemoji", "CC-BY-4.0", "Twemoji, Twitter and contributors"),
    Style("fluent-emoji", "3d", "fluent", "MIT", "Fluent Emoji, Microsoft"),
    Style("fluent-emoji-flat", "flat", "fluent", "MIT", "Fluent Emoji flat, Microsoft"),
    Style("fluent-emoji-high-contrast", "stencil", "fluent", "MIT", "Fluent Emoji high contrast, Microsoft"),
    Style("fxemoji", "firefox", "fxemoji", "Apache-2.0", "Firefox OS Emojis, Mozilla"),
    Style("emojione", "emojione", "emojione", "CC-BY-4.0", "Emoji One 2, JoyPixels"),
    Style("emojione-monotone", "silhouette", "emojione", "CC-BY-4.0", "Emoji One monotone, JoyPixels"),
    Style("streamline-emojis", "streamline", "streamline", "CC-BY-4.0", "Streamline Emojis, Streamline"),
)
UNSEEN = (
    Style("openmoji", "openmoji", "openmoji", "CC-BY-SA-4.0", "OpenMoji"),
    Style("emojione-v1", "emojione-v1", "emojione-v1", "CC-BY-SA-4.0", "Emoji One 1, JoyPixels"),
)
