"""What the playground's training scripts share: pictures as tensors, learning rate, averaged weights, checkpoints."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..tensor_file import write_atomically


def to_float(images_NHWC: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(images_NHWC, order="C")).permute(0, 3, 1, 2).float() / 127.5 - 1


def random_shift(image_B3HW: torch.Tensor, most_px: int, generator: torch.Generator) -> torch.Tensor:
    """Each picture moved by up to `most_px`, white (1.0) coming in at the edge."""
    height, width = image_B3HW.shape[-2:]
    padded = F.pad(image_B3HW, (most_px,) * 4, value=1.0)
    offsets_B2 = torch.randint(0, 2 * most_px + 1, (len(image_B3HW), 2), generator=generator).tolist()
    moved = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, offsets_B2, strict=True)]
    return torch.stack(moved)


def cosine_rate(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: rises linearly from 0.1 to 1 in `warmup` steps, then falls as a cosine to 0.01."""
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's rate is `factor` times the `base_lr` it was given."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


class AveragedWeights:
    """Exponential moving average of parameters; early steps count less than `decay` would make them."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        names = list(self.values)
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_([self.values[n] for n in names], [parameters[n].detach() for n in names], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(self.values[name])


class Log:
    """One JSON line per report, to the screen and to a file."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.started = path, time.monotonic()

    def write(self, **values) -> None:
        values["seconds"] = round(time.monotonic() - self.started, 1)
        line = json.dumps(values)
        print(line, flush=True)
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def save_checkpoint(path: Path, **state) -> None:
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)
