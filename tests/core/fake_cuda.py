"""A CUDA device that computes nothing, for machines without one.

PyTorch's fake tensors know sizes, types and devices, and their operations refuse tensors of two devices as the real ones do.
Values that Python asks for are made up, and what fake tensors cannot do at all (files, copies, updates of weights) is left
out. So this finds what was left on the CPU and what half precision does not allow; no number that comes out means anything.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from training_world import fresh_accelerate

from emma_core.files import tensor_file
from emma_core.training import store, trainer

CUDA = torch.device("cuda:0")


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, tensors are fake, and accelerate trains on CUDA."""
    _make_up_values(patch)
    _replace_files_and_copies(patch)
    _train_nothing(patch)
    with fresh_accelerate(), FakeTensorMode(allow_non_fake_inputs=True):
        PartialState(cpu=True).device = CUDA
        yield


def _make_up_values(patch: pytest.MonkeyPatch) -> None:
    """Ones, wherever the values of a tensor are asked for."""
    patch.setitem(fake_impls.op_implementations_dict, torch.ops.aten._local_scalar_dense.default,
                  lambda mode, function, tensor: np.ones((), _kind(tensor)).item())
    patch.setattr(torch, "allclose", lambda *tensors, **options: True)
    made_up = {"numpy": _ones, "tolist": lambda tensor: _ones(tensor.cpu()).tolist(),
               "nonzero": lambda tensor: tensor.new_zeros((1, tensor.ndim), dtype=torch.int64)}
    for name, values in made_up.items():
        real = getattr(torch.Tensor, name)
        patch.setattr(torch.Tensor, name, lambda tensor, *options, real=real, values=values:
                      values(tensor) if isinstance(tensor, FakeTensor) else real(tensor, *options))


def _kind(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _ones(tensor: torch.Tensor) -> np.ndarray:
    if tensor.device.type != "cpu" or tensor.dtype == torch.bfloat16:
        raise TypeError(f"NumPy reads no {_kind(tensor)} on {tensor.device}")
    return np.ones(tuple(tensor.shape), _kind(tensor))


def _replace_files_and_copies(patch: pytest.MonkeyPatch) -> None:
    class RealFile:
        """A safetensors file, of which the tensors are real: they become fake by what is done with them."""

        def __init__(self, *arguments, **options):
            self._file = safe_open(*arguments, **options)

        def __enter__(self):
            self._file.__enter__()
            return self

        def __exit__(self, *exception):
            return self._file.__exit__(*exception)

        def __getattr__(self, name):
            return getattr(self._file, name)

        def get_tensor(self, name):
            with unset_fake_temporarily():
                return self._file.get_tensor(name)

    def save_ones(tensors, metadata=None):
        with unset_fake_temporarily():
            return save({name: torch.from_numpy(_ones(tensor)) for name, tensor in tensors.items()}, metadata)

    def applied(module: nn.Module, change, recurse: bool = True) -> nn.Module:
        """`nn.Module._apply`, which cannot put a fake tensor where a real one was."""
        for child in module.children():
            applied(child, change)
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(change(value.detach()), value.requires_grad)
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else change(value)
        return module

    patch.setattr(tensor_file, "safe_open", RealFile)
    patch.setattr(store, "save", save_ones)
    patch.setattr(nn.Module, "_apply", applied)
    patch.setattr(trainer, "copy", types.SimpleNamespace(deepcopy=lambda module: module))
    patch.setattr(trainer, "save_checkpoint", lambda *state: None)
    patch.setattr(trainer.Trainer, "save_result", lambda run: None)


def _train_nothing(patch: pytest.MonkeyPatch) -> None:
    """accelerate on CUDA with autocast; without the backward pass, which needs a driver, and what follows from it."""
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *options, **more: True)
    patch.setattr(Accelerator, "device", CUDA)
    patch.setattr(Accelerator, "backward", lambda accelerator, loss: None)
    patch.setattr(trainer.Trainer, "_clip", lambda run: None)
    patch.setattr(AcceleratedOptimizer, "step", lambda optimizer: None)
    patch.setattr(trainer.Trainer, "_check_loss", lambda run, loss, error_B, weight_B, batch: loss.isfinite().item())
