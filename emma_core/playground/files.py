"""The playground's autoencoder and UNet on disk."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import FileError
from ..files.diffusers_models import check_config, load_model
from ..files.json_file import parse_json
from ..files.tensor_file import check_finite, check_shapes, read_tensors
from . import PLAYGROUND_DIR
from .autoencoder import Autoencoder

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_AUTOENCODER, _UNET = "the playground's autoencoder", "the playground's UNet"


def load_autoencoder(
    latent_scale: float, path: str | Path | None = None, dtype: torch.dtype | None = None,
    device: torch.device | str | None = None, operations: ModuleType | type = nn,
) -> Autoencoder:
    """The shipped autoencoder, or another file of its kind, strictly.

    Args:
        latent_scale: of the latents it is to speak, see `Autoencoder`.
        path: None means the shipped file.
        dtype, device: None means float32 on the CPU.
        operations: namespace that the convolutions come from.
    Raises:
        FileError: not such a file; missing, extra, misshapen or non-finite weights.
    """
    path = Path(path or PLAYGROUND_DIR / "autoencoder.safetensors")
    tensors, _ = read_tensors(path, _AUTOENCODER)
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in Autoencoder(latent_scale).state_dict().items()}
    check_shapes(tensors, shapes, path.name, _AUTOENCODER)
    check_finite(tensors, path.name)
    autoencoder = Autoencoder(latent_scale, operations, dtype or torch.float32, device)
    autoencoder.load_state_dict(tensors)
    return autoencoder.eval().requires_grad_(False)


def unet_tensors_and_config(path: str | Path | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The UNet's weights under diffusers' key names, and diffusers' configuration of it.

    Raises:
        FileError: not such a file, or non-finite weights.
    """
    path = Path(path or PLAYGROUND_DIR / "unet.safetensors")
    tensors, metadata = read_tensors(path, _UNET)
    if "unet" not in metadata:
        raise FileError(f"{path.name} has no `unet` metadata, so it is not {_UNET}. "
                        "Restore the file from the repository.")
    check_finite(tensors, path.name)
    config = parse_json(metadata["unet"], f"{path.name}: its `unet` metadata", FileError)
    check_config(config, tensors, path.name, _UNET)
    return tensors, config


def load_unet(path: str | Path | None = None) -> UNet2DConditionModel:
    """The UNet as diffusers' model, float32 on the CPU.

    Raises:
        FileError: as `unet_tensors_and_config`; missing, extra or misshapen weights.
    """
    from diffusers import UNet2DConditionModel

    tensors, config = unet_tensors_and_config(path)
    return load_model(UNet2DConditionModel, config, tensors, Path(path or "unet.safetensors").name, _UNET)
