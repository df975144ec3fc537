"""ELLA connectors on disk: the released file's key names, any size."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import ConnectorFileError, short
from ..model.connector import Connector, ConnectorConfig
from .json_file import parse_json
from .state_names import to_file_names, to_layer_names
from .tensor_file import (
    check_finite,
    check_shapes,
    count_blocks,
    open_tensors,
    read_tensors,
    sha256_of_file,
)
from .writing import write_atomically

_WHAT = "an ELLA connector (for instance ella-sd1.5-tsc-t5xl.safetensors)"
_BLOCKS = "connector.perceiver_blocks."
_SIZES = ("connector.latents", "connector.proj_in.weight", "time_embedding.linear_1.weight")  # which tell them
DEFAULT_HEADS = 8


def load_connector(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    operations: ModuleType | type = nn, compute_dtype: torch.dtype | None = None,
) -> Connector:
    """Load an ELLA connector strictly by the released file's key names.

    Sizes are read from the shapes; the number of heads from the metadata entry `ella` ({"heads": 8}), else 8.

    Args:
        path: the file.
        dtype: of the weights; None means float32.
        device: None means the CPU.
        operations: namespace that the linear layers come from.
        compute_dtype: of the activations; None means that of the weights.
    Raises:
        ConnectorFileError: not such a file; missing, extra, misshapen or non-finite weights; impossible heads.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path, _WHAT, ConnectorFileError)
    config = _config_from(tensors, metadata, path.name)
    _check_keys(tensors, config, path.name)
    check_finite(tensors, path.name, ConnectorFileError)
    connector = Connector(config, operations, dtype or torch.float32, device, compute_dtype)
    connector.load_state_dict(to_layer_names(tensors))
    connector.sha256 = sha256_of_file(path)
    connector.name = path.name
    return connector.eval().requires_grad_(False)


def read_connector_config(path: str | Path) -> ConnectorConfig:
    """The sizes of an ELLA file; no numbers are read.

    Raises:
        ConnectorFileError: see `load_connector`, of everything but numbers.
    """
    path = Path(path)
    with open_tensors(path, _WHAT, ConnectorFileError) as file:
        found = {key: torch.empty(shape, device="meta") for key, shape in file.shapes.items()}
        config = _config_from(found, file.metadata(), path.name)
    _check_keys(found, config, path.name)
    return config


def connector_tensors(connector: Connector) -> dict[str, torch.Tensor]:
    """The connector's weights under the released file's names."""
    return to_file_names(connector.state_dict())


def save_connector(connector: Connector, path: str | Path, dtype: torch.dtype | None = None,
                   metadata: Mapping[str, str] | None = None) -> None:
    """Write a connector as an ELLA file, atomically, with its number of heads in the metadata."""
    tensors = {key: value.detach().to("cpu", dtype or value.dtype).contiguous()
               for key, value in connector_tensors(connector).items()}
    check_finite(tensors, Path(path).name, ConnectorFileError)
    entries = {**(metadata or {}), "ella": json.dumps({"heads": connector.config.heads})}
    write_atomically(path, lambda temporary: save_file(tensors, str(temporary), metadata=entries))


def _check_keys(tensors: Mapping[str, torch.Tensor], config: ConnectorConfig, name: str) -> None:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in connector_tensors(Connector(config)).items()}
    check_shapes(tensors, shapes, name, _WHAT, ConnectorFileError)


def _config_from(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], name: str) -> ConnectorConfig:
    layers = count_blocks(tensors, _BLOCKS, name, ConnectorFileError)
    if not layers or any(key not in tensors or tensors[key].ndim != 2 or not tensors[key].numel() for key in _SIZES):
        keys = ", ".join(map(short, sorted(tensors)[:3]))
        raise ConnectorFileError(
            f"{name} holds {len(tensors)} tensors ({keys}, ...), none of {_WHAT}: no connector.latents or "
            "connector.perceiver_blocks.*. Choose the ELLA file; checkpoints, LoRAs and EMMA modules have their own loaders."
        )
    latents, width = tensors["connector.latents"].shape
    time_width, time_channels = tensors["time_embedding.linear_1.weight"].shape
    heads = _heads_from(metadata, name)
    if width % heads:
        raise ConnectorFileError(f"{name} has width {width}, which {heads} heads do not divide. "
                                 'Its `ella` metadata must name the heads, as {"heads": 4}.')
    return ConnectorConfig(
        width=width, latents=latents, layers=layers, heads=heads,
        text_dim=tensors["connector.proj_in.weight"].shape[1], time_channels=time_channels, time_width=time_width,
    )


def _heads_from(metadata: Mapping[str, str], name: str) -> int:
    if "ella" not in metadata:
        return DEFAULT_HEADS
    entry = parse_json(metadata["ella"], f"{name}: its `ella` metadata", ConnectorFileError, advice="Save the file again.")
    heads = entry.get("heads")
    if type(heads) is not int:
        raise ConnectorFileError(f"{name}: its `ella` metadata {short(metadata['ella'])} does not name the heads; "
                                 'wanted JSON such as {"heads": 8}. Save the file again.')
    if heads < 1:
        raise ConnectorFileError(f"{name}: its `ella` metadata names {heads} heads; wanted 1 or more.")
    return heads
