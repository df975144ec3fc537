"""What reading any checkpoint of a diffusion model takes: parts of diffusers folders and of single files, strictly.

Shapes: T timesteps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import FileError
from ..files.plain_file import PICKLE_SUFFIXES, visible
from ..files.tensor_file import check_finite, check_shapes, open_tensors
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


def build(kind: Any, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], name: str, what: str) -> nn.Module:
    """The model with the tensors as its frozen float32 weights.

    Raises:
        FileError: weights that are missing, left over, misshapen or not finite.
    """
    with torch.device("meta"):
        model = kind.from_config(dict(config))
    check_shapes(tensors, {key: tuple(value.shape) for key, value in model.state_dict().items()}, name, what)
    check_finite(tensors, name)
    model.load_state_dict({key: value.to(torch.float32, copy=True) for key, value in tensors.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def without_loss(found: Mapping, converted: dict[str, torch.Tensor], name: str, what: str) -> dict[str, torch.Tensor]:
    """What diffusers' helpers made of the tensors of a file; they drop what they do not know.

    Raises:
        FileError: a tensor was dropped.
    """
    kept = {value.data_ptr() for value in converted.values()}
    lost = [key for key, value in found.items() if value.data_ptr() not in kept]
    if lost:
        raise FileError(f"{name} has {len(lost)} weights that {what} has not, such as {lost[0]}; wanted {what}. Choose another "
                        "file.")
    return converted


def read_schedule(folder: Path) -> tuple[torch.Tensor, str]:
    """(T,) alphas_cumprod and the declared prediction of a folder's scheduler.

    Raises:
        FileError: another prediction, or another count of timesteps.
    """
    from diffusers import DDPMScheduler

    config = read_json(folder / "scheduler" / "scheduler_config.json")
    declared, steps = config.get("prediction_type", "epsilon"), config.get("num_train_timesteps", TIMESTEPS)
    if declared not in _DECLARED or steps != TIMESTEPS:
        raise FileError(f"{folder.name}/scheduler declares prediction {declared!r} over {steps} timesteps; wanted epsilon or "
                        f"v_prediction over {TIMESTEPS}. Choose another model.")
    # only what makes the schedule: folders name many kinds of scheduler
    made_of = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    scheduler = DDPMScheduler(**{key: config[key] for key in made_of if key in config})
    return scheduler.alphas_cumprod.float(), _DECLARED[declared]


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
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
        return shapes, dict(file.metadata() or {})


def read(path: Path, what: str, starts: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so."""
    with open_tensors(path, what) as file:
        return {key: file.get_tensor(key) for key in list(file.keys()) if key.startswith(starts)}


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


def read_json(path: Path) -> dict[str, Any]:
    """An object of a diffusers folder's configuration.

    Raises:
        FileError: missing, or no such thing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as found:
        raise FileError(f"{path} cannot be read ({found.strerror}); wanted a diffusers folder with unet/, vae/ and "
                        "scheduler/. Check the path, or download what is missing.") from found
    except ValueError as found:
        raise FileError(f"{path} is not JSON ({found}). Download it again.") from found
    if not isinstance(content, dict):
        raise FileError(f"{path} is not a JSON object. Download it again.")
    return content
