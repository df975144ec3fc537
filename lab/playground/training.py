"""What the playground's training scripts share: pictures as tensors, learning rate, averaged weights, checkpoints."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from emma_core.files.writing import write_atomically
from emma_core.training.averaging import AveragedWeights, cosine_rate
from emma_core.training.log import Log

__all__ = [
    "AveragedWeights", "TimedLog", "cosine_rate", "load_state", "random_shift", "save_state", "set_rate", "to_float",
]


def to_float(images_NHWC: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return rearrange(torch.from_numpy(np.array(images_NHWC, order="C")), "n h w c -> n c h w").float() / 127.5 - 1


def random_shift(image_B3HW: torch.Tensor, most_px: int, generator: torch.Generator) -> torch.Tensor:
    """Each picture moved by up to `most_px`, white (1.0) coming in at the edge."""
    height, width = image_B3HW.shape[-2:]
    padded = F.pad(image_B3HW, (most_px,) * 4, value=1.0)
    offsets_B2 = torch.randint(0, 2 * most_px + 1, (len(image_B3HW), 2), generator=generator).tolist()
    moved = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, offsets_B2, strict=True)]
    return torch.stack(moved)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's rate is `factor` times the `base_lr` it was given."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


class TimedLog(Log):
    """A log that is shown on the screen too, with the seconds since it began."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path)
        self.started = time.monotonic()

    def write(self, **values) -> None:
        values["seconds"] = round(time.monotonic() - self.started, 1)
        print(json.dumps(values), flush=True)
        super().write(**values)


def save_state(path: Path, **state) -> None:
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_state(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)
