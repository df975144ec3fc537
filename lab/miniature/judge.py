"""`python -m lab.miniature.judge --data DIR --state FILE`: in which style a picture is, in which skin tone, and what it shows.

It learns from all real pictures, held-out and unseen ones too, so that its verdict on a combination does not depend on whether
the models have seen it. It is no part of what ships.

Shapes: B pictures of S x S pixels, N labels of a kind.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from lab.playground.judge import LABEL_SMOOTHING, Judge, blemished
from lab.playground.train_encoder import augmented
from lab.playground.training import to_float

from .dataset import Pictures, load
from .feed import Feed
from .timed import TimedRun, add_run_arguments, begin, read_state

LABELS = ("style", "tone", "concept")
BATCH, RATE = 48, 2e-3
_CHUNK = 64


def label_names(data: Pictures) -> dict[str, list[str]]:
    """The names of each kind of label, in the order of their numbers."""
    return {label: sorted({getattr(row, label) for row in data.rows}) for label in LABELS}


def label_numbers(data: Pictures) -> dict[str, torch.Tensor]:
    """Label numbers of every row."""
    found = {}
    for label, names in label_names(data).items():
        numbers = {name: number for number, name in enumerate(names)}
        found[label] = torch.tensor([numbers[getattr(row, label)] for row in data.rows])
    return found


@torch.no_grad()
def verdicts(judge: Judge, image_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
    """Label numbers (B,) of pictures of the data set's size, in [-1, 1]."""
    device = next(judge.parameters()).device
    parts = [judge(F.avg_pool2d(chunk.to(device), 2)) for chunk in image_B3SS.split(_CHUNK)]
    return {label: torch.cat([part[label] for part in parts]).argmax(1).cpu() for label in judge.heads}


def load_judge(state: Path, data: Pictures, device: str) -> Judge:
    """As trained: its batch norms' statistics are of the weights themselves, not of their average."""
    judge = Judge({label: len(names) for label, names in label_names(data).items()})
    judge.load_state_dict(read_state(state)["model"])
    return judge.to(device).eval().requires_grad_(False)


def train(options: argparse.Namespace) -> None:
    begin(options)
    data, device = load(options.data), options.device
    wanted = {label: numbers_N.to(device) for label, numbers_N in label_numbers(data).items()}
    feed = Feed(data, list(range(len(data.rows))), None, device)
    judge = Judge({label: len(names) for label, names in label_names(data).items()}).to(device)
    run = TimedRun(judge, options, RATE, weight_decay=0.05)

    def loss_of_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        position_B = feed.draw(options.batch, generator)
        image_B3SS = blemished(augmented(feed.small(position_B), generator), generator)
        with torch.autocast(device, torch.bfloat16):
            scores = judge(image_B3SS)
        losses = {label: F.cross_entropy(scores[label].float(), wanted[label][position_B], label_smoothing=LABEL_SMOOTHING)
                  for label in LABELS}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    run.run(loss_of_batch)
    judge.eval()
    positions = list(range(0, len(data.rows), 8))
    found = verdicts(judge, to_float(data.images_NHWC[positions]))
    right = {label: (found[label] == wanted[label][positions].cpu()).float().mean().item() for label in LABELS}
    run.log.write(pictures=len(positions), **{label: round(share, 4) for label, share in right.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, minutes=15)
    parser.add_argument("--batch", type=int, default=BATCH)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
