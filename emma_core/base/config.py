"""The sections of settings that say what pictures are drawn with: training, evaluation and drawing share them."""

from __future__ import annotations

from dataclasses import dataclass

from ..playground import PLAYGROUND, PLAYGROUND_DIR
from ..settings import key
from .precision import PRECISIONS
from .spec import PLAYGROUND_SPEC, SD15

PICTURES_AT_ONCE = 16


@dataclass(frozen=True)
class BaseConfig:
    """The frozen diffusion model."""

    checkpoint: str = key(PLAYGROUND, "an SD1.5-family .safetensors file, a diffusers folder, or `playground`")
    vae: str = key("", "another autoencoder: a .safetensors file or a diffusers folder")
    prediction: str = key("auto", "what the UNet predicts", choices=("auto", "eps", "v"))
    lora: str = key("", "a LoRA that is part of the frozen model")


@dataclass(frozen=True)
class EllaConfig:
    """The frozen connector and its text encoder (of `train ella`: the connector to start from)."""

    file: str = key("", "ELLA file; the playground has its own")
    text_encoder: str = key("", "T5 encoder, a file or a folder; the playground has its own")


@dataclass(frozen=True)
class EncodersConfig:
    """The reference encoders: each module takes the one that its metadata name."""

    files: tuple[str, ...] = key((), "files or folders: CLIP, open_clip, AdaFace; the playground has its own")
    open_clip_model: str = key("", "open_clip's name of the model, where a file does not tell")


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are sampled: DDIM, as training's sample pictures are."""

    steps: int = key(20, "sampling steps", least=1)
    guidance: float = key(7.0, "classifier-free guidance", least=0)
    width_px: int = key(0, f"width of the pictures; 0: {SD15.side_px}, of the playground {PLAYGROUND_SPEC.side_px}", least=0)
    height_px: int = key(0, f"height of the pictures; 0: {SD15.side_px}, of the playground {PLAYGROUND_SPEC.side_px}", least=0)
    negative: str = key("", "negative prompt")
    precision: str = key("fp16", "of the diffusion model; fp16 is fp32 on CPUs", choices=PRECISIONS)
    batch: int = key(4, "pictures at once", least=1, most=PICTURES_AT_ONCE)


def size_px(base: BaseConfig, sampling: SamplingConfig) -> tuple[int, int]:
    """Width and height of the pictures; 0 is what the base knows."""
    side_px = (PLAYGROUND_SPEC if base.checkpoint == PLAYGROUND else SD15).side_px
    return sampling.width_px or side_px, sampling.height_px or side_px


def encoder_files(encoder: EncodersConfig, has_modules: bool) -> tuple[str, ...]:
    """Those named, else the playground's own where a module needs one."""
    if encoder.files or not has_modules:
        return encoder.files
    return (str(PLAYGROUND_DIR / "encoder.safetensors"),)
