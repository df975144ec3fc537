"""What every training run here shares: a falling learning rate, and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn


def cosine_rate(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: rises linearly from 0.1 to 1 in `warmup` steps, then falls as a cosine to 0.01."""
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


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

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take the averages of a checkpoint, on the device where they are now."""
        self.values = {name: values[name].to(own.device) for name, own in self.values.items()}
