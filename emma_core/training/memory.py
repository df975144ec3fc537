"""The memory that a run needs, without having it: one update is done with tensors that have sizes and no numbers.

Every tensor that is made is counted for as long as it lives: weights, activations, gradients, the optimizer's state.
Shapes: B rows (or 1), K cross-attention tokens of width W, latents 4 x h x w.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.denoiser import NO_EXTRA, Denoiser
from ..base.without_numbers import without_numbers
from ..model.assembly import Assembly, Reference, token_terms
from .averaging import AveragedWeights
from .draws import BatchRow
from .trainer import Trainer, make_optimizer

CARDS_GB = (8, 12, 24)
_META = torch.device("meta")
_CUDA_BYTES = 500_000_000  # what CUDA and its libraries take on a card: not a tensor, so not counted


@dataclass(frozen=True)
class Needed:
    """Bytes of a run: what is there before the first update, and the most inside one."""

    begun: int
    peak: int

    @property
    def on_card(self) -> int:
        """The most on a card, with what is no tensor."""
        return self.peak + _CUDA_BYTES

    def in_process(self, before: int) -> int:
        """The most of a process that took ``before`` when nothing of the run was there."""
        return self.peak + before


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
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
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


def needed(trainer: Trainer, dtype: torch.dtype) -> Needed:
    """What a run needs at this type of the frozen weights, on the largest of its pictures.

    Args:
        trainer: at its beginning.
        dtype: of the diffusion model.
    """
    config, student = trainer.config, trainer.student
    taught = student.teacher.bytes_beside(dtype) if student.teacher else 0
    with LivingBytes() as living, _without_matrices():
        denoiser, connector = student.denoiser.without_numbers(dtype), _empty(student.connector)
        module = connector if student.module is None else _empty(student.module)
        average = AveragedWeights(module, config.train.average) if config.train.average else None
        begun = living.now
        module.train()
        optimizer = make_optimizer(_Learning(module), config)
        for value in _Learning(module).values():  # the optimizer's state comes with the first update
            value.grad = torch.zeros_like(value)
        optimizer.step()
        optimizer.zero_grad()
        _update(trainer, denoiser, connector, module)
        optimizer.step()
        del average
    return Needed(begun + taught, living.peak + taught)


@dataclass(frozen=True, eq=False)
class _Learning:
    module: nn.Module

    def values(self) -> list[nn.Parameter]:
        return [value for _, value in self.parameters()]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, value) for name, value in self.module.named_parameters() if value.requires_grad)


def _empty(model: Any) -> Any:
    """In float32; what has no weights is itself."""
    return without_numbers(model, torch.float32) if isinstance(model, nn.Module) else model


def _update(trainer: Trainer, denoiser: Denoiser, connector: Any, module: nn.Module) -> None:
    """One batch through it, forward and back."""
    data, student, count = trainer.data, trainer.student, trainer.config.train.batch
    largest = max(range(len(data)), key=lambda index: math.prod(data.bucket(index)))
    caption, reference = data.captions(largest)[0], data.references(largest)[0]
    rows = [BatchRow(largest, False, caption, reference, 0, 1.0)] * count
    timestep_B = torch.zeros(count, device=_META, dtype=torch.long)
    assembly = Assembly()
    if module is not connector:  # else ELLA itself learns
        features = {name: _rows_like(value[None], count) for name, value in data.features(reference, 0).items()}
        assembly = Assembly([Reference(module, features)])
    context_BKW = token_terms(connector, _rows_like(data.text(caption), count), timestep_B, assembly).stacked
    noised_B4hw = _rows_like(data.latent(largest)[None], count)
    beside = student.own.stacked(rows, _META) if student.own else NO_EXTRA
    predicted_B4hw = denoiser.predict_noise(noised_B4hw, timestep_B, context_BKW, beside)
    if student.teacher:  # which is the same model, and a little more
        with torch.no_grad():
            noised_B4hw = denoiser.predict_noise(noised_B4hw, timestep_B, context_BKW.detach(), beside)
    (predicted_B4hw - noised_B4hw).square().mean().backward()


def _rows_like(value_1: torch.Tensor, count: int) -> torch.Tensor:
    return torch.empty(count, *value_1.shape[1:], device=_META)


def in_words(of: Mapping[str, Needed], process_bytes: int) -> list[str]:
    """Lines of a report: by type of the frozen weights, and which cards that is too much for.

    Args:
        of: type -> what is needed.
        process_bytes: what this process takes beside its tensors.
    """
    lines = []
    for name, found in of.items():
        on_card = found.on_card / 1e9
        small = [f"{size} GB" for size in CARDS_GB if on_card > size]
        fits = f"too much for {', '.join(small)}" if small else "fits 8, 12 and 24 GB"
        lines.append(f"memory, {name}: {on_card:.1f} GB on a card ({fits}), "
                     f"{found.in_process(process_bytes) / 1e9:.1f} GB on a CPU; computed from sizes")
    return lines


def on_machine(wanted: int, has: int, where: str) -> tuple[str, bool]:
    """What a run needs on the machine it starts on, in words, and whether there is so much.

    Args:
        wanted, has: bytes.
        where: "card" or "machine".
    """
    told = f"memory: {wanted / 1e9:.1f} GB, computed from sizes; this {where} has {has / 1e9:.1f} GB"
    if wanted <= has:
        return told, True
    return f"{told}, which is not enough. Halve batch and double accumulate, or train on smaller pictures.", False


def resident_bytes() -> int:
    """The memory that this process takes now."""
    import psutil  # comes with accelerate

    return psutil.Process().memory_info().rss
