"""Pictures without ComfyUI from the files that a user names: a base, its ELLA, modules, reference encoders.

Shapes: B pictures H x W, T timesteps, latents 4 x h x w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..encoders.base import ReferenceEncoder, encode_pictures
from ..encoders.loading import encoder_kind, load_encoder
from ..encoders.reference_features import check_encoder, check_for_module, combine_features, encode_options
from ..errors import ReferenceMismatchError
from ..files.module_file import load_module
from ..files.tensor_file import write_atomically
from ..model.gated_resampler import GatedResampler
from ..training.config import BaseConfig, EllaConfig, OptimisationConfig, TrainConfig
from ..training.parts import load_parts, prepare_precision
from ..training.prepare import AUTOENCODER, TEXT_ENCODER, UNET
from .pipeline import SD15_LATENT_SCALE, Pipeline, Request, Sampling, generate, sd15_scheduler

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}
_SAME_SCHEDULE = 1e-4  # of alphas_cumprod: what the rounding of published schedules explains


def precision_on(precision: str, device: torch.device) -> str:
    """The precision that the device has; fp16 is fp32 on CPUs."""
    return prepare_precision(_as_training(precision=precision), device)[0].train.precision


class TextToImage:
    """A frozen base with its ELLA and reference encoders, loaded.

    Args:
        base, ella: as in a training configuration; the playground brings its own.
        encoder_files: reference encoders; each module takes the one that it was trained with.
        open_clip_model: open_clip's name of an encoder, where its file does not tell.
        precision: of the diffusion model: fp32, fp16, bf16.
    Raises:
        EmmaError: a file that cannot be used, parts that do not fit together, see the loaders.
    """

    def __init__(self, base: BaseConfig, ella: EllaConfig, encoder_files: Sequence[str], open_clip_model: str,
                 precision: str, device: torch.device):
        training, dtype = prepare_precision(_as_training(base, ella, precision), device)
        self._device = device
        self._autocast_dtype = _AUTOCAST.get(training.train.precision)
        self._parts = load_parts(training, dtype, device)
        self._connector = self._parts.connector.to(device)
        self._encoders = [_load_encoder(file, open_clip_model) for file in encoder_files]

    def load_module(self, file: str) -> GatedResampler:
        """A module for this ELLA, of which the reference encoder is here.

        Raises:
            EmmaError: it cannot be read, fits another ELLA, or none of the encoders is its own.
        """
        module = load_module(file, device=self._device)
        self._connector.check_fits(module)
        encoder_for(module, self._encoders)
        return module

    def features(
        self, module: GatedResampler, image_1HW3: torch.Tensor, mask_1HW: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """What a module reads of a picture in [0, 1]: feature name -> (1, vectors, dim).

        Raises:
            ImageInputError, NoFaceError: the picture cannot be used.
            ReferenceMismatchError: the encoder is not the module's.
        """
        encoder, options = encoder_for(module, self._encoders), encode_options(module.config)
        self._parts.place()  # a small card does not hold a large encoder beside them
        encoder.model.to(self._device)
        try:
            features, _ = encode_pictures(encoder, image_1HW3, mask_1HW, options)
        finally:
            encoder.model.to("cpu")
        combined = combine_features(features, "concat", {**encoder.description, "layer": options.layer})
        check_for_module(combined, module.config)
        return {name: tensor.to(self._device) for name, tensor in combined.features.items()}

    def draw(self, requests: Sequence[Request], sampling: Sampling) -> list[Image.Image]:
        """A picture for each request.

        Raises:
            ReferenceMismatchError: a reference does not fit.
        """
        self._parts.place(UNET, AUTOENCODER, TEXT_ENCODER)
        with self._autocast():
            pictures_BHW3 = generate(self._pipeline(), requests, sampling)
        levels = (pictures_BHW3.float() * 255).round().byte().numpy()
        return [Image.fromarray(picture) for picture in levels]

    def _autocast(self, enabled: bool = True) -> torch.autocast:
        return torch.autocast(self._device.type, self._autocast_dtype, enabled and self._autocast_dtype is not None)

    def _pipeline(self) -> Pipeline:
        backbone = self._parts.backbone

        def texts(prompts: Sequence[str]) -> list[torch.Tensor]:
            with self._autocast(False):  # T5 has a precision of its own
                return [features.float() for features in self._parts.text_encoder.encode(prompts)]

        return Pipeline(texts, self._connector, backbone.predict_noise,
                        lambda latent_B4hw: backbone.decode(latent_B4hw * SD15_LATENT_SCALE),
                        scheduler_for(backbone.alphas_cumprod_T, backbone.prediction))


def scheduler_for(alphas_cumprod_T: torch.Tensor, prediction: str) -> DDIMScheduler:
    """SD1.5's scheduler, with another schedule or prediction where the checkpoint has one."""
    scheduler = sd15_scheduler()
    changes: dict = {"prediction_type": "v_prediction"} if prediction == "v" else {}
    kept_T = alphas_cumprod_T.detach().cpu().double()
    if not torch.allclose(kept_T, scheduler.alphas_cumprod.double(), rtol=0, atol=_SAME_SCHEDULE):
        before_T = torch.cat([kept_T.new_ones(1), kept_T[:-1]])
        changes["trained_betas"] = (1 - kept_T / before_T).tolist()
    return type(scheduler).from_config(scheduler.config, **changes) if changes else scheduler


def encoder_for(module: GatedResampler, encoders: Sequence[ReferenceEncoder]) -> ReferenceEncoder:
    """The first encoder that the module was trained with.

    Raises:
        ReferenceMismatchError: none of them is; what was found and what is needed.
    """
    reasons = []
    for encoder in encoders:
        try:
            check_encoder(encoder.description, module.config, before=True)
        except ReferenceMismatchError as found:
            reasons.append(str(found))
            continue
        if set(module.config.features) <= set(encoder.feature_names):
            return encoder
        reasons.append(f"it gives {', '.join(encoder.feature_names)}, not {', '.join(module.config.features)}.")
    raise ReferenceMismatchError(f"none of the {len(encoders)} encoders is the one of {module.name}: {' '.join(reasons)}")


def picture_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB as (1, H, W, 3), grey as (1, H, W), in [0, 1]."""
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)[None]


def save_picture(picture: Image.Image, path: Path, words: Mapping[str, str]) -> None:
    """As PNG, with what it shows in its text entries, `emma_` before each name; the file appears when it is whole."""
    about = PngInfo()
    for name, text in words.items():
        about.add_itxt(f"emma_{name}", text)
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG", pnginfo=about))


def _as_training(
    base: BaseConfig | None = None, ella: EllaConfig | None = None, precision: str = OptimisationConfig.precision
) -> TrainConfig:
    """What training's loaders need to know; "ella" is their word for: no reference encoder of theirs."""
    return TrainConfig(what="ella", base=base or BaseConfig(), ella=ella or EllaConfig(),
                       train=OptimisationConfig(precision=precision))


def _load_encoder(file: str, open_clip_model: str) -> ReferenceEncoder:
    kind = encoder_kind(file)
    return load_encoder(file, (open_clip_model or None) if kind == "open_clip" else None, kind)
