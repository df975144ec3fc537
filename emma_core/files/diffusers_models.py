"""diffusers' models from a configuration and weights: what the configuration says is compared with the weights first.

A configuration of a hundred bytes may ask for a million layers, which take for ever to build, even without values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import FileError, short
from .tensor_file import check_finite, check_shapes

_LARGEST_NUMBER, _MOST_ENTRIES = 1 << 16, 64  # of any number, and of any list, in a configuration
_LONGEST = 1024  # letters of any text in it: diffusers prints what it does not know
# what declares how many parts there are -> where the names of weights count them
_COUNTS = {"block_out_channels": r"down_blocks[.]([0-9]{1,4})[.]", "layers_per_block": r"(?:down|up)_blocks[.][0-9]{1,4}"
           r"[.]resnets[.]([0-9]{1,4})[.]", "transformer_layers_per_block": r"[.]transformer_blocks[.]([0-9]{1,4})[.]"}


def load_model(
    kind: Any, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], name: str, what: str,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A model with the tensors as its frozen weights.

    Args:
        kind: diffusers' class of it.
        config: of a config.json.
        tensors: under diffusers' names.
        name: of the file or folder, for the messages.
        what: what it should be.
        dtype: of the weights.
    Raises:
        FileError: a configuration that does not belong to these weights, or cannot be built; weights that are missing, left
            over, misshapen or not finite.
    """
    check_config(config, tensors, name, what)
    try:
        with torch.device("meta"):
            model = kind.from_config(dict(config))
    except Exception as found:  # diffusers and torch have no common error for values that do not go together
        raise FileError(f"{name}: diffusers cannot build {what} from its configuration ({short(str(found), 200)}). Download it "
                        "again from where the weights come from.") from found
    check_shapes(tensors, {key: tuple(value.shape) for key, value in model.state_dict().items()}, name, what)
    check_finite(tensors, name)
    model.load_state_dict({key: value.to(dtype, copy=True) for key, value in tensors.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def check_config(config: Mapping[str, Any], names: Iterable[str], name: str, what: str) -> None:
    """Refuse a configuration that declares more than the names of the weights show.

    Raises:
        FileError: the key, what it declares, and what there is.
    """
    for key, value in config.items():
        numbers = [number for number in _flat(value) if isinstance(number, int | float)]
        texts = [text for text in (key, *_flat(value)) if isinstance(text, str)]
        odd = any(not abs(number) <= _LARGEST_NUMBER for number in numbers) or any(len(text) > _LONGEST for text in texts)
        if odd or len(_flat(value)) > _MOST_ENTRIES:
            raise FileError(f"{name}: its configuration has {short(key)} = {short(value)}, as {what} never has. Download it "
                            "again from where the weights come from.")
    names = list(names)
    for key, pattern in _COUNTS.items():
        value = config.get(key)
        declared = len(value) if key == "block_out_channels" and isinstance(value, list | tuple) else \
            max((number for number in _flat(value) if isinstance(number, int)), default=0)
        found = max((int(match[1]) + 1 for weight in names if (match := re.search(pattern, weight))), default=0)
        if value is not None and declared > found:
            raise FileError(f"{name}: its configuration has {key} = {short(value)}, and its weights show {found}; wanted "
                            f"{what}. Download both again from one place.")


def converted(convert: Any, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], name: str, what: str
              ) -> dict[str, torch.Tensor]:
    """What one of diffusers' helpers makes of tensors in the original layout; they drop what they do not know.

    Raises:
        FileError: a tensor is missing, or was dropped.
    """
    try:
        made = convert(dict(tensors), dict(config))
    except Exception as found:  # KeyError of a missing tensor, and others of misshapen ones
        raise FileError(f"{name} lacks weights of {what}, or has some of another shape ({short(str(found))}). Get the file "
                        "again.") from found
    kept = {value.data_ptr() for value in made.values()}
    lost = [key for key, value in tensors.items() if value.data_ptr() not in kept]
    if lost:
        raise FileError(f"{name} has {len(lost)} weights that {what} has not, such as {short(lost[0])}; wanted {what}. Choose "
                        "another file.")
    return made


def _flat(value: Any) -> list[Any]:
    """The values in lists of lists, else the value alone."""
    flat, waiting = [], [value]
    while waiting and len(flat) <= _MOST_ENTRIES:
        item = waiting.pop()
        if isinstance(item, list | tuple):
            waiting += item
        else:
            flat.append(item)
    return flat
