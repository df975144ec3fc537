"""Muon for the matrices of a module's blocks, AdamW for the rest, as one optimizer.

Muon makes every update of a matrix nearly orthogonal, so that all its directions learn alike (K. Jordan et al., Muon: an
optimizer for hidden layers in neural networks, 2024; the size of AdamW's updates: arXiv 2502.16982, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

_BLOCKS = "blocks."


def is_hidden_matrix(name: str, value: nn.Parameter) -> bool:
    """Whether a parameter is a matrix inside a block: what reads features, latents and gates are AdamW's."""
    return _BLOCKS in name and value.ndim == 2 and min(value.shape) > 1


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's two optimizers behind the face of one; their groups are its groups.

    Args:
        matrices: groups that Muon updates, as torch takes them.
        others: groups that AdamW updates.
        decay: of the matrices.
        adamw: makes AdamW of its groups.
    """

    def __init__(
        self, matrices: Iterable[dict], others: Iterable[dict], decay: float, adamw: Callable[[list[dict]], torch.optim.AdamW],
    ):
        matrices, others = list(matrices), list(others)
        super().__init__([dict(group) for group in (*matrices, *others)], {})
        self._parts = {"muon": torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
                       "adamw": adamw(others)}
        self.param_groups = [group for part in self._parts.values() for group in part.param_groups]

    def step(self, closure: None = None) -> None:
        """One update of all."""
        for part in self._parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self._parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Both states, by name."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        for name, part in self._parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = [group for part in self._parts.values() for group in part.param_groups]
