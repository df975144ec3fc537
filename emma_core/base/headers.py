"""What the files of a base say of themselves in their headers: enough to refuse them before a weight is read."""

from __future__ import annotations

from pathlib import Path

from ..errors import FileError
from .autoencoder_files import VAE, VAE_PREFIX, vae_config_of
from .checkpoint_files import read_config, shapes_of, weights_in
from .config import BaseConfig, is_playground
from .recognition import CHECKPOINT, recognised
from .spec import PLAYGROUND_SPEC, SD15


def check_checkpoint(base: BaseConfig) -> int:
    """Width of the tokens that a base reads.

    Raises:
        FileError: see `backbones.load_backbone`, of everything but numbers.
    """
    path = Path(base.checkpoint)
    if is_playground(base.checkpoint):
        return PLAYGROUND_SPEC.context_width
    spec = recognised(path)
    if path.is_dir():
        shapes_of(weights_in(path / "unet"), CHECKPOINT)
        if not base.vae:
            shapes_of(weights_in(path / "vae"), VAE)
    elif not base.vae and not any(key.startswith(VAE_PREFIX) for key in shapes_of(path, CHECKPOINT)[0]):
        raise FileError(f"{path.name} holds no autoencoder; wanted first_stage_model.* beside the UNet. Name one as base.vae.")
    return spec.context_width


def check_autoencoder(path: Path) -> None:
    """Refuse a file or folder that is no autoencoder.

    Raises:
        FileError: see `autoencoder_files.load_autoencoder`, of everything but numbers.
    """
    if path.is_dir():
        folder = path if (path / "config.json").exists() else path / "vae"
        read_config(folder / "config.json")
        shapes_of(weights_in(folder), VAE)
        return
    shapes, _ = shapes_of(path, VAE)
    vae_config_of({key.removeprefix(VAE_PREFIX): shape for key, shape in shapes.items()}, path.name, SD15)
