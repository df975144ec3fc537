"""Can any tokens say both a vendor and a tone to the frozen UNet?

`python -m lab.playground.ceiling train --data DIR --out FILE`; then `... score --offsets FILE --data ...`.

No module and no reference: for each pair of vendor and tone one free offset of all tokens, at a few timesteps with straight
lines between, learnt on the training pictures. What pictures of held-out roles score with it is what modules that are added up
in the tokens could reach at best, as far as one offset for all prompts goes.

Shapes: B rows, P pairs, S knots, T timesteps, N text tokens of width D, K cross-attention tokens of width W.
"""

from __future__ import annotations

import argparse
import functools
import random
from pathlib import Path

import torch
from torch import nn

from emma_core.base.pipeline import Sampling
from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.files.connector_file import load_connector
from emma_core.model.strength_keyframes import TIMESTEPS
from emma_core.playground import PLAYGROUND_DIR, load_autoencoder, load_unet
from emma_core.text.encoder import load_text_encoder
from emma_core.training.draws import captions_of_few_lengths
from emma_core.training.student import tokens_of_texts

from ..emoji.dataset import EmojiPicture, load
from ..emoji.icons import VENDORS
from ..emoji.people import TONES
from .adding_up import Sampler, Scoring, add_arguments
from .adding_ways import TEXT, Shown, together
from .evaluate import Generation, Trial
from .text import wordings
from .timed_run import BATCH, Predicted, TimedRun, averaged, noised
from .train_base import CONNECTOR, unit_latents
from .world import load_world

PAIRS = [(vendor.name, tone) for vendor in VENDORS for tone in TONES.values()]
KNOTS = 6  # at timesteps 0, 200 ... 1000
RATE = 1e-2


class Offsets(nn.Module):
    """What is added to the connector's tokens for each pair of vendor and tone."""

    def __init__(self):
        super().__init__()
        self.offset_PSKW = nn.Parameter(torch.zeros(len(PAIRS), KNOTS, CONNECTOR.latents, CONNECTOR.width))

    def forward(self, context_BKW: torch.Tensor, timestep_B: torch.Tensor, pair_B: torch.Tensor) -> torch.Tensor:
        """The tokens with the offset of each row's pair at its timestep."""
        place_B = timestep_B.float() / TIMESTEPS * (KNOTS - 1)
        below_B = place_B.long().clamp(max=KNOTS - 2)
        share_B11 = (place_B - below_B)[:, None, None]
        return context_BKW + torch.lerp(self.offset_PSKW[pair_B, below_B], self.offset_PSKW[pair_B, below_B + 1], share_B11)


def pair_of(row: EmojiPicture) -> int:
    """Number of a picture's pair."""
    return PAIRS.index((row.vendor, row.tone))


def load_offsets(checkpoint: Path) -> Offsets:
    """The offsets as learnt, averaged over the last updates."""
    return averaged(Offsets(), checkpoint)


class OffsetSampler(Sampler):
    """Shows the offset of what a trial is aimed at."""

    def __init__(self, generation: Generation, offsets: Offsets):
        super().__init__(generation, told=True)
        self._offsets = offsets

    @torch.no_grad()
    def tokens_of(self, trial: Trial, shown: Shown) -> torch.Tensor:
        pair = pair_of(self.generation.data.rows[trial.target])
        timestep_T = torch.tensor(self.timesteps)
        return self._offsets(super().tokens_of(trial, shown), timestep_T, torch.full_like(timestep_T, pair))


def score(options: argparse.Namespace) -> None:
    """Prints the line."""
    scoring = Scoring(options)
    generation = Generation(load_world(options.playground), scoring.data, Sampling())
    sampler = OffsetSampler(generation, load_offsets(options.offsets))
    print(scoring.row(f"offsets of {options.offsets.stem}", lambda: together(TEXT), sampler))


def train(options: argparse.Namespace) -> None:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    folder, data = options.playground, load(options.data)
    seen = data.positions("train")
    latents = unit_latents(load_autoencoder(PLAYGROUND_SPEC.latent_scale, folder / "autoencoder.safetensors"), data)
    connector, text_encoder = load_connector(folder / "ella.safetensors"), load_text_encoder(folder / "t5.safetensors")
    text_of = functools.cache(lambda caption: text_encoder.encode([caption])[0])
    unet, offsets = load_unet(folder / "unet.safetensors"), Offsets()

    def predict(chance: random.Random, generator: torch.Generator) -> Predicted:
        picked = chance.choices(seen, k=BATCH)
        rows = [data.rows[position] for position in picked]
        captions = captions_of_few_lengths([wordings(row) for row in rows], lambda caption: text_of(caption).shape[1], chance)
        noised_B4hw, noise_B4hw, timestep_B = noised(latents[picked], generator)
        with torch.no_grad():
            context_BKW = tokens_of_texts(connector, [text_of(caption) for caption in captions], timestep_B)
        context_BKW = offsets(context_BKW, timestep_B, torch.tensor([pair_of(row) for row in rows]))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noised_B4hw, timestep_B, encoder_hidden_states=context_BKW, return_dict=False)[0]
        return Predicted(predicted.float(), noise_B4hw, timestep_B)

    TimedRun(offsets, options.out, options.minutes, options.rate, options.seed).run(predict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="learn the offsets")
    training.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.emoji build`")
    training.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    training.add_argument("--playground", type=Path, default=PLAYGROUND_DIR)
    training.add_argument("--minutes", type=float, default=60, help="wall-clock time of the whole run")
    training.add_argument("--rate", type=float, default=RATE)
    training.add_argument("--seed", type=int, default=0)
    scoring = commands.add_parser("score", help="judge pictures made with them")
    add_arguments(scoring)
    scoring.add_argument("--offsets", type=Path, required=True, help="checkpoint of `train`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"train": train, "score": score}[options.command](options)


if __name__ == "__main__":
    main()
