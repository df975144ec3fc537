"""LoRAs on a base: merged into its weights, or beside the UNet's, several of which one acts at a time.

Shapes: x what a layer takes and gives; r the rank of a LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..text.clip_encoder import ClipTextEncoder
from .ldm_names import ldm_unet_names
from .lora_file import LowRank, read_lora, read_text_lora


@torch.no_grad()
def merge_lora(unet: Any, path: Path, text_is_used: bool = False) -> None:
    """Add a LoRA to the UNet's weights: W + alpha / rank * up @ down.

    Args:
        text_is_used: its part for text encoders is merged elsewhere, see `merge_text_lora`; else a warning says that it is left
            out.
    Raises:
        FileError: see `read_lora`.
    """
    for layer, change in _lora_of(unet, path, text_is_used).items():
        weight = unet.get_submodule(layer).weight
        weight += change.change(tuple(weight.shape)).to(weight)


@torch.no_grad()
def merge_text_lora(encoder: ClipTextEncoder, path: Path) -> None:
    """Add the part of a LoRA for text encoders to their weights, if it has one.

    Raises:
        FileError: see `read_text_lora`.
    """
    encoder.forget()
    for tower, changes in zip(encoder.towers, text_lora_of(encoder, path), strict=True):
        for layer, change in changes.items():
            weight = tower.layers[layer].weight
            weight += change.change(tuple(weight.shape)).to(weight)


def text_lora_of(encoder: ClipTextEncoder, path: Path) -> list[dict[str, LowRank]]:
    """What a LoRA does to each text encoder.

    Raises:
        FileError: see `read_text_lora`.
    """
    return read_text_lora(path, [{name: tuple(layer.weight.shape) for name, layer in tower.layers.items()}
                                 for tower in encoder.towers])


@contextmanager
def with_text_lora(encoder: ClipTextEncoder, changes: Sequence[Mapping[str, LowRank]], strength: float) -> Iterator[None]:
    """Text encoders with a LoRA at a strength, as long as this lasts; then their weights are bit for bit what they were."""
    weights = [(tower.layers[layer].weight, change) for tower, of_tower in zip(encoder.towers, changes, strict=True)
               for layer, change in of_tower.items()]
    before = [weight.clone() for weight, _ in weights]
    encoder.forget()
    try:
        with torch.no_grad():
            for weight, change in weights:
                weight += strength * change.change(tuple(weight.shape)).to(weight)
        yield
    finally:
        with torch.no_grad():
            for (weight, _), own in zip(weights, before, strict=True):
                weight.copy_(own)
        encoder.forget()


class LoraSwitch:
    """LoRAs beside the weights of a UNet, which stay as they are; one acts at a time, at a strength.

    Args:
        text_is_used: their parts for text encoders act elsewhere; else a warning says that they are left out.
    Raises:
        FileError: see `read_lora`.
    """

    def __init__(self, unet: Any, paths: Sequence[Path], strength: float, text_is_used: bool = False):
        self._strength = strength
        self._active = 0
        self._sides = [_Sides(_lora_of(unet, path, text_is_used)) for path in paths]
        # as parts of the UNet they are moved and cast with it
        unet.add_module("loras", nn.ModuleList(self._sides).requires_grad_(False))
        for layer in dict.fromkeys(layer for sides in self._sides for layer in sides.scales):
            unet.get_submodule(layer).register_forward_hook(self._added(layer))

    def use(self, number: int) -> None:
        """Let this one act, by its place in the order they were given in."""
        self._active = number

    def _added(self, layer: str):
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            sides = self._sides[self._active]
            if not self._strength or layer not in sides.scales:
                return None
            return output + self._strength * sides.scales[layer] * sides.product(layer, module, inputs[0])

        return hook


class _Sides(nn.Module):
    """The matrices of one LoRA."""

    def __init__(self, changes: Mapping[str, LowRank]):
        super().__init__()
        self.scales = {layer: change.scale for layer, change in changes.items()}
        self._names = {layer: layer.replace(".", "_") for layer in changes}
        for layer, change in changes.items():
            for side, matrix in (("down", change.down), ("up", change.up)):
                # copies, as what was read lies in the file itself
                self.register_buffer(f"{self._names[layer]}_{side}", matrix.to(torch.float32, copy=True), persistent=False)

    def product(self, layer: str, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """up(down(x)), as the layer computes: a product, or a convolution of its stride and padding."""
        # the weights of the UNet, and with them what it is given, may have been cast since
        down, up = (getattr(self, f"{self._names[layer]}_{side}").to(x.dtype) for side in ("down", "up"))
        if not isinstance(module, nn.Conv2d):
            return F.linear(F.linear(x, down.flatten(1)), up.flatten(1))
        kernel = down.reshape(len(down), *module.weight.shape[1:])
        x_r = F.conv2d(x, kernel, None, module.stride, module.padding, module.dilation)
        return F.conv2d(x_r, up.reshape(*up.shape[:2], 1, 1))


def _lora_of(unet: Any, path: Path, text_is_used: bool) -> dict[str, LowRank]:
    layers = {name: tuple(module.weight.shape) for name, module in unet.named_modules()
              if isinstance(module, nn.Linear | nn.Conv2d)}
    aliases = {name.replace(".", "_"): name for name in layers}
    depth = unet.config.layers_per_block
    ldm_names = ldm_unet_names(layers, depth) if isinstance(depth, int) else {}
    aliases |= {other.replace(".", "_"): name for name, other in ldm_names.items()}
    # older diffusers call the first part of an attention's way out as the whole
    aliases |= {alias.removesuffix("_0"): name for alias, name in aliases.items() if alias.endswith("_to_out_0")}
    return read_lora(path, layers, aliases, text_is_used)
