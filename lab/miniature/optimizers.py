"""Muon for the matrices of a network and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

_FIRST_AND_LAST = ("conv_in.", "conv_out.", "time_embedding.")


class MuonAndAdam:
    """torch's Muon on every weight of two or more dimensions, a convolution's as outputs x the rest, and AdamW on the others.

    Muon's rate is made to give updates of AdamW's size, so one rate serves both. A network's first and last layers are AdamW's.

    Args:
        named: parameters that require gradients, by name.
        rate: the highest.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], rate: float, weight_decay: float):
        self._matrices = [tensor for name, tensor in named.items() if tensor.ndim > 1 and not name.startswith(_FIRST_AND_LAST)]
        matrices = {id(tensor) for tensor in self._matrices}
        self._views = [nn.Parameter(tensor.detach().flatten(1)) for tensor in self._matrices]  # the same storage
        self._muon = torch.optim.Muon(self._views, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        rest = [tensor for tensor in named.values() if id(tensor) not in matrices]
        self._adam = torch.optim.AdamW(rest, lr=rate, weight_decay=weight_decay, fused=True)

    @property
    def param_groups(self) -> list[dict]:
        return [*self._muon.param_groups, *self._adam.param_groups]

    def zero_grad(self) -> None:
        self._adam.zero_grad()
        for tensor in self._matrices:
            tensor.grad = None

    def step(self) -> None:
        for view, tensor in zip(self._views, self._matrices, strict=True):
            view.grad = tensor.grad.flatten(1)
        self._muon.step()
        self._adam.step()

    def state_dict(self) -> dict:
        return {"muon": self._muon.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
