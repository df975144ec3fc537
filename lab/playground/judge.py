"""`python -m lab.playground.judge --data DIR --out FILE`: who drew a picture, in which tone, and what it shows.

The judge scores generated pictures. It is no part of the playground: it learns from all real pictures, held-out ones
too, so that its verdict on a combination does not depend on whether the playground has seen it.

Shapes: B pictures of S x S pixels, N labels of a kind.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from emma_core.files.tensor_file import read_tensors

from ..emoji.dataset import EmojiPeople, load
from .train_encoder import LABELS, augmented, labels_of
from .training import TimedLog, cosine_rate, set_rate, to_float

SIZE_PX, BATCH, RATE, WARMUP_STEPS = 64, 48, 2e-3, 50
MOST_NOISE, BLUR_SHARE, LABEL_SMOOTHING = 0.08, 0.5, 0.05
_WIDTHS = (24, 48, 96, 192)


class Judge(nn.Module):
    """Plain convolutions with batch norm and pooling: not the reference encoder's architecture."""

    def __init__(self, classes: dict[str, int]):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, width in zip((3, *_WIDTHS[:-1]), _WIDTHS, strict=True):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU(),
                       nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU(),
                       nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.heads = nn.ModuleDict({label: nn.Linear(4 * _WIDTHS[-1], count) for label, count in classes.items()})

    def forward(self, image_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures of the judge's size in [-1, 1] -> scores (B, N) of each kind of label."""
        body_BC = self.body(image_B3SS)
        return {label: head(body_BC) for label, head in self.heads.items()}


def resized(image_B3HW: torch.Tensor) -> torch.Tensor:
    """Pictures as the judge sees them."""
    return F.interpolate(image_B3HW, (SIZE_PX, SIZE_PX), mode="bilinear", antialias=True)


@torch.no_grad()
def verdicts(judge: Judge, image_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
    """Label numbers (B,) of pictures in [-1, 1]."""
    parts = [judge(resized(chunk)) for chunk in image_B3HW.split(64)]
    return {label: torch.cat([part[label] for part in parts]).argmax(1) for label in judge.heads}


def save_judge(judge: Judge, path: Path) -> None:
    classes = {label: head.out_features for label, head in judge.heads.items()}
    save_file(judge.state_dict(), path, metadata={"classes": json.dumps(classes)})


def load_judge(path: Path) -> Judge:
    """A judge as `save_judge` wrote it."""
    tensors, metadata = read_tensors(path, "a judge of emoji people")
    judge = Judge(json.loads(metadata["classes"]))
    judge.load_state_dict(tensors)
    return judge.eval().requires_grad_(False)


def blemished(image_B3SS: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise, and half of the pictures blurred: generated pictures are not as crisp as drawn ones."""
    batch, device = len(image_B3SS), image_B3SS.device
    blurred_B3SS = F.avg_pool2d(F.pad(image_B3SS, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blurs_B111 = torch.rand(batch, 1, 1, 1, generator=generator, device=device) < BLUR_SHARE
    level_B111 = MOST_NOISE * torch.rand(batch, 1, 1, 1, generator=generator, device=device)
    return torch.where(blurs_B111, blurred_B3SS, image_B3SS) + level_B111 * torch.randn(
        image_B3SS.shape, generator=generator, device=device)


def train_judge(data: EmojiPeople, steps: int, seed: int, log: TimedLog) -> Judge:
    generator = torch.Generator().manual_seed(seed)
    wanted, classes = labels_of(data)
    images = torch.cat([resized(to_float(data.images_NHWC[start:start + 64])) for start in range(0, len(data.rows), 64)])
    judge = Judge(classes)
    optimizer = torch.optim.AdamW([{"params": list(judge.parameters()), "base_lr": RATE}], weight_decay=0.05, fused=True)
    for step in range(steps):
        set_rate(optimizer, cosine_rate(step, steps, WARMUP_STEPS))
        picked = torch.randint(len(images), (BATCH,), generator=generator)
        image = blemished(augmented(images[picked], generator), generator)
        with torch.autocast("cpu", torch.bfloat16):
            scores = judge(image)
        losses = [F.cross_entropy(scores[label].float(), wanted[label][picked], label_smoothing=LABEL_SMOOTHING)
                  for label in LABELS]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            log.write(step=step, loss=round(loss.item(), 4))
    judge.eval()
    found = verdicts(judge, images)
    log.write(step=steps, **{label: round((found[label] == wanted[label]).float().mean().item(), 4) for label in LABELS})
    return judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.emoji build`")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=77)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    save_judge(train_judge(load(options.data), options.steps, options.seed, TimedLog(options.out.with_suffix(".jsonl"))),
               options.out)


if __name__ == "__main__":
    main()
