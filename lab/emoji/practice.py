"""Sixty captioned pictures of one hand, to try the trainer with."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

from PIL import Image

from emma_core.errors import FileError

from .dataset import IMAGE_SIZE_PX
from .icons import DATASOURCE, VENDORS, IconSet, read_json, render
from .people import TONES, select_people

COUNT = 60


def write_practice_pictures(
    packages: Path, out: Path, vendor_name: str = "fluent-emoji-flat", count: int = COUNT
) -> list[Path]:
    """`count` people by one vendor, evenly of all roles and tones, with their texts beside them; the pictures' files.

    Raises:
        FileError: the folder holds something.
        EmojiPackageError: a package is missing.
    """
    if out.exists() and any(out.iterdir()):
        raise FileError(f"{out} is not empty; practice pictures would be mixed with what is there. Name a new folder.")
    (vendor,) = (vendor for vendor in VENDORS if vendor.name == vendor_name)
    icons, people = IconSet(packages, vendor), select_people(read_json(packages, f"{DATASOURCE}/emoji.json"))
    drawn = [(person, tone, svg) for person, (modifier, tone) in zip(people, cycle(TONES.items()), strict=False)
             if (svg := icons.svg(person.with_tone(modifier)))]
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for number in range(min(count, len(drawn))):
        person, tone, svg = drawn[number * len(drawn) // min(count, len(drawn))]
        path = out / f"{person.caption.replace(' ', '-')}-{tone}.png"
        Image.fromarray(render(svg, IMAGE_SIZE_PX)).save(path)
        path.with_suffix(".txt").write_text(f"{person.caption}\n", encoding="utf-8")
        written.append(path)
    return written
