"""The original (LDM) names of a UNet's layers, from diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterable

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_OUTER = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
          "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
          "conv_out": "out.2"}
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.([0-9]+)\.(.+)")
_SIDE = re.compile(r"(down|up)_blocks\.([0-9]+)\.(resnets|attentions|downsamplers|upsamplers)\.([0-9]+)\.(.+)")


def ldm_unet_names(names: Iterable[str], layers_per_block: int) -> dict[str, str]:
    """diffusers' name of a layer -> its original name, for the layers that have one.

    Args:
        names: of all layers, as a level's upsampler is counted behind its attention.
        layers_per_block: residual blocks of one level on the way down; on the way up there is one more.
    """
    names = list(names)
    attending = {name.split(".")[1] for name in names if name.startswith("up_blocks.") and ".attentions." in name}
    found = {name: _ldm_name(name, layers_per_block, attending) for name in names}
    return {name: other for name, other in found.items() if other}


def _ldm_name(name: str, layers: int, attending: set[str]) -> str:
    if name in _OUTER:
        return _OUTER[name]
    middle, side = _MIDDLE.fullmatch(name), _SIDE.fullmatch(name)
    if middle:
        place = 2 * int(middle[2]) if middle[1] == "resnets" else 1
        return f"middle_block.{place}.{_inner(middle[1], middle[3])}"
    if not side:
        return ""
    way, level, part, index, rest = side[1], int(side[2]), side[3], int(side[4]), side[5]
    first = level * (layers + 1) + (way == "down")
    if part == "downsamplers":
        return f"input_blocks.{first + layers}.0.op"
    if part == "upsamplers":
        return f"output_blocks.{first + layers}.{2 if side[2] in attending else 1}.conv"
    blocks = "input_blocks" if way == "down" else "output_blocks"
    return f"{blocks}.{first + index}.{int(part == 'attentions')}.{_inner(part, rest)}"


def _inner(part: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if part == "resnets" else rest
