"""Which precision a device computes in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_PRODUCTS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = tuple(_PRODUCTS)


@dataclass(frozen=True)
class Precision:
    """A precision as a device has it.

    Args:
        name: one of PRECISIONS.
        weights: type of frozen weights.
        autocast: type of matrix products; None: that of the weights.
    """

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None


def precision_on(name: str, device: torch.device) -> Precision:
    """The precision that is nearest to the wanted one on a device.

    A CPU has no fp16 arithmetic to gain, so fp16 becomes fp32 there; and bf16 is for its products alone, as other
    operations are slower in it.
    """
    on_cpu = device.type == "cpu"
    name = "fp32" if name == "fp16" and on_cpu else name
    products = _PRODUCTS[name]
    return Precision(name, torch.float32 if on_cpu or products is None else products, products)
