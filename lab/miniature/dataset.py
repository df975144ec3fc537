"""`python -m lab.miniature.dataset --packages NODE_MODULES --out DIR`: the pictures, an index of them and a card.

Held out from all training: whole (concept, family of styles) pairs, and single (concept, family, tone) triples.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..emoji.icons import DATASOURCE, EmojiPackageError, render
from ..emoji.people import TONES, plain_codepoints
from .concepts import Concept, select_concepts
from .icons import IconSet, codepoints_by_name, read_json, with_tone
from .styles import LEARNT, UNSEEN, Style

SIZE_PX = 128
IMAGES_FILE, SMALL_FILE, INDEX_FILE, CARD_FILE = "images.npy", "small.npy", "index.jsonl", "card.json"
SMALL_PX = SIZE_PX // 2
TRAIN, PAIR, TRIPLE, UNSEEN_SPLIT = "train", "heldout-pair", "heldout-triple", "unseen"
_PAIR_SHARE, _TRIPLE_SHARE = 0.04, 0.10
USUAL_NAMES_FROM = "noto"


@dataclass(frozen=True)
class Row:
    """One picture. `concept`: code points without a tone; `tone`: one of five names, or empty; `style`: a set's word."""

    concept: str
    names: tuple[str, ...]
    category: str
    subcategory: str
    role: str
    gender: str
    tone: str
    style: str
    split: str


@dataclass(frozen=True)
class Pictures:
    """`images_NHWC` at SIZE_PX; `small_N3SS` at half of that, as CLIP and the judge look at them. uint8, memory-mapped."""

    images_NHWC: np.ndarray
    small_N3SS: np.ndarray
    rows: list[Row]

    def positions(self, *splits: str) -> list[int]:
        return [position for position, row in enumerate(self.rows) if row.split in splits]


def _draw(*parts: str) -> float:
    """A number in [0, 1) that depends on the words only: the split is the same on every machine."""
    digest = hashlib.sha256("|".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(concept: Concept, style: Style, tone: str) -> str:
    """Where a picture belongs. All tones and both genders of a role go together in pairs."""
    if style in UNSEEN:
        return UNSEEN_SPLIT
    if _draw("pair", concept.role or concept.codepoints, style.family) < _PAIR_SHARE:
        return PAIR
    if tone and _draw("triple", concept.codepoints, style.family, tone) < _TRIPLE_SHARE:
        return TRIPLE
    return TRAIN


def build(packages: Path, out: Path, jobs: int = 1) -> dict:
    """Renders every concept in every tone and style into `out`; returns the card.

    Args:
        jobs: processes that render.
    """
    rows, svgs, versions = _drawings(packages)
    with ProcessPoolExecutor(jobs) as pool:
        images = list(pool.map(render, svgs, itertools.repeat(SIZE_PX), chunksize=64))
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / IMAGES_FILE, np.stack(images))
    np.save(out / SMALL_FILE, np.stack([halved(image) for image in images]))
    (out / INDEX_FILE).write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    card = _card(rows, versions)
    (out / CARD_FILE).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return card


def _drawings(packages: Path) -> tuple[list[Row], list[str], dict[str, str]]:
    """Every row and its SVG, and the packages' versions."""
    datasource = read_json(packages, f"{DATASOURCE}/emoji.json")
    by_name = codepoints_by_name(packages, datasource)
    chars = read_json(packages, f"@iconify-json/{USUAL_NAMES_FROM}/chars.json")
    concepts = select_concepts(datasource, {plain_codepoints(key): name for key, name in chars.items()})
    rows, svgs, versions = [], [], {}
    for style in (*LEARNT, *UNSEEN):
        icon_set = IconSet(packages, style, by_name)
        versions[style.package] = icon_set.version
        for concept in concepts:
            for tone, codepoints in forms(concept):
                svg = icon_set.svg(codepoints)
                if svg is not None:
                    rows.append(_row(concept, style, tone))
                    svgs.append(svg)
    return rows, svgs, versions


def halved(image_HW3: np.ndarray) -> np.ndarray:
    """(3, H/2, W/2), each pixel the mean of four."""
    height, width, _ = image_HW3.shape
    mean_HW3 = image_HW3.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))
    return mean_HW3.round().astype(np.uint8).transpose(2, 0, 1)


def forms(concept: Concept) -> list[tuple[str, str]]:
    """(tone, code points), the yellow form (tone "") first."""
    forms = [("", concept.codepoints)]
    if concept.has_tones:
        forms += [(tone, with_tone(concept.codepoints, modifier)) for modifier, tone in TONES.items()]
    return forms


def _row(concept: Concept, style: Style, tone: str) -> Row:
    return Row(concept.codepoints, concept.names, concept.category, concept.subcategory, concept.role, concept.gender,
               tone, style.word, split_of(concept, style, tone))


def _card(rows: list[Row], versions: dict[str, str]) -> dict:
    return {
        "pictures": len(rows),
        "size_px": SIZE_PX,
        "concepts": len({row.concept for row in rows}),
        "concepts_learnt": len({row.concept for row in rows if row.split == TRAIN}),
        "per_style": dict(Counter(row.style for row in rows)),
        "with_tone": dict(Counter(row.style for row in rows if row.tone)),
        "per_category": dict(Counter(row.category for row in rows)),
        "per_split": dict(Counter(row.split for row in rows)),
        "package_versions": versions,
        "credits": {style.word: f"{style.credit} ({style.licence})" for style in (*LEARNT, *UNSEEN)},
    }


def load(folder: Path) -> Pictures:
    """Reads what `build` wrote; the pictures are memory-mapped, copied where written to."""
    if not (folder / INDEX_FILE).is_file():
        raise EmojiPackageError(f"{folder} has no {INDEX_FILE}: make it with `python -m lab.miniature.dataset --out {folder}`")
    lines = (folder / INDEX_FILE).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    rows = [Row(**{**record, "names": tuple(record["names"])}) for record in records]
    return Pictures(*(np.load(folder / name, mmap_mode="c") for name in (IMAGES_FILE, SMALL_FILE)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="node_modules with the sets and emoji-datasource-google")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="processes that render")
    options = parser.parse_args()
    print(json.dumps(build(options.packages, options.out, options.jobs), indent=1))


if __name__ == "__main__":
    main()
