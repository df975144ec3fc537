"""The playground as one object, from any folder of its files: what the laboratory measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from emma_core.base.backbones import Backbone, load_playground
from emma_core.base.pipeline import Pipeline, pipeline_for
from emma_core.encoders.base import ReferenceEncoder
from emma_core.encoders.loading import load_encoder
from emma_core.encoders.matching import encode_for_module
from emma_core.files.connector_file import load_connector
from emma_core.files.module_file import load_module
from emma_core.model.assembly import Assembly, Reference
from emma_core.model.gated_resampler import GatedResampler
from emma_core.playground import PLAYGROUND, PLAYGROUND_DIR
from emma_core.text.encoder import load_text_encoder

CONDITIONS = ("style", "face", "object")


@dataclass(frozen=True)
class World:
    """The pipeline, its modules by condition, and their encoder."""

    pipeline: Pipeline
    modules: dict[str, GatedResampler]
    encoder: ReferenceEncoder

    def encode_reference(
        self, condition: str, image_BHW3: torch.Tensor, mask_BHW: torch.Tensor | None = None
    ) -> Reference:
        """One reference of the condition's module, from pictures in [0, 1]; several are shown side by side.

        Raises:
            ImageInputError: unusable pictures or mask.
            ReferenceMismatchError: the module was trained with another encoder.
        """
        module = self.modules[condition]
        reference, _ = encode_for_module(self.encoder, module.config, image_BHW3, mask_BHW)
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
    model = load_playground(folder)
    # the published scores and the demo's pictures were made with diffusers' own attention, and stay bit for bit
    model.unet.set_attn_processor(AttnProcessor2_0())
    backbone = Backbone(model.unet, model.autoencoder, model.spec, PLAYGROUND, model.sha256)
    pipeline = pipeline_for(backbone, load_connector(folder / "ella.safetensors"),
                            load_text_encoder(folder / "t5.safetensors").encode)
    modules = {condition: load_module(folder / f"emma-{condition}.safetensors") for condition in CONDITIONS}
    return World(pipeline, modules, load_encoder(folder / "encoder.safetensors"))
