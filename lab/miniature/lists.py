"""`python -m lab.miniature.lists --data DIR --out DIR`: the pictures as files, and lists of them as the trainer reads them.

`ella.jsonl` has pictures and captions, of people fewer than there are; `prompts.txt` every thing's usual name. The lists of
modules add references, and their captions leave out what a reference tells: a group is the style, the tone, the thing, the
thing in its tone. References are of the train split, never the target.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .captions import captions_of
from .dataset import PAIR, TRAIN, TRIPLE, Pictures, Row, load
from .styles import LEARNT, UNSEEN

CAPTIONS, REFERENCES, _TONES = 4, 24, 5
_FAMILIES = {style.word: style.family for style in (*LEARNT, *UNSEEN)}


@dataclass(frozen=True)
class Condition:
    """What the references of one condition share with their target.

    Args:
        group: what a reference tells; "" leaves the picture out of the list.
        differs: whether one picture may be another's reference, beside being of its group.
        captions: shares of captions that name style and tone, and no more than the category.
    """

    group: Callable[[Row], str]
    differs: Callable[[Row, Row], bool]
    captions: dict[str, float]


def _other_concept(target: Row, other: Row) -> bool:
    return other.concept != target.concept


def _other_family(target: Row, other: Row) -> bool:
    return _FAMILIES[other.style] != _FAMILIES[target.style]


CONDITIONS = {
    "style": Condition(lambda row: row.style, _other_concept, {"style_share": 0}),
    "face": Condition(lambda row: row.tone, _other_concept, {"tone_share": 0}),
    "object": Condition(lambda row: row.concept, _other_family, {"category_share": 1, "tone_share": 0}),
    "portrait": Condition(lambda row: f"{row.concept} {row.tone}" if row.tone else "", _other_family,
                          {"category_share": 1, "tone_share": 0}),
}


class References:
    """Pictures that may be shown for a target, out of the given positions only."""

    def __init__(self, data: Pictures, positions: list[int], condition: Condition):
        self._rows, self._condition = data.rows, condition
        self._of_group: dict[str, list[int]] = {}
        for position in positions:
            self._of_group.setdefault(condition.group(data.rows[position]), []).append(position)

    def of(self, target: int, count: int, chance: random.Random) -> list[int]:
        """At most ``count``; none where the group has no other picture that differs."""
        row = self._rows[target]
        group = self._of_group.get(self._condition.group(row), []) if self._condition.group(row) else []
        some = chance.sample(group, min(len(group), 8 * count))
        return [other for other in some if other != target and self._condition.differs(row, self._rows[other])][:count]


def write_lists(data: Pictures, out: Path, seed: int = 0) -> dict[str, int]:
    """Pictures and lists in `out`; how many targets each list has."""
    out.mkdir(parents=True, exist_ok=True)
    heldout = data.positions(PAIR, TRIPLE)
    names = {position: _save_picture(data, position, out / "pictures") for position in [*data.positions(TRAIN), *heldout]}
    counts = {"ella": _write(out / "ella.jsonl", [
        {"image": names[position], "captions": _captions(data.rows[position], {}, random.Random(f"{seed} {position}"))}
        for position in data.positions(TRAIN) if _is_for_ella(data.rows[position])])}
    prompts = sorted({row.names[0] for row in data.rows if row.split == TRAIN})
    (out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    for name, condition in CONDITIONS.items():
        references = References(data, data.positions(TRAIN), condition)
        for kind, positions in ((name, data.positions(TRAIN)), (f"{name}-heldout", heldout)):
            lines = []
            for position in positions:
                chance = random.Random(f"{seed} {name} {position}")
                shown = references.of(position, REFERENCES, chance)
                if shown:
                    lines.append({"image": names[position], "group": condition.group(data.rows[position]),
                                  "captions": _captions(data.rows[position], condition.captions, chance),
                                  "references": [names[other] for other in sorted(shown)]})
            counts[kind] = _write(out / f"{kind}.jsonl", lines)
    return counts


def _is_for_ella(row: Row) -> bool:
    """Pictures with a skin tone are two fifths of all, of few concepts: an ELLA gets a fifth of them, chosen by name."""
    return not row.tone or zlib.crc32(f"{row.concept} {row.style} {row.tone}".encode()) % _TONES == 0


def _captions(row: Row, shares: dict[str, float], chance: random.Random) -> list[str]:
    return sorted({captions_of(row, chance, **shares) for _ in range(CAPTIONS)})


def _write(path: Path, lines: list[dict]) -> int:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def _save_picture(data: Pictures, position: int, folder: Path) -> str:
    """The picture's path relative to the folder above `folder`."""
    row = data.rows[position]
    path = folder / row.style / f"{row.concept}{'-' if row.tone else ''}{row.tone}.png"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.images_NHWC[position]).save(path, compress_level=1)
    return path.relative_to(folder.parent).as_posix()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.miniature.dataset`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures and the lists")
    options = parser.parse_args()
    print(json.dumps(write_lists(load(options.data), options.out)))


if __name__ == "__main__":
    main()
