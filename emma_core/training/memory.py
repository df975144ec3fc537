"""The memory that a run needs, without having it: one update is done with tensors that have sizes and no numbers.

Every tensor that is made is counted for as long as it lives: weights, activations, gradients, the optimizer's state.
Shapes: B rows, K cross-attention tokens of width W, latents C x h x w.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.backbones import Backbone
from ..base.own_text import beside_text
from ..model.assembly import Assembly, Reference, token_terms
from ..model.own_tokens import OwnTokens
from ..text.clip_layout import LENGTH
from .averaging import AveragedWeights
from .config import TrainConfig
from .trainer import Trainer, make_optimizer

CARDS_GB = (8, 12, 24)
_TEXT_TOKENS = 32
_CUDA_BYTES = 500_000_000  # what CUDA and its libraries take on a card: not a tensor, so not counted


@dataclass(frozen=True)
class Needed:
    """Bytes of a run: what is there between updates, and the most inside one."""

    held: int
    peak: int


class LivingBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still alive; ``peak`` is the most there were at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function is torch.ops.aten._local_scalar_dense.default and arguments[0].is_meta:
            return torch.ones((), dtype=arguments[0].dtype).item()  # a number that Python asks for is made up
        made = function(*arguments, **(named or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


class _Attention(torch.autograd.Function):
    """Attention that keeps no matrix of queries by keys, as flash and memory-efficient ones do: the sizes alone."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextmanager
def _without_matrices() -> Iterator[None]:
    real = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda q, k, v, *arguments, **named: _Attention.apply(q, k, v)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = real


def needed(trainer: Trainer, backbone: Backbone, size_px: tuple[int, int], dtype: torch.dtype) -> Needed:
    """What a run needs at this type of the frozen weights, teachers' own tensors left out.

    Args:
        trainer: at its beginning.
        backbone: its base.
        size_px: width and height of the pictures.
        dtype: of the diffusion model.
    """
    config, student = trainer.config, trainer.student
    with LivingBytes() as living, _without_matrices():
        unet = _empty(backbone.unet, dtype)
        autoencoder = _empty(backbone.autoencoder, torch.float32)
        connector = _empty(student.connector, torch.float32)
        module = connector if student.module is None else _empty(student.module, torch.float32)
        average = AveragedWeights(module, config.train.average) if config.train.average else None
        module.train()
        optimizer = make_optimizer(_Learning(module), config)
        held = living.now
        for _ in range(2):  # the optimizer's state comes with the first one
            _update(unet, connector, module, config, backbone, size_px, dtype)
            optimizer.step()
            optimizer.zero_grad()
        held = max(held, living.now)
        del autoencoder, average
    return Needed(held, living.peak)


@dataclass(frozen=True, eq=False)
class _Learning:
    module: nn.Module

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, value) for name, value in self.module.named_parameters() if value.requires_grad)


def _empty(model: Any, dtype: torch.dtype) -> Any:
    """A copy without numbers; what has no weights is itself."""
    if not isinstance(model, nn.Module):
        return model
    memo: dict[int, Any] = {}
    for value in (*model.parameters(), *model.buffers()):
        kind = dtype if value.is_floating_point() else value.dtype
        made = torch.empty(value.shape, dtype=kind, device="meta")
        memo[id(value)] = nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made
    return copy.deepcopy(model, memo)


def _update(unet, connector, module, config: TrainConfig, backbone: Backbone, size_px, dtype: torch.dtype) -> None:
    rows, (width, height) = config.train.batch, size_px
    spec = backbone.spec
    latent = (rows, spec.latent_channels, height // spec.pixels_per_latent, width // spec.pixels_per_latent)
    timestep_B = torch.zeros(rows, device="meta", dtype=torch.long)
    text = (LENGTH, connector.width) if isinstance(connector, OwnTokens) else (_TEXT_TOKENS, connector.config.text_dim)
    text_BND = torch.zeros(rows, *text, device="meta")
    assembly = Assembly()
    if module is not connector:  # else ELLA itself learns
        features = {name: torch.zeros(rows, _VECTORS.get(name, 1), about.dim, device="meta")
                    for name, about in module.config.features.items()}
        assembly = Assembly([Reference(module, features)])
    context_BKW = token_terms(connector, text_BND, timestep_B, assembly).stacked
    noised = torch.zeros(latent, device="meta", dtype=dtype)
    beside = beside_text(torch.zeros(rows, spec.pooled_width, device="meta", dtype=dtype), torch.zeros(rows, 6, device="meta"))
    predicted = unet(noised, timestep_B, context_BKW.to(dtype), added_cond_kwargs=beside if spec.pooled_width else None,
                     return_dict=False)[0].float()
    (predicted - torch.zeros(latent, device="meta")).square().mean().backward()


_VECTORS: Mapping[str, int] = {"local": 257}


def in_words(of: Mapping[str, Needed], process_bytes: int) -> list[str]:
    """Lines of a report: by type of the frozen weights, and which cards that is too much for.

    Args:
        of: type -> what is needed.
        process_bytes: what this process takes beside its tensors.
    """
    lines = []
    for name, found in of.items():
        on_card = (found.peak + _CUDA_BYTES) / 1e9
        small = [f"{size} GB" for size in CARDS_GB if on_card > size]
        fits = f"too much for {', '.join(small)}" if small else "fits 8, 12 and 24 GB"
        lines.append(f"memory, {name}: {on_card:.1f} GB on a card ({fits}), "
                     f"{(found.peak + process_bytes) / 1e9:.1f} GB on a CPU; computed from sizes")
    return lines
