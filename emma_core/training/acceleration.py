"""accelerate's device and precision, anew for each run: it would keep the first run's for the life of the process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


def new_device(cpu: bool) -> torch.device:
    """The device of a run that begins.

    Args:
        cpu: leave GPUs alone.
    Raises:
        ImportError: accelerate is not installed.
    """
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return PartialState(cpu=cpu).device


def new_accelerator(precision: str, cpu: bool) -> Accelerator:
    """Of a run whose device is known by now (see `new_device`), in fp32, fp16 or bf16."""
    from accelerate import Accelerator

    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=cpu)
