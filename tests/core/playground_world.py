"""The shipped playground put together by hand: what commands draw is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emma_core import Reference, load_connector, load_module
from emma_core.base.pipeline import Pipeline
from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.encoders.base import ReferenceEncoder, encode_pictures
from emma_core.encoders.loading import load_encoder
from emma_core.encoders.options import EncodeOptions
from emma_core.playground import PLAYGROUND_DIR, load_autoencoder, load_unet
from emma_core.text.encoder import load_text_encoder


@dataclass(frozen=True)
class World:
    """The pipeline, with diffusers' own attention, and the reference encoder."""

    pipeline: Pipeline
    encoder: ReferenceEncoder

    def encode_reference(
        self, condition: str, image_1HW3: torch.Tensor, mask_1HW: torch.Tensor | None = None
    ) -> Reference:
        """One reference of the condition's module."""
        module = load_module(PLAYGROUND_DIR / f"emma-{condition}.safetensors")
        options = EncodeOptions(tuple(module.config.features))
        features, _ = encode_pictures(self.encoder, image_1HW3, mask_1HW, options)
        return Reference(module, features)


def load_world() -> World:
    unet, autoencoder = load_unet(), load_autoencoder(PLAYGROUND_SPEC.latent_scale)
    pipeline = Pipeline(
        encode_text=load_text_encoder(PLAYGROUND_DIR / "t5.safetensors").encode,
        connector=load_connector(PLAYGROUND_DIR / "ella.safetensors"),
        predict_noise=lambda latent, timestep, context: unet(latent, timestep, context, return_dict=False)[0],
        decode=lambda latent: autoencoder.decode(latent / PLAYGROUND_SPEC.latent_scale),
        spec=PLAYGROUND_SPEC,
    )
    return World(pipeline, load_encoder(PLAYGROUND_DIR / "encoder.safetensors"))
