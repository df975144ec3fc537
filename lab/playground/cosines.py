"""`python -m lab.playground.cosines --data DIR --pictures N`: do modules fight where they differ?

Along the sampling of the predictions' way, at each timestep: the cosine of what the style and what the face module change, in
the tokens and in the UNet's predictions; how large each change is beside what the text itself changes; and how far the sum in
the blocks falls from the sum of the changes, which is where modules disturb each other.

Shapes: B pictures, T timesteps, K tokens of width W, latents 4 x h x w.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from emma_core.base.pipeline import Sampling
from emma_core.playground import PLAYGROUND_DIR

from ..emoji.dataset import SPLITS, load
from .adding_up import BOTH, FACE, STYLE, Sampler
from .adding_ways import TEXT, Ask
from .evaluate import SEED, TRIPLES, Generation, Trial, choose_trials
from .world import load_world

COLUMNS = ("cosine in tokens", "cosine in predictions", "style's size", "face's size", "the blocks' distance")


def cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(B,)"""
    return F.cosine_similarity(one.flatten(1), other.flatten(1))


def measured(sampler: Sampler, trials: Sequence[Trial]) -> torch.Tensor:
    """(T, B, COLUMNS): sizes and distance are norms in parts of the norm of both differences' sum."""
    tokens = {shown: torch.stack([sampler.tokens_of(trial, shown) for trial in trials], dim=1) for shown in (TEXT, STYLE, FACE)}
    found = []

    def predict(step: int, timestep: int, ask: Ask) -> torch.Tensor:
        text_B4hw, style_B4hw, face_B4hw, blocks_B4hw = ask(TEXT, STYLE, FACE, BOTH)
        style_B4hw, face_B4hw = style_B4hw - text_B4hw, face_B4hw - text_B4hw
        in_tokens_B = cosine(*(tokens[shown][step] - tokens[TEXT][step] for shown in (STYLE, FACE)))
        size_B = (style_B4hw + face_B4hw).flatten(1).norm(dim=1)
        apart_B4hw = blocks_B4hw - text_B4hw - style_B4hw - face_B4hw
        parts = [one.flatten(1).norm(dim=1) / size_B for one in (style_B4hw, face_B4hw, apart_B4hw)]
        found.append(torch.stack([in_tokens_B, cosine(style_B4hw, face_B4hw), *parts], dim=1))
        return text_B4hw + style_B4hw + face_B4hw

    sampler.latents(trials, predict)
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.emoji build`")
    parser.add_argument("--playground", type=Path, default=PLAYGROUND_DIR)
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--split", choices=[SPLITS[0], TRIPLES], default=TRIPLES)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load(options.data)
    sampler = Sampler(Generation(load_world(options.playground), data, Sampling()), told=True)
    found_TBX = measured(sampler, choose_trials(data, options.pictures, options.seed, options.split))
    print("| timestep | " + " | ".join(COLUMNS) + " |\n|" + " --- |" * (len(COLUMNS) + 1))
    for timestep, mean_X in zip(sampler.timesteps, found_TBX.mean(1), strict=True):
        print(f"| {timestep} | " + " | ".join(f"{value:.2f}" for value in mean_X.tolist()) + " |")


if __name__ == "__main__":
    main()
