"""The sections of settings that say what pictures are drawn with: training, evaluation and drawing share them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..encoders.kinds import KINDS
from ..errors import SettingsError
from ..files.plain_file import is_there
from ..playground import PLAYGROUND, PLAYGROUND_DIR
from ..settings import key
from ..text.clip_layout import CLIP_L
from .precision import PRECISIONS
from .recognition import recognised
from .spec import PLAYGROUND_SPEC, SD15, SDXL, BaseSpec

PICTURES_AT_ONCE = 16
PLAYGROUND_GUIDANCE = 4.0  # of its graphs
ENCODER_FOLDERS = tuple(kind.folder for kind in KINDS if kind.folder)
PLAYGROUND_UNET = "unet.safetensors"
_SIDES = f"0: what the base knows best, {SD15.side_px}, of SDXL {SDXL.side_px}, of the playground {PLAYGROUND_SPEC.side_px}"


@dataclass(frozen=True)
class BaseConfig:
    """The frozen diffusion model."""

    checkpoint: str = key(PLAYGROUND, "a .safetensors file or a diffusers folder, of the SD1.5 or the SDXL family, or "
                                      "`playground`", folders=("checkpoints", "diffusers"))
    vae: str = key("", "another autoencoder: a .safetensors file or a diffusers folder", folders=("vae",))
    prediction: str = key("auto", "what the UNet predicts", choices=("auto", "eps", "v"))
    lora: str = key("", "a LoRA that is part of the frozen model", folders=("loras",))


@dataclass(frozen=True)
class EllaConfig:
    """An ELLA, the frozen connector, and its text encoder (of `train ella`: the connector to start from).

    Without, a checkpoint's own text encoders are used.
    """

    file: str = key("", "ELLA file; the playground has its own, of other checkpoints the own text encoders take its place",
                    folders=("ella",))
    text_encoder: str = key("", "T5 encoder of the ELLA, a file or a folder; the playground has its own",
                            folders=("text_encoders", "ella_encoder"))
    tokenizer: str = key("", "tokenizer.json of the T5 encoder; default: its own, or the one that ComfyUI has")


@dataclass(frozen=True)
class EncodersConfig:
    """The reference encoders: each module takes the one that its metadata name."""

    files: tuple[str, ...] = key((), "files or folders: CLIP, open_clip, AdaFace; the playground has its own",
                                  folders=ENCODER_FOLDERS)
    open_clip_model: str = key("", "open_clip's name of the model, where a file does not tell")


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are sampled: DDIM, as training's sample pictures are."""

    steps: int = key(20, "sampling steps", least=1)
    guidance: float = key(7.0, "classifier-free guidance; `generate` on the playground, if nothing is said: 4", least=0)
    width_px: int = key(0, f"width of the pictures; {_SIDES}", least=0)
    height_px: int = key(0, f"height of the pictures; {_SIDES}", least=0)
    negative: str = key("", "negative prompt")
    precision: str = key("fp16", "of the diffusion model; fp16 is fp32 on CPUs", choices=PRECISIONS)
    batch: int = key(4, "pictures at once", least=1, most=PICTURES_AT_ONCE)


def spec_of(base: BaseConfig) -> BaseSpec:
    """What is known of a base before its weights are read; SD1.5's of a file that is not there.

    Raises:
        FileError: another model.
    """
    path = Path(base.checkpoint)
    if is_playground(base.checkpoint):
        return playground_spec(PLAYGROUND_DIR if base.checkpoint == PLAYGROUND else path)
    return recognised(path) if path.exists() else SD15


def is_playground(checkpoint: str | Path) -> bool:
    """The shipped playground or a folder like it; a diffusers folder has a folder `unet` in the file's place."""
    return checkpoint == PLAYGROUND or (Path(checkpoint) / PLAYGROUND_UNET).is_file()


def playground_spec(folder: Path) -> BaseSpec:
    """Of a folder like the playground; with a CLIP beside, as in a diffusers folder, it is of SD1.5's family."""
    if not (folder / CLIP_L.folder).is_dir():
        return PLAYGROUND_SPEC
    return replace(PLAYGROUND_SPEC, family=SD15.family, towers=(CLIP_L,))


def uses_ella(base: BaseConfig, ella: EllaConfig) -> bool:
    """Whether an ELLA makes the tokens, else the checkpoint's own text encoders do."""
    return base.checkpoint == PLAYGROUND or bool(ella.file)


def size_px(base: BaseConfig, sampling: SamplingConfig) -> tuple[int, int]:
    """Width and height of the pictures; 0 is what the base knows."""
    side_px = spec_of(base).side_px
    return sampling.width_px or side_px, sampling.height_px or side_px


def check_files(
    base: BaseConfig, ella: EllaConfig, others: Iterable[tuple[str, str]] = (), new_ella: bool = False
) -> None:
    """Refuse settings that leave a part open or name a file that is not there, before anything is loaded.

    Args:
        others: `section.key` and path of further files and folders; an empty path names none.
        new_ella: no ELLA needs to be named.
    Raises:
        SettingsError: which key, and what to set.
    """
    if base.checkpoint != PLAYGROUND and ella.file and not ella.text_encoder:
        raise SettingsError("ella.text_encoder is not set; wanted flan-t5-xl, a file or a folder. Name it.")
    if base.checkpoint != PLAYGROUND and ella.text_encoder and not ella.file and not new_ella:
        raise SettingsError("ella.text_encoder is set, but ella.file is not: T5 is read through an ELLA. Name its file, for "
                            "instance models/ella/ella-sd1.5-tsc-t5xl.safetensors, or leave both out: the checkpoint's own "
                            "text encoders are used then.")
    if base.checkpoint != PLAYGROUND and new_ella and not ella.text_encoder:
        raise SettingsError("ella.text_encoder is not set; wanted the T5 that the ELLA is to read. Name it.")
    checkpoint = "" if base.checkpoint == PLAYGROUND else base.checkpoint
    named = [("base.checkpoint", checkpoint), ("base.vae", base.vae), ("base.lora", base.lora), ("ella.file", ella.file),
             ("ella.text_encoder", ella.text_encoder), ("ella.tokenizer", ella.tokenizer), *others]
    for setting, path in named:
        if path and not is_there(path):
            raise SettingsError(f"{setting} = {path!r} does not exist. Check the path; nothing is downloaded.")


def encoder_files(encoder: EncodersConfig, has_modules: bool) -> tuple[str, ...]:
    """Those named, else the playground's own where a module needs one."""
    if encoder.files or not has_modules:
        return encoder.files
    return (str(PLAYGROUND_DIR / "encoder.safetensors"),)
