"""`python -m lab.playground.trial_sheet --data DIR --out FILE`: what the scores of `playground.evaluate` look like.

The first held-out trials as they come, none chosen: their references, the real picture that has everything wanted, and what the
playground makes with the same noise in every column.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image

from emma_core.base.pipeline import Sampling
from emma_core.drawing.contact_sheet import SheetRow, draw_contact_sheet
from emma_core.playground import PLAYGROUND_DIR

from ..emoji.dataset import EmojiPeople, load
from .evaluate import BOTH, SEED, TRIPLES, Generation, Line, Trial, choose_trials
from .world import load_world

LINES = (Line("text only", {}), Line("+ style", {"style": 1.0}), Line("+ face", {"face": 1.0}), Line("+ style + face", BOTH),
         Line("both at 1.5", {"style": 1.5, "face": 1.5}))
REFERENCES = ("style reference", "face reference", "wanted")


def draw_trials(generation: Generation, data: EmojiPeople, trials: list[Trial]) -> Image.Image:
    """A row for each trial."""
    columns = [(rearrange(generation.pictures(trials, line), "b c h w -> b h w c") + 1) / 2 for line in LINES]
    rows = []
    for index, trial in enumerate(trials):
        shown = [torch.from_numpy(data.images_NHWC[position].copy()).float() / 255
                 for position in (trial.style, trial.face, trial.target)]
        rows.append(SheetRow(f'"{data.rows[trial.target].caption}"', [*shown, *(column[index] for column in columns)]))
    footer = f"The first {len(trials)} held-out combinations of the evaluation, none chosen"
    return draw_contact_sheet([*REFERENCES, *(line.name for line in LINES)], rows, len(REFERENCES), footer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.emoji build`")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--playground", type=Path, default=PLAYGROUND_DIR)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--split", choices=[TRIPLES, "heldout-pair"], default=TRIPLES)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load(options.data)
    generation = Generation(load_world(options.playground), data, Sampling())
    trials = choose_trials(data, options.rows, options.seed, options.split)
    draw_trials(generation, data, trials).save(options.out)


if __name__ == "__main__":
    main()
