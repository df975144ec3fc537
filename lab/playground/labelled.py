"""A teacher for the playground's modules: the UNet, trained further with the drawing's vendor and tone named to it.

`python -m lab.playground.labelled train ...` trains it; `... distil CONDITION RECIPE.toml ...` trains a module with it,
as `python -m emma_core train` does and with the same flags: where the module sees a reference, the teacher is told its label.
A prediction holds none of the noise that makes targets of pictures so slow to learn from. The object module needs no such
teacher: the base itself is told the caption that the prompt leaves out.

Shapes: B rows, N text tokens of width D, K cross-attention tokens of width W, latents 4 x h x w.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from emma_core.base.parts import Parts
from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.commands.flags import end_as_interrupt
from emma_core.commands.train import add_arguments, config_of
from emma_core.files.connector_file import load_connector
from emma_core.playground import PLAYGROUND_DIR, load_autoencoder, load_unet
from emma_core.text.encoder import load_text_encoder
from emma_core.training.config import TrainConfig
from emma_core.training.draws import BatchRow, captions_of_few_lengths
from emma_core.training.prepared import Prepared
from emma_core.training.runs import begin_run, run
from emma_core.training.student import TeacherTarget, tokens_of_texts
from emma_core.training.trainer import Trainer

from ..emoji.dataset import load
from ..emoji.icons import VENDORS
from ..emoji.people import TONES
from .text import captions_of
from .timed_run import BATCH, Predicted, TimedRun, averaged, noised
from .train_base import CATEGORY_SHARE, CONNECTOR, EMPTY_SHARE, unit_latents

LABELS = {"style": [vendor.name for vendor in VENDORS], "face": list(TONES.values())}
UNTOLD_SHARE = 0.35  # of the rows each label is left out
RATE = 6e-4
GUIDANCE_HELP = "what the teacher's labels change is multiplied by it"


class Labelled(nn.Module):
    """A UNet that reads a token for the vendor and one for the tone behind the text's."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet
        self.labels = nn.ModuleDict({kind: nn.Embedding(len(names) + 1, CONNECTOR.width) for kind, names in LABELS.items()})

    def forward(
        self, noised_B4hw: torch.Tensor, timestep_B: torch.Tensor, context_BKW: torch.Tensor, told: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The predicted noise; ``told`` has a number (B,) per kind of label, one past the last name where it is not told."""
        tokens = [self.labels[kind](told[kind])[:, None] for kind in LABELS]
        context_BSW = torch.cat([context_BKW, *tokens], dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.unet(noised_B4hw, timestep_B, encoder_hidden_states=context_BSW, return_dict=False)[0]
        return predicted.float()


def number_of(kind: str, name: str | None) -> int:
    """A label's number; one past the last where it is not told."""
    return len(LABELS[kind]) if name is None else LABELS[kind].index(name)


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    folder, data = options.playground, load(options.data)
    seen = data.positions("train")
    latents = unit_latents(load_autoencoder(PLAYGROUND_SPEC.latent_scale, folder / "autoencoder.safetensors"), data)
    connector, text_encoder = load_connector(folder / "ella.safetensors"), load_text_encoder(folder / "t5.safetensors")
    texts: dict[str, torch.Tensor] = {}

    def text_of(caption: str) -> torch.Tensor:
        if caption not in texts:
            texts[caption] = text_encoder.encode([caption])[0]
        return texts[caption]

    model = Labelled(load_unet(folder / "unet.safetensors")).requires_grad_(True).train()

    def predict(chance: random.Random, generator: torch.Generator) -> Predicted:
        picked = chance.choices(seen, k=BATCH)
        rows = [data.rows[position] for position in picked]
        choices = [captions_of(row, EMPTY_SHARE, CATEGORY_SHARE, chance) for row in rows]
        captions = captions_of_few_lengths(choices, lambda caption: text_of(caption).shape[1], chance)
        noised_B4hw, noise_B4hw, timestep_B = noised(latents[picked], generator)
        with torch.no_grad():
            context_BKW = tokens_of_texts(connector, [text_of(caption) for caption in captions], timestep_B)
        names = {"style": [row.vendor for row in rows], "face": [row.tone for row in rows]}
        told = {kind: torch.tensor([number_of(kind, None if chance.random() < UNTOLD_SHARE else name) for name in names[kind]])
                for kind in LABELS}
        return Predicted(model(noised_B4hw, timestep_B, context_BKW, told), noise_B4hw, timestep_B)

    TimedRun(model, options.out, options.minutes, options.rate, options.seed).run(predict)


def load_labelled(checkpoint: Path) -> Labelled:
    """The teacher with its averaged weights."""
    return averaged(Labelled(load_unet()), checkpoint)


def label_target(
    teacher: Labelled, groups: Mapping[str, Callable[[int], str]], guidance: float = 1.0,
    shown: Callable[[Sequence[BatchRow]], Mapping[str, Sequence[float]]] | None = None,
) -> TeacherTarget:
    """The teacher's prediction, told the labels of each row where a reference shows them.

    Args:
        groups: kind of label -> the label of a target by its index: its group, which is what its reference shows.
        guidance: what the labels change is multiplied by it.
        shown: kind of label -> strength of each row's reference; by default the row's own strength.
    """
    def predict(noised_B4hw, timestep_B, context_BKW, rows: Sequence[BatchRow]) -> torch.Tensor:
        untold = {kind: torch.full((len(rows),), number_of(kind, None)) for kind in LABELS}
        strengths = shown(rows) if shown else {kind: [row.strength for row in rows] for kind in groups}
        told = {kind: torch.tensor([number_of(kind, group(row.target) if strength else None)
                                    for row, strength in zip(rows, strengths[kind], strict=True)])
                for kind, group in groups.items()}
        named_B4hw = teacher(noised_B4hw, timestep_B, context_BKW, {**untold, **told})
        if guidance == 1.0:
            return named_B4hw
        return torch.lerp(teacher(noised_B4hw, timestep_B, context_BKW, untold), named_B4hw, guidance)

    return TeacherTarget("the base, taught the labels", predict)


def caption_target(parts: Parts, data: Prepared) -> TeacherTarget:
    """The base's own prediction, told the caption of each row's picture (its group) where it has a reference."""
    groups = sorted({example.group for example in data.examples})
    texts = dict(zip(groups, parts.text_encoder.encode(groups), strict=True))

    def predict(noised_B4hw, timestep_B, context_BKW, rows: Sequence[BatchRow]) -> torch.Tensor:
        named_BKW = tokens_of_texts(parts.connector, [texts[data.group(row.target)] for row in rows], timestep_B)
        shown_B11 = torch.tensor([row.strength > 0 for row in rows])[:, None, None]
        return parts.backbone.predict_noise(noised_B4hw, timestep_B, torch.where(shown_B11, named_BKW, context_BKW))

    return TeacherTarget("the base, told the caption", predict)


def distilling(condition: str, teacher: Path | None, guidance: float):
    """`begin_run` of a run whose target is the teacher's prediction."""
    def begin_distilling(config: TrainConfig, parts: Parts, data: Prepared, accelerator, folder: Path) -> Trainer:
        if condition == "object":
            target = caption_target(parts, data)
        else:
            target = label_target(load_labelled(teacher), {condition: data.group}, guidance)
        return begin_run(config, parts, data, accelerator, folder, target)

    return begin_distilling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the teacher")
    training.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.emoji build`")
    training.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    training.add_argument("--playground", type=Path, default=PLAYGROUND_DIR, help="the base it begins with")
    training.add_argument("--minutes", type=float, default=25, help="wall-clock time of the whole run")
    training.add_argument("--rate", type=float, default=RATE)
    training.add_argument("--threads", type=int, default=1)
    training.add_argument("--seed", type=int, default=0)
    distil = commands.add_parser("distil", help="train a module with it")
    distil.add_argument("condition", choices=["style", "face", "object"])
    add_arguments(distil)
    distil.usage = None
    distil.add_argument("--teacher", type=Path, help="checkpoint of the teacher (style, face)")
    distil.add_argument("--teacher-guidance", type=float, default=1.0, help=GUIDANCE_HELP)
    options = parser.parse_args()
    if options.command == "train":
        train(options)
        return
    if options.teacher is None and options.condition != "object":
        parser.error("--teacher is missing: the checkpoint that `labelled train` wrote")
    end_as_interrupt()
    torch.set_num_threads(1)
    beginning = distilling(options.condition, options.teacher, options.teacher_guidance)
    run(config_of(options), print, bars=sys.stderr.isatty(), begin_with=beginning)


if __name__ == "__main__":
    main()
