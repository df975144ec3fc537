"""Captions as the web has them: some name of the thing, and only sometimes who drew it and in which skin tone."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

from .dataset import Row

STYLE_SHARE, TONE_SHARE, CATEGORY_SHARE = 0.4, 0.4, 0.03
_FRAMES = ("{}", "{}", "{}", "a {}", "{} emoji", "an icon of a {}", "a picture of a {}")
_TONES = ("{tone}-skinned {name}", "{name}, {tone} skin", "{name} with {tone} skin", "{name}, {tone} skin tone")
_STYLES = ("{style} style {text}", "{text}, {style} style", "{text}, {style} style", "{text} in {style} style")
_CATEGORY_WORDS = {
    "People & Body": "person", "Animals & Nature": "nature", "Food & Drink": "food", "Travel & Places": "place",
    "Activities": "activity", "Objects": "object", "Smileys & Emotion": "face",
}


def captions_of(
    row: Row, chance: random.Random, style_share: float = STYLE_SHARE, tone_share: float = TONE_SHARE,
    category_share: float = CATEGORY_SHARE,
) -> str:
    """A caption of the picture; the shares are how often it names style and tone, and no more than the category."""
    text = chance.choice(_names(row))
    if chance.random() < category_share:
        text = category_of(row)
    tone = row.tone.replace("-", " ")
    if tone and chance.random() < tone_share:
        text = chance.choice(_TONES).format(tone=tone, name=text)
    else:
        text = chance.choice(_FRAMES).format(text)
    if chance.random() < style_share:
        text = chance.choice(_STYLES).format(style=row.style, text=text)
    return text


def category_of(row: Row) -> str:
    """The one word for the kind of thing."""
    return _CATEGORY_WORDS[row.category]


def sentences_of(row: Row, chance: random.Random) -> str:
    """Text about a thing as it stands in books, for a model that never sees a picture: captions, and what a thing is."""
    draw = chance.random()
    if draw < 0.2 and len(row.names) > 1:
        return "{} is another word for {}".format(*chance.sample(row.names, 2))
    if draw < 0.4:
        return f"{chance.choice(row.names)} is {row.subcategory.replace('-', ' ')}, {category_of(row)}"
    return captions_of(row, chance)


def full_caption(row: Row) -> str:
    """The caption that says everything: name, tone and style."""
    tone = f", {row.tone.replace('-', ' ')} skin" if row.tone else ""
    return f"{row.names[0]}{tone}, {row.style} style"


def _names(row: Row) -> tuple[str, ...]:
    """The usual name as often as all others together."""
    return (*row.names, *[row.names[0]] * (len(row.names) - 1))


def words_around(rows: Iterable[Row]) -> set[str]:
    """Every word of captions that is no part of a name."""
    said = {*_CATEGORY_WORDS.values(), *(frame.format("") for frame in _FRAMES),
            *(text.format(style=row.style, text="") for row in rows for text in _STYLES),
            *(text.format(tone=row.tone.replace("-", " "), name="") for row in rows if row.tone for text in _TONES)}
    return {word for text in said for word in re.findall(r"[^\W\d_]+", text.lower())}
