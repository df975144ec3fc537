"""Models with the sizes of their weights and none of the numbers: what a computation takes is told without having it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def without_numbers(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose weights are on the meta device; numbers that are not whole have another type."""
    memo: dict[int, Any] = {}
    for value in (*model.parameters(), *model.buffers()):
        kind = dtype if value.is_floating_point() else value.dtype
        made = torch.empty(value.shape, dtype=kind, device="meta")
        memo[id(value)] = nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made
    return copy.deepcopy(model, memo)
