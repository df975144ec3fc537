"""Icon sets out of the npm packages `@iconify-json/*`: SVGs found by code points, and their rendering with resvg.

Half of the sets bring no code points (an empty chars.json), and names differ between sets and times. So names are
compared without their punctuation, in three vocabularies: what the sets with code points call them, Unicode's old names and
the short names of `emoji-datasource-google`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from ..emoji.icons import EmojiPackageError
from ..emoji.people import TONES, plain_codepoints
from .styles import Style

_WITH_CODEPOINTS = ("twemoji", "noto", "openmoji")  # ordered: the first that knows a name decides
_BORROWED_NAMES = {"fluent-emoji": "fluent-emoji-flat"}  # the same names, but an empty chars.json
_TONE_SUFFIXES = {f"-{name}-skin-tone": modifier for modifier, name in TONES.items()} | {
    f"-tone{number}": modifier for number, modifier in enumerate(TONES, start=1)}
_DROPPED_SUFFIX = {"streamline-emojis": re.compile(r"-1$")}  # its -2, -3 are other drawings of the same thing


def read_json(packages: Path, name: str):
    path = packages / name
    if not path.is_file():
        raise EmojiPackageError(f"{path} was not found: install its package with npm and give --packages the node_modules "
                                "folder")
    return json.loads(path.read_text(encoding="utf-8"))


def squashed(name: str) -> str:
    """A name's letters and digits only: "hot-beverage" and "HOT BEVERAGE" are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def codepoints_by_name(packages: Path, datasource: list[dict]) -> dict[str, str]:
    """Squashed name -> code points, of emoji without a skin tone."""
    found: dict[str, str] = {}
    for package in _WITH_CODEPOINTS:
        for codepoints, name in read_json(packages, f"@iconify-json/{package}/chars.json").items():
            found.setdefault(squashed(name), plain_codepoints(codepoints))
    for entry in datasource:
        for name in (entry["name"] or "", *entry["short_names"]):
            found.setdefault(squashed(name), plain_codepoints(entry["unified"]))
    return found


class IconSet:
    """One set's SVGs. `svg` gives None for what the set hasn't drawn."""

    def __init__(self, packages: Path, style: Style, by_name: dict[str, str]):
        folder = f"@iconify-json/{style.package}"
        icons = read_json(packages, f"{folder}/icons.json")
        self.version = read_json(packages, f"{folder}/package.json")["version"]
        self._icons, self._size = icons["icons"], (icons.get("width", 16), icons.get("height", 16))
        self._aliases = {name: alias["parent"] for name, alias in icons.get("aliases", {}).items()
                         if alias.keys() == {"parent"}}
        chars = read_json(packages, f"@iconify-json/{_BORROWED_NAMES.get(style.package, style.package)}/chars.json")
        self._names = {plain_codepoints(codepoints): name for codepoints, name in chars.items()}
        if not chars:
            self._names = self._named([*icons["icons"], *self._aliases], by_name, _DROPPED_SUFFIX.get(style.package))

    @staticmethod
    def _named(names: Iterable[str], by_name: dict[str, str], dropped: re.Pattern | None) -> dict[str, str]:
        """Code points -> name, by what an icon is called."""
        found: dict[str, str] = {}
        for name in names:
            base, modifier = _without_tone(dropped.sub("", name) if dropped else name)
            codepoints = by_name.get(squashed(base))
            if codepoints:
                found.setdefault(with_tone(codepoints, modifier) if modifier else codepoints, name)
        return found

    def svg(self, codepoints: str) -> str | None:
        name = self._names.get(codepoints)
        icon = self._icons.get(self._aliases.get(name, name))
        if icon is None:
            return None
        width, height = icon.get("width", self._size[0]), icon.get("height", self._size[1])
        side = max(width, height)  # a square one, the drawing in its middle
        left, top = icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000000" '
            f'viewBox="{left} {top} {side} {side}">{icon["body"]}</svg>'
        )


    def only(self, wanted: set[str]) -> dict:
        """What its icons.json would be with the drawings of these code points alone."""
        names = {self._names[codepoints] for codepoints in wanted if codepoints in self._names}
        aliases = {name: {"parent": self._aliases[name]} for name in names if name in self._aliases}
        drawn = names | {alias["parent"] for alias in aliases.values()}
        return {"icons": {name: icon for name, icon in self._icons.items() if name in drawn}, "aliases": aliases,
                "width": self._size[0], "height": self._size[1]}


def _without_tone(name: str) -> tuple[str, str]:
    """An icon's name without its skin tone, and the tone's modifier ("" without one).

    The tone may stand inside: "man-light-skin-tone-blond-hair".
    """
    for suffix in sorted(_TONE_SUFFIXES, key=len, reverse=True):
        if suffix in name:
            return name.replace(suffix, ""), _TONE_SUFFIXES[suffix]
    return name, ""


def with_tone(codepoints: str, modifier: str) -> str:
    """The code points with a skin tone modifier after the first of them (Unicode TR51)."""
    first, *rest = codepoints.split("-")
    return "-".join([first, modifier, *rest])
