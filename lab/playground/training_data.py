"""`python -m lab.playground.training_data --data DIR --out DIR`: the emoji people as the trainer reads them.

Writes every picture as a file and, for each condition, a JSON-lines file of the train split and one of the held-out pictures.
References are always of the train split. A group is what a reference tells: the vendor, the tone, or what is shown.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image

from ..emoji.dataset import EmojiPeople, load
from .pairs import CONDITIONS, GROUPS, ReferencePicker, prompts

REFERENCES = 48  # of each target, drawn with repetition


def write_training_data(data: EmojiPeople, out: Path, seed: int = 0) -> None:
    """Pictures, `<condition>.jsonl` and `<condition>-heldout.jsonl` in `out`."""
    pictures = [_save_picture(data, position, out / "pictures") for position in range(len(data.rows))]
    train = data.positions("train")
    heldout = data.positions("heldout-pair") + data.positions("heldout-triple")
    picker = ReferencePicker(data.rows, train)
    for condition in CONDITIONS:
        chance = random.Random(f"{seed} {condition}")
        for name, positions in ((condition, train), (f"{condition}-heldout", heldout)):
            lines = []
            for position in positions:
                row = data.rows[position]
                references = {picker.pick(condition, row, chance) for _ in range(REFERENCES)}
                lines.append({
                    "image": pictures[position], "captions": prompts(condition, row), "group": getattr(row, GROUPS[condition]),
                    "references": [pictures[reference] for reference in sorted(references)],
                })
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (out / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _save_picture(data: EmojiPeople, position: int, folder: Path) -> str:
    """The picture's path relative to the folder above `folder`."""
    row = data.rows[position]
    path = folder / row.vendor / f"{row.caption.replace(' ', '-')}-{row.tone}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(data.images_NHWC[position]).save(path)
    return path.relative_to(folder.parent).as_posix()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.emoji build`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures and the lists")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_training_data(load(options.data), options.out, options.seed)


if __name__ == "__main__":
    main()
