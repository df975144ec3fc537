"""The emoji people as one array of pictures, an index and a card; which of them nothing may train on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .icons import DATASOURCE, UNSEEN, VENDORS, EmojiPackageError, IconSet, Vendor, read_json, render
from .people import TONES, Person, select_people

IMAGE_SIZE_PX = 128
IMAGES_FILE, INDEX_FILE, CARD_FILE = "images.npy", "index.jsonl", "card.json"
SPLITS = ("train", "heldout-pair", "heldout-triple")
UNSEEN_SPLIT = "unseen"  # of a vendor that nothing learns from
_PAIR_SHARE, _TRIPLE_SHARE = 0.04, 0.10


@dataclass(frozen=True)
class EmojiPicture:
    """One picture. `emoji` is the base's code points, `tone` one of five names."""

    emoji: str
    caption: str
    role: str
    gender: str
    tone: str
    vendor: str
    licence: str
    category: str
    split: str


@dataclass(frozen=True)
class EmojiPeople:
    images_NHWC: np.ndarray
    rows: list[EmojiPicture]

    def positions(self, split: str) -> list[int]:
        return [position for position, row in enumerate(self.rows) if row.split == split]


def _draw(*parts: str) -> float:
    """A number in [0, 1) that depends on the words only: the split is the same on every machine."""
    digest = hashlib.sha256("|".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(person: Person, vendor: Vendor, tone: str) -> str:
    """Whole (role, vendor) pairs and single (role, vendor, tone) triples are held out, per family of vendors."""
    if _draw("pair", person.role, person.gender if not person.role else "", vendor.family) < _PAIR_SHARE:
        return "heldout-pair"
    if _draw("triple", person.caption, vendor.family, tone) < _TRIPLE_SHARE:
        return "heldout-triple"
    return "train"


def build(packages: Path, out: Path, size_px: int = IMAGE_SIZE_PX, unseen: bool = False) -> dict:
    """Renders every person in every tone by every vendor into images, index and card in `out`; returns the card.

    Args:
        unseen: also a vendor that nothing may learn from, for evaluation.
    """
    people = select_people(read_json(packages, f"{DATASOURCE}/emoji.json"))
    icon_sets = {vendor: IconSet(packages, vendor) for vendor in (*VENDORS, *((UNSEEN,) if unseen else ()))}
    rows, images, missing = [], [], []
    for vendor, icon_set in icon_sets.items():
        for person in people:
            for modifier, tone in TONES.items():
                svg = icon_set.svg(person.with_tone(modifier))
                if svg is None:
                    missing.append(f"{vendor.name}: {person.caption}, {tone}")
                    continue
                rows.append(_row(person, vendor, tone))
                images.append(render(svg, size_px))
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / IMAGES_FILE, np.stack(images))
    (out / INDEX_FILE).write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    card = _card(rows, missing, {vendor.name: icon_set.version for vendor, icon_set in icon_sets.items()}, size_px)
    (out / CARD_FILE).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return card


def _row(person: Person, vendor: Vendor, tone: str) -> EmojiPicture:
    return EmojiPicture(
        emoji=person.codepoints,
        caption=person.caption,
        role=person.role,
        gender=person.gender,
        tone=tone,
        vendor=vendor.name,
        licence=vendor.licence,
        category=person.category,
        split=UNSEEN_SPLIT if vendor == UNSEEN else split_of(person, vendor, tone),
    )


def _card(rows: list[EmojiPicture], missing: list[str], versions: dict[str, str], size_px: int) -> dict:
    pairs = {f"{row.caption} | {row.vendor}" for row in rows if row.split == "heldout-pair"}
    return {
        "pictures": len(rows),
        "size_px": size_px,
        "captions": sorted({row.caption for row in rows}),
        "per_vendor": dict(Counter(row.vendor for row in rows)),
        "per_tone": dict(Counter(row.tone for row in rows)),
        "per_split": dict(Counter(row.split for row in rows)),
        "heldout_pairs": sorted(pairs),
        "missing": missing,
        "package_versions": versions,
        "credits": {vendor.name: f"{vendor.credit} ({vendor.licence})" for vendor in (*VENDORS, UNSEEN)
                    if vendor.name in versions},
    }


def load(folder: Path) -> EmojiPeople:
    """Reads what `build` wrote; the pictures are memory-mapped."""
    if not (folder / INDEX_FILE).is_file():
        raise EmojiPackageError(
            f"{folder} has no {INDEX_FILE}: make it with `python -m lab.emoji build --out {folder}`"
        )
    lines = (folder / INDEX_FILE).read_text(encoding="utf-8").splitlines()
    return EmojiPeople(np.load(folder / IMAGES_FILE, mmap_mode="r"), [EmojiPicture(**json.loads(line)) for line in lines])
