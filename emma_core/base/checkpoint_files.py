"""What reading any checkpoint of a diffusion model takes: parts of diffusers folders and of single files, strictly.

Shapes: T timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import FileError, short
from ..files.json_file import read_json
from ..files.plain_file import PICKLE_SUFFIXES, visible
from ..files.tensor_file import open_tensors
from .schedule import TIMESTEPS
from .spec import BaseSpec

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
_DECLARED = {"epsilon": "eps", "eps": "eps", "v_prediction": "v", "v": "v"}


@dataclass(frozen=True)
class LoadedBase:
    """What a checkpoint holds, in float32 on the CPU. ``autoencoder`` is None where it was not asked for."""

    unet: nn.Module
    autoencoder: nn.Module | None
    spec: BaseSpec
    sha256: str


def read_schedule(folder: Path) -> tuple[torch.Tensor, str]:
    """(T,) alphas_cumprod and the declared prediction of a folder's scheduler.

    Raises:
        FileError: another prediction, or another count of timesteps.
    """
    from diffusers import DDPMScheduler

    config = read_config(folder / "scheduler" / "scheduler_config.json")
    declared, steps = config.get("prediction_type", "epsilon"), config.get("num_train_timesteps", TIMESTEPS)
    if not isinstance(declared, str) or declared not in _DECLARED or steps != TIMESTEPS:
        raise FileError(f"{folder.name}/scheduler declares prediction {short(repr(declared))} over {short(steps)} timesteps; "
                        f"wanted epsilon or v_prediction over {TIMESTEPS}. Choose another model.")
    # only what makes the schedule: folders name many kinds of scheduler
    made_of = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    try:
        scheduler = DDPMScheduler(**{key: config[key] for key in made_of if key in config})
        alphas_cumprod_T = scheduler.alphas_cumprod.float()
        if alphas_cumprod_T.shape != (TIMESTEPS,) or not ((alphas_cumprod_T >= 0) & (alphas_cumprod_T <= 1)).all():
            raise ValueError(f"shares of the latents' variance of shape {tuple(alphas_cumprod_T.shape)}, not all from 0 to 1")
    except Exception as found:  # diffusers has no common error for numbers that make no schedule
        raise FileError(f"{folder.name}/scheduler describes no schedule ({short(str(found))}); wanted one of {TIMESTEPS} "
                        "timesteps. Download it again.") from found
    return alphas_cumprod_T, _DECLARED[declared]


def declared_prediction(shapes: Mapping[str, Any], metadata: Mapping[str, str], name: str) -> str:
    """Of a single file: by the metadata `modelspec.prediction_type`, by a marker key `v_pred`, else "eps".

    Raises:
        FileError: another one is declared.
    """
    declared = metadata.get("modelspec.prediction_type")
    if declared is not None and declared not in _DECLARED:
        raise FileError(f"{name}: its metadata modelspec.prediction_type is {declared!r}; wanted one of "
                        f"{', '.join(_DECLARED)}. Choose another model.")
    return _DECLARED[declared or ("v" if "v_pred" in shapes else "eps")]


def shapes_of(path: Path, what: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and metadata of a file, from its header."""
    with open_tensors(path, what) as file:
        return file.shapes, file.metadata()


def read(path: Path, what: str, starts: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so."""
    with open_tensors(path, what) as file:
        return file.tensors(key for key in file.stored if key.startswith(starts))


def read_config(path: Path) -> dict[str, Any]:
    """An object of a diffusers folder's configuration.

    Raises:
        FileError: missing, or no such thing.
    """
    return read_json(path, "a part of a diffusers folder, which has unet/, vae/ and scheduler/")


def side(shapes: Mapping[str, tuple[int, ...]], name: str, axis: int) -> int:
    """One side of a tensor's shape; 0 of one that is not there or has no such side."""
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) > axis else 0


def weights_in(folder: Path) -> Path:
    """The weights of a part of a diffusers folder.

    Raises:
        FileError: none, or pickled ones.
    """
    for name in _WEIGHTS:
        if (folder / name).exists():
            return folder / name
    pickles = [file.name for file in visible(folder.iterdir()) if file.suffix in PICKLE_SUFFIXES]
    found = f"holds only {pickles[0]}, a pickled file, which can run code when opened" if pickles else "holds no weights"
    raise FileError(f"{folder} {found}; wanted {_WEIGHTS[0]}. Download the safetensors version.")
