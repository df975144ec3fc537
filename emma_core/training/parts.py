"""The frozen models of a run, loaded as its configuration says; the playground brings its own.

Shapes: N text tokens of width D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..base.backbones import Backbone, load_backbone
from ..encoders.base import ReferenceEncoder
from ..encoders.options import AS_TRAINED, EncodeOptions, Framing
from ..errors import TrainingConfigError
from ..files.connector_file import load_connector
from ..model.connector import Connector
from ..playground import PLAYGROUND_DIR
from ..text.encoder import TextEncoder, load_text_encoder, usual_dtype
from .config import PLAYGROUND, TrainConfig
from .prepare import AUTOENCODER, REFERENCE_ENCODER, TEXT_ENCODER, UNET, Encoders
from .starts import wanted_features


@dataclass(eq=False)
class Parts:
    """Everything frozen: diffusion model, connector, text encoder, reference encoder (None where ELLA itself learns).

    The encoders are None as soon as everything they give is cached.
    """

    backbone: Backbone
    connector: Connector
    text_encoder: TextEncoder | None
    reference_encoder: ReferenceEncoder | None
    device: torch.device

    def place(self, *names: str) -> None:
        """Put these models (UNET, AUTOENCODER, TEXT_ENCODER, REFERENCE_ENCODER) on the device, and the others off it.

        With flan-t5-xl and CLIP ViT-H/14 all of them would take 7 GB.
        """
        models = {UNET: self.backbone.unet, AUTOENCODER: self.backbone.autoencoder,
                  TEXT_ENCODER: self.text_encoder and self.text_encoder.model,
                  REFERENCE_ENCODER: self.reference_encoder and self.reference_encoder.model}
        for here in (False, True):  # room is made first
            for name, model in models.items():
                if model is not None and (name in names) == here:
                    torch.nn.Module.to(model, self.device if here else "cpu")

    def encoders(self, config: TrainConfig) -> Encoders:
        """What the training data are encoded with, and what the caches depend on."""
        text = config.ella.text_encoder or PLAYGROUND
        return Encoders(
            encode_latents=lambda pixels_B3HW: self.backbone.encode(pixels_B3HW).float().cpu(),
            encode_texts=lambda captions: [features.float().cpu() for features in self.text_encoder.encode(captions)],
            reference_encoder=self.reference_encoder,
            latents_settings=f"{config.base.vae or config.base.checkpoint} {self.backbone.sha256}",
            texts_settings=f"{text} {weights_mark(self.text_encoder.model)}",
            place=self.place,
        )


def load_parts(config: TrainConfig, dtype: torch.dtype, device: torch.device) -> Parts:
    """All frozen models, still on the CPU: the UNet in ``dtype``, the connector in float32. `Parts.place` puts them in place.

    Raises:
        TrainingConfigError: a part is not named.
        EmmaError: a file that cannot be used, see the loaders.
    """
    playground = config.base.checkpoint == PLAYGROUND
    ella = config.ella.file or (PLAYGROUND_DIR / "ella.safetensors" if playground else "")
    text = config.ella.text_encoder or (PLAYGROUND_DIR / "t5.safetensors" if playground else "")
    if not ella and config.what == "module":
        raise TrainingConfigError("ella.file is not set: a module is trained on an ELLA connector. Name the file, for instance "
                                  "models/ella/ella-sd1.5-tsc-t5xl.safetensors.")
    if not text:
        raise TrainingConfigError("ella.text_encoder is not set; wanted flan-t5-xl, a file or a folder. Name it.")
    backbone = load_backbone(config.base, dtype)
    backbone.alphas_cumprod_T = backbone.alphas_cumprod_T.to(device)
    if config.train.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    text_encoder = load_text_encoder(text, usual_dtype(device))
    connector = load_connector(ella) if ella else _new_connector(backbone, text_encoder)
    if connector.width != backbone.context_width:
        raise TrainingConfigError(f"the ELLA has tokens of width {connector.width}, {backbone.name} reads width "
                                  f"{backbone.context_width}. Choose an ELLA made for this kind of checkpoint.")
    encoder = None if config.what == "ella" else _load_reference_encoder(config, playground)
    return Parts(backbone, connector, text_encoder, encoder, device)


def options_of(config: TrainConfig) -> EncodeOptions:
    """How references are encoded: the module's features, at the configured layer, framed as configured."""
    encoder = config.encoder
    framing = Framing(frame=encoder.frame, background=encoder.background)
    return EncodeOptions(tuple(wanted_features(config)), encoder.layer, framing)


def encoder_metadata(config: TrainConfig, encoder: ReferenceEncoder, features: tuple[str, ...]) -> dict:
    """The encoder as a module's metadata names it."""
    chosen = {key: value for key in ("frame", "background") if (value := getattr(config.encoder, key)) != AS_TRAINED}
    layer = {"layer": config.encoder.layer} if "local" in features else {}
    return {**encoder.description, **layer, **chosen, **({"masked": True} if config.encoder.masked else {})}


def weights_mark(model: torch.nn.Module) -> str:
    """A short mark of a model's weights for cache keys: sizes, precision, and sums of a few tensors."""
    parameters = list(model.parameters())
    sums = [f"{value.float().sum().item():.6g}" for value in parameters[:: max(1, len(parameters) // 8)]]
    return f"{sum(value.numel() for value in parameters)} {parameters[0].dtype} {' '.join(sums)}"


def prepare_precision(config: TrainConfig, device: torch.device) -> tuple[TrainConfig, torch.dtype]:
    """The precision that the device can train in, and that of the frozen weights.

    A CPU has no fp16 arithmetic to gain, so fp16 becomes fp32 there; and bf16 is for its products alone, as other
    operations are slower in it.
    """
    precision = config.train.precision
    if precision == "fp16" and device.type == "cpu":
        precision = "fp32"
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    weights = torch.float32 if device.type == "cpu" else kinds[precision]
    return replace(config, train=replace(config.train, precision=precision)), weights


def _new_connector(backbone: Backbone, text_encoder: TextEncoder) -> Connector:
    """A connector of the released size at random, for training ELLA from nothing."""
    from ..model.connector import ConnectorConfig

    return Connector(ConnectorConfig(width=backbone.context_width, text_dim=text_encoder.width))


def _load_reference_encoder(config: TrainConfig, playground: bool) -> ReferenceEncoder:
    from ..encoders.loading import load_encoder

    path = config.encoder.file or (PLAYGROUND_DIR / "encoder.safetensors" if playground else "")
    if not path:
        raise TrainingConfigError("encoder.file is not set; wanted the reference encoder, for instance CLIP ViT-H/14 "
                                  "(models/clip_vision) or AdaFace. Name the file or folder.")
    if not Path(path).exists():
        raise TrainingConfigError(f"encoder.file = {str(path)!r} does not exist. Check the path.")
    return load_encoder(path, config.encoder.open_clip_model or None)
