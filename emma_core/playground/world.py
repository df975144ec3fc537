"""The shipped playground as one object, on a bare machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from ..base.pipeline import Pipeline, sd15_scheduler
from ..encoders.base import encode_pictures
from ..encoders.options import EncodeOptions
from ..encoders.playground import PlaygroundReferenceEncoder, load_playground_encoder
from ..encoders.reference_features import check_for_module, combine_features
from ..files.connector_file import load_connector
from ..files.module_file import load_module
from ..model.assembly import Assembly, Reference
from ..model.gated_resampler import GatedResampler
from ..text.encoder import load_text_encoder
from . import PLAYGROUND_DIR, load_autoencoder, load_unet

CONDITIONS = ("style", "face", "object")


@dataclass(frozen=True)
class World:
    """The pipeline, its modules by condition, and their encoder."""

    pipeline: Pipeline
    modules: dict[str, GatedResampler]
    encoder: PlaygroundReferenceEncoder

    def encode_reference(
        self, condition: str, image_BHW3: torch.Tensor, mask_BHW: torch.Tensor | None = None
    ) -> Reference:
        """One reference of the condition's module, from pictures in [0, 1]; several are shown side by side.

        Raises:
            ImageInputError: unusable pictures or mask.
            ReferenceMismatchError: the module was trained with another encoder.
        """
        module = self.modules[condition]
        options = EncodeOptions(tuple(module.config.features))
        features, _ = encode_pictures(self.encoder, image_BHW3, mask_BHW, options)
        reference = combine_features(features, "concat", self.encoder.description)
        check_for_module(reference, module.config)
        return Reference(module, reference.features)

    def assembly(self, references: dict[str, torch.Tensor]) -> Assembly:
        """An assembly of pictures by condition: {"style": (B, H, W, 3), ...}."""
        return Assembly(self.encode_reference(condition, image) for condition, image in references.items())


def load_world(folder: str | Path = PLAYGROUND_DIR) -> World:
    """All parts of a playground folder, in float32 on the CPU.

    Raises:
        FileError: a part is missing or damaged.
    """
    folder = Path(folder)
    unet = load_unet(folder / "unet.safetensors")
    pipeline = Pipeline(
        encode_text=load_text_encoder(folder / "t5.safetensors").encode,
        connector=load_connector(folder / "ella.safetensors"),
        predict_noise=lambda latent, timestep, context: unet(latent, timestep, context, return_dict=False)[0],
        decode=load_autoencoder(folder / "autoencoder.safetensors").decode,
        scheduler=sd15_scheduler(),
    )
    modules = {condition: load_module(folder / f"emma-{condition}.safetensors") for condition in CONDITIONS}
    return World(pipeline, modules, load_playground_encoder(folder / "encoder.safetensors"))


def read_picture(path: str | Path | BinaryIO) -> torch.Tensor:
    """A picture file as (1, H, W, 3) in [0, 1]; transparency becomes white."""
    picture = Image.open(path).convert("RGBA")
    sheet = Image.new("RGBA", picture.size, "white")
    sheet.alpha_composite(picture)
    return torch.from_numpy(np.asarray(sheet.convert("RGB"), dtype=np.float32) / 255)[None]
