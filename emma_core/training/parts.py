"""What a run does with the frozen models: loads them as its configuration says, encodes its data with them.

Shapes: N text tokens of width D.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..base.parts import Parts, load_base_parts
from ..base.precision import precision_on
from ..encoders.base import ReferenceEncoder, encode_pictures
from ..encoders.loading import load_encoder
from ..encoders.options import EncodeOptions, Framing
from .checks import encoder_file
from .config import TrainConfig
from .prepare import Encoders
from .starts import wanted_features


def load_parts(config: TrainConfig, dtype: torch.dtype, device: torch.device) -> Parts:
    """All frozen models, still on the CPU; without a reference encoder where ELLA itself learns.

    Raises:
        SettingsError: a part is not named.
        EmmaError: a file that cannot be used, see the loaders.
    """
    parts = load_base_parts(config.base, config.ella, dtype, device, new_ella=config.what == "ella")
    if config.train.gradient_checkpointing:
        parts.backbone.enable_gradient_checkpointing()
    if config.what == "module":
        parts.reference_encoder = load_encoder(encoder_file(config), config.encoder.open_clip_model or None)
    return parts


def loaded_files(config: TrainConfig) -> list[str]:
    """Files and folders that `load_parts` reads, as far as the settings name them."""
    encoder = config.encoder.file if config.what == "module" else ""
    return [config.base.checkpoint, config.base.vae, config.ella.file, config.ella.text_encoder, encoder]


def encoders_of(parts: Parts, config: TrainConfig) -> Encoders:
    """What the training data are encoded with, and what the caches depend on."""
    text = config.ella.text_encoder or config.base.checkpoint
    return Encoders(
        encode_latents=lambda pixels_B3HW: parts.backbone.encode(pixels_B3HW).float().cpu(),
        encode_texts=lambda captions: [features.float().cpu() for features in parts.text_encoder.encode(captions)],
        encode_pooled=lambda captions: [vector.float().cpu() for vector in parts.pooled(captions)],
        reference_encoder=parts.reference_encoder,
        latents_settings=f"{config.base.vae or config.base.checkpoint} {parts.backbone.sha256}",
        texts_settings=f"{text} {weights_mark(parts.text_encoder.model)} {parts.text_encoder.tokenizer_fingerprint}",
        place=parts.place,
    )


def options_of(config: TrainConfig) -> EncodeOptions:
    """How references are encoded: the module's features, at the configured layer, framed as configured."""
    encoder = config.encoder
    framing = Framing(frame=encoder.frame, background=encoder.background)
    return EncodeOptions(tuple(wanted_features(config)), encoder.layer, framing)


def encode_references(
    config: TrainConfig, encoder: ReferenceEncoder, image_BHW3: torch.Tensor, **how: Any
) -> list[dict[str, torch.Tensor]]:
    """What the module that learns reads of each picture in [0, 1]: feature name -> (V, D).

    Args:
        how: cache, pictures at once and what is called after each chunk, as `encode_pictures` takes them.
    Raises:
        ImageInputError, ReferenceMismatchError: see `encode_pictures`.
    """
    features, _ = encode_pictures(encoder, image_BHW3, None, options_of(config), **how)
    rows = len(next(iter(features.values())))
    return [{name: tensor[row] for name, tensor in features.items()} for row in range(rows)]


def weights_mark(model: torch.nn.Module) -> str:
    """A short mark of a model's weights for cache keys: sizes, precision, and sums of a few tensors."""
    parameters = list(model.parameters())
    sums = [f"{value.float().sum().item():.6g}" for value in parameters[:: max(1, len(parameters) // 8)]]
    return f"{sum(value.numel() for value in parameters)} {parameters[0].dtype} {' '.join(sums)}"


def prepare_precision(config: TrainConfig, device: torch.device) -> tuple[TrainConfig, torch.dtype]:
    """The configuration with the precision that the device has, and the type of frozen weights."""
    precision = precision_on(config.train.precision, device)
    return replace(config, train=replace(config.train, precision=precision.name)), precision.weights
