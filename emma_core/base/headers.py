"""What the files of a base say of themselves in their headers: enough to refuse them before a weight is read."""

from __future__ import annotations

from pathlib import Path

from ..errors import FileError
from ..playground import PLAYGROUND
from .autoencoder_files import VAE_PREFIX, vae_config_of
from .checkpoint_files import read_config, shapes_of, weights_in
from .config import BaseConfig
from .sd15_files import UNET_PREFIX, refuse_other_models, unet_config_of
from .spec import PLAYGROUND_SPEC, SD15

_PLAYGROUND_UNET = "unet.safetensors"
_WHAT = "an SD1.5-family checkpoint"


def check_checkpoint(base: BaseConfig) -> int:
    """Width of the tokens that a base reads.

    Raises:
        FileError: see `backbones.load_backbone`, of everything but numbers.
    """
    path = Path(base.checkpoint)
    if base.checkpoint == PLAYGROUND or (path / _PLAYGROUND_UNET).is_file():
        return PLAYGROUND_SPEC.context_width
    if path.is_dir():
        config = read_config(path / "unet" / "config.json")
        refuse_other_models(config.get("in_channels"), config.get("cross_attention_dim"), f"{path.name}/unet")
        shapes_of(weights_in(path / "unet"), _WHAT)
        if not base.vae:
            shapes_of(weights_in(path / "vae"), _WHAT)
        return config["cross_attention_dim"]
    shapes, _ = shapes_of(path, _WHAT)
    config = unet_config_of({key.removeprefix(UNET_PREFIX): shape for key, shape in shapes.items()
                             if key.startswith(UNET_PREFIX)}, path.name)
    if not base.vae and not any(key.startswith(VAE_PREFIX) for key in shapes):
        raise FileError(f"{path.name} holds no autoencoder; wanted first_stage_model.* beside the UNet. Name one as base.vae.")
    return config["cross_attention_dim"]


def check_autoencoder(path: Path) -> None:
    """Refuse a file or folder that is no autoencoder.

    Raises:
        FileError: see `autoencoder_files.load_autoencoder`, of everything but numbers.
    """
    if path.is_dir():
        folder = path if (path / "config.json").exists() else path / "vae"
        read_config(folder / "config.json")
        shapes_of(weights_in(folder), "an SD1.5-family autoencoder")
        return
    shapes, _ = shapes_of(path, "an SD1.5-family autoencoder")
    vae_config_of({key.removeprefix(VAE_PREFIX): shape for key, shape in shapes.items()}, path.name, SD15)
