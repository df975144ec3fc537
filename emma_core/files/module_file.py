"""EMMA modules on disk: one safetensors file with its metadata (see `module_config`).

The key `calibration` = {strength, ...} of the `emma` metadata says which strength of what was trained a user's strength 1
stands for: every gate is multiplied by it. Versions that do not know the key keep it, and take 1; a file without it means 1.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import ModuleFileError, short
from ..model.gated_resampler import GatedResampler
from ..model.module_config import ModuleConfig
from ..model.token_resampler import resampler_for
from .json_file import parse_json
from .state_names import to_file_names, to_layer_names
from .tensor_file import check_finite, check_shapes, open_tensors, read_tensors
from .writing import write_atomically

_WHAT = "an EMMA module"
_TIME_KEY = "blocks.0.ln_1.linear.weight"
_MOST_LISTED = 5


def load_module(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    operations: ModuleType | type = nn,
) -> GatedResampler:
    """Load an EMMA module strictly; its metadata is ``.config``.

    Args:
        path: a file as `save_module` writes it.
        dtype: of the weights; None means float32.
        device: None means the CPU.
        operations: namespace that the linear layers come from.
    Raises:
        ModuleFileError: not such a file, another format version, missing, extra, misshapen or non-finite weights.
    """
    name = Path(path).name
    tensors, metadata = read_tensors(path, _WHAT, ModuleFileError)
    config = _config_from(metadata, name)
    if _TIME_KEY in tensors and tensors[_TIME_KEY].ndim == 2:
        config = config.replace(time_width=tensors[_TIME_KEY].shape[1])
    return module_from_tensors(tensors, config, name, dtype, device, operations)


def read_module_config(path: str | Path) -> ModuleConfig:
    """The metadata of an EMMA module, without its weights.

    Raises:
        ModuleFileError: not such a file, or another format version.
    """
    with open_tensors(path, _WHAT, ModuleFileError) as file:
        return _config_from(file.metadata(), Path(path).name)


def module_from_tensors(
    tensors: Mapping[str, torch.Tensor], config: ModuleConfig, name: str, dtype: torch.dtype | None = None,
    device: torch.device | str | None = None, operations: ModuleType | type = nn,
) -> GatedResampler:
    """Build a module from weights under their names in the file; as strict as `load_module`."""
    if config.layers + len(config.features) > len(tensors):
        raise ModuleFileError(f"{name} declares {config.layers} layers and {len(config.features)} features, and holds "
                              f"{len(tensors)} tensors; wanted {_WHAT}. Get the file again.")
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in module_tensors(resampler_for(config)).items()}
    if not config.separable_gates:
        # g = 1: the gates' weights have no effect, and a file may leave them out
        shapes = {key: shape for key, shape in shapes.items() if ".gate." not in key or key in tensors}
    check_shapes(tensors, shapes, name, _WHAT, ModuleFileError)
    check_finite(tensors, name, ModuleFileError)
    module = resampler_for(config, operations, dtype=dtype or torch.float32, device=device)
    weights = module.state_dict()
    for key, tensor in to_layer_names(tensors).items():
        weights[key].copy_(tensor)  # in place, as a second copy of a large module may not fit
    module.name = f"{name} ({config.condition})"
    return module.eval().requires_grad_(False)


def module_tensors(module: GatedResampler) -> dict[str, torch.Tensor]:
    """The module's weights under their names in the file."""
    return to_file_names(module.state_dict())


def _config_from(metadata: Mapping[str, str], name: str) -> ModuleConfig:
    if "emma" not in metadata:
        raise ModuleFileError(f"{name} has no `emma` metadata, so it is not an EMMA module (found "
                              f"{', '.join(map(short, sorted(metadata)[:_MOST_LISTED])) or 'none'}). Choose a file from "
                              "models/emma that EMMA's trainer saved.")
    entry = parse_json(metadata["emma"], f"{name}: its `emma` metadata", ModuleFileError)
    return ModuleConfig.from_entry(entry, {key: value for key, value in metadata.items() if key != "emma"}, name)


def save_module(
    module: GatedResampler, path: str | Path, dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a module with its metadata, atomically; metadata it was loaded with is kept.

    Args:
        module: the module.
        path: the file; replaced only once the new one is whole.
        dtype: of the weights on disk; None keeps theirs.
        metadata: further entries, for instance ``modelspec.title``.
    Raises:
        ModuleFileError: weights hold NaN or infinite values.
    """
    tensors = {key: value.detach().to("cpu", dtype or value.dtype).contiguous()
               for key, value in module_tensors(module).items()}
    check_finite(tensors, Path(path).name, ModuleFileError)
    entries = {**module.config.file_metadata, **(metadata or {}), "emma": module.config.to_json()}
    write_atomically(path, lambda temporary: save_file(tensors, str(temporary), metadata=entries))


def copy_module(path: str | Path, copy: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a module's file to another place, with further metadata entries; its weights stay as they are.

    Raises:
        ModuleFileError: not such a file.
    """
    load_module(path)
    tensors, entries = read_tensors(path, _WHAT, ModuleFileError)
    write_atomically(copy, lambda temporary: save_file(tensors, str(temporary), metadata={**entries, **metadata}))


def write_calibration(path: str | Path, calibration: Mapping[str, Any]) -> None:
    """Write a module's file again, atomically, with another `calibration`; weights and all other metadata stay as they are.

    Raises:
        ModuleFileError: not such a file, or a strength that is not above 0.
    """
    config = load_module(path).config
    tensors, metadata = read_tensors(path, _WHAT, ModuleFileError)
    try:
        config = config.replace(calibration=calibration)
    except ModuleFileError as found:
        raise ModuleFileError(f"{Path(path).name}: {found}") from None
    entries = {**metadata, "emma": config.to_json()}
    write_atomically(path, lambda temporary: save_file(tensors, str(temporary), metadata=entries))
