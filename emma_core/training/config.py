"""What a training run is made of: one frozen configuration, from a TOML file, presets and flags; unknown keys are refused.

Every key is `section.key` in the file and `--section.key` on the command line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..base.config import ENCODER_FOLDERS, PLAYGROUND_GUIDANCE, PRECISIONS, BaseConfig, EllaConfig, spec_of
from ..base.spec import PLAYGROUND_SPEC, SDXL
from ..encoders.options import BACKGROUNDS, FRAMES, LAYERS
from ..errors import FileError, TrainingConfigError
from ..model.conditions import CONDITIONS, CUSTOM
from ..model.ip_adapter_blocks import BLOCKS
from ..playground import PLAYGROUND
from ..settings import key, resolve_sections, toml_of
from .presets import PRESETS

INITIALISATIONS = ("ella", "random")
ADAMW, MUON = "adamw", "muon"


@dataclass(frozen=True)
class OutputConfig:
    """Where results go."""

    folder: str = key("", "folder of the run: checkpoints, samples, logs, and the module itself")
    name: str = key("emma-module", "file name of the module, without its ending")
    title: str = key("", "title in the module's metadata (shown by model managers); default: the name")
    author: str = key("", "author in the metadata")
    license: str = key("", "licence in the metadata")
    thumbnail: bool = key(True, "a picture drawn with the module, in its metadata")
    calibrate: bool = key(False, "draw at several strengths at the end; strength 1 then stands for the one whose pictures are "
                                 "most like their references")


@dataclass(frozen=True)
class DataConfig:
    """Pictures, captions and references to learn from."""

    folder: str = key("", "folder of pictures with captions in .txt files of the same name; sub-folders are groups (an "
                          "identity, a style): a reference comes from the target's group")
    jsonl: str = key("", "JSON-lines file: {image, caption or captions, group, reference or references, mask} per line, paths "
                         "relative to it")
    shards: str = key("", "webdataset shards: a .tar file, or several by * or braces, as in data/{000..099}.tar; a sample is "
                          "a picture with .txt or .json, perhaps .ref.jpg (its reference) and .mask.png")
    cache: str = key("", "folder of latents and features; default: `cache` in the output folder")
    resolution_px: int = key(512, "side of a square picture; other shapes have about its area; if nothing is said, "
                                  f"{SDXL.side_px} with SDXL and {PLAYGROUND_SPEC.side_px} on the playground", least=32)
    bucket_step_px: int = key(64, "sides are multiples of this", least=8)
    longest_shape: float = key(2.0, "most that a picture's long side exceeds its short one", least=1)
    flip: bool = key(False, "learn mirrored targets too")
    own_reference: bool = key(False, "the target itself may be its reference, even where its group has other pictures")
    reference_crops: int = key(2, "randomly cropped variants of each reference, beside the whole picture", least=0, most=16)
    reference_flip: bool = key(True, "mirrored variants of each reference")
    workers: int = key(2, "processes that read and resize pictures", least=0)
    caption_extension: str = key(".txt", "ending of caption files")


@dataclass(frozen=True)
class EncoderConfig:
    """The frozen reference encoder."""

    file: str = key("", "file or folder: CLIP, open_clip, AdaFace; the playground has its own", folders=ENCODER_FOLDERS)
    open_clip_model: str = key("", "open_clip's name of the model, where the file does not tell")
    layer: str = key("last", "hidden states that `local` features come from", choices=LAYERS)
    frame: str = key(FRAMES[0], "part of a reference picture that the encoder sees", choices=FRAMES)
    background: str = key(BACKGROUNDS[0], "colour behind masked objects", choices=BACKGROUNDS)
    masked: bool = key(False, "remove the background of references with their masks")


@dataclass(frozen=True)
class ModuleSettings:
    """The module that learns."""

    condition: str = key("style", "what it takes from a reference", choices=(*CONDITIONS, CUSTOM))
    features: str = key("", 'features it reads, JSON {"name": tokens per vector}; default: those of the condition')
    start: str = key("", "module to start from (a portrait starts from an object module)", folders=("emma",))
    blocks: str = key("ella", "how attention and feed-forward of a new module begin", choices=INITIALISATIONS)
    gate_bias: float = key(1.0, "separable gate g of a new module")
    gate_scale: float = key(1.0, "lambda of eqs. (3) to (8), fixed", least=1e-6)
    separable_gates: bool = key(True, "false: the paper's ablation, g = 1")
    layers: int = key(4, "blocks of a module on a model's own tokens; on an ELLA as many as that has", least=1, most=64)
    inner: int = key(512, "width inside these blocks, a multiple of 64; on an ELLA its width", least=64, most=8192)


@dataclass(frozen=True)
class OptimisationConfig:
    """Steps, batch, rates; the defaults are the paper's (section 4.2)."""

    steps: int = key(200_000, "updates of the weights in all", least=1)
    batch: int = key(32, "pictures at once in each process", least=1)
    accumulate: int = key(1, "batches for one update", least=1)
    optimizer: str = key(ADAMW, "adamw is the paper's; muon: Muon for the matrices of the blocks, AdamW for the rest",
                         choices=(ADAMW, MUON))
    rate: float = key(1e-4, "learning rate", least=0)
    gate_rate: float = key(1.0, "factor on the rate of the global gates A and F", least=0)
    decay: float = key(0.01, "weight decay, of all but the global gates", least=0)
    warmup: int = key(1000, "updates over which the rate rises from 10% to 100%", least=0)
    schedule: str = key("constant", "rate after the warm-up", choices=("constant", "cosine"))
    clip: float = key(1.0, "largest norm of the gradient", least=0)
    precision: str = key("fp16", "of the frozen parts and the matrix products", choices=PRECISIONS)
    gradient_checkpointing: bool = key(False, "less memory for more time: the UNet's activations are computed again")
    average: float = key(0.0, "decay of averaged weights, which are what is saved; 0: none", least=0, most=0.99999)
    seed: int = key(0, "of everything random")
    held_out: float = key(0.0, "share of the pictures that is never learnt from: what the reference gains on them is measured "
                               "with every checkpoint; 0: none", least=0, most=0.5)
    patience: int = key(0, "updates without a growing gain on held-out pictures after which training ends, not before half of "
                           "the steps; 0: never", least=0)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted, how timesteps are drawn and weighted, what is dropped."""

    drop_text: float = key(0.05, "share of rows without text", least=0, most=1)
    drop_reference: float = key(0.05, "share of rows without reference", least=0, most=1)
    drop_both: float = key(0.05, "share of rows without either", least=0, most=1)
    timestep_power: float = key(1.0, "timestep = 999 u^p: 1 is uniform, less draws more noise", least=0.05, most=10)
    min_snr: float = key(0.0, "gamma of min-SNR weighting; 0: none", least=0)
    inverse_snr: float = key(0.0, "weight 1/SNR, at most this: stresses high noise, where a reference shows; 0: none", least=0)
    noise_offset: float = key(0.0, "one more noise value for each channel, of this size", least=0)
    place_weight: bool = key(False, "weigh the loss by place: where pictures of one caption differ between groups")


@dataclass(frozen=True)
class ReportConfig:
    """Logs, checkpoints and sample pictures."""

    save_every: int = key(1000, "updates between checkpoints", least=1)
    keep: int = key(2, "checkpoints kept", least=1)
    log_every: int = key(50, "updates between log lines", least=1)
    sample_every: int = key(500, "updates between sample sheets; the last one is the module's thumbnail; 0: none", least=0)
    sample_share: float = key(0.05, "largest share of the time that sheets take, but for the first and the last one", least=0,
                              most=1)
    sample_prompts: tuple[str, ...] = key((), "prompts of the sample sheets; default: four that are no captions")
    sample_references: tuple[str, ...] = key((), "reference pictures of the samples; default: two of the data, of different "
                                                 "groups if there are")
    sample_steps: int = key(20, "sampling steps", least=1)
    guidance: float = key(7.0, "classifier-free guidance of the samples; on the playground, if nothing is said, 4", least=0)
    tensorboard: bool = key(False, "write TensorBoard events too")


@dataclass(frozen=True)
class TeacherConfig:
    """A model whose prediction is the target instead of the noise."""

    lora: str = key("", "LoRA on the base: the teacher; or a folder of LoRAs, <group>.safetensors for each group of "
                           "references", folders=("loras",))
    ip_adapter: str = key("", "IP-Adapter file on the base: the teacher sees the reference itself", folders=("ipadapter",))
    ip_image_encoder: str = key("", "CLIP vision file or folder of the IP-Adapter", folders=("clip_vision",))
    scale: float = key(1.0, "strength of the teacher's LoRA or IP-Adapter", least=0)
    blocks: str = key("all", "where the IP-Adapter works: `style` gives style and no content, `no layout` leaves the "
                             "composition to the text", choices=BLOCKS)
    own_text: bool = key(False, "for an ELLA: the base itself is the teacher, reading captions with its own text encoder")
    reading: int = key(0, "for own_text: as many first updates learn from what the base's cross-attention reads alone, without "
                          "the UNet, which is many times faster", least=0)
    own_latents: bool = key(False, "train on samples of the model itself: prompts and references are all that is needed")
    prompts: str = key("", "text file of prompts, one a line, for own_latents; default: those that are shipped")
    samples: int = key(4, "samples of each prompt, for own_latents", least=1)


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. `what` is "module" or "ella"."""

    what: str = "module"
    output: OutputConfig = field(default_factory=OutputConfig)
    data: DataConfig = field(default_factory=DataConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    ella: EllaConfig = field(default_factory=EllaConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    module: ModuleSettings = field(default_factory=ModuleSettings)
    train: OptimisationConfig = field(default_factory=OptimisationConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, by section."""
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """As a file that `read_toml` reads."""
        return f"what = {json.dumps(self.what)}\n" + toml_of(self)


def _usual_of(base: BaseConfig) -> dict[str, dict[str, Any]]:
    """What other defaults a base has: the side of pictures that it knows best; the playground's graphs draw with a guidance."""
    try:
        side_px = spec_of(base).side_px
    except FileError:  # told by the checks
        side_px = DataConfig().resolution_px
    usual: dict[str, dict[str, Any]] = {} if side_px == DataConfig().resolution_px else {"data": {"resolution_px": side_px}}
    return usual | ({"report": {"guidance": PLAYGROUND_GUIDANCE}} if base.checkpoint == PLAYGROUND else {})


def resolve(given: Mapping[str, Any], preset: str = "paper", changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """Defaults (the side of pictures is the base's), then a preset, then a file's tables, then `section.key` changes.

    Raises:
        SettingsError: an unknown preset, section or key, a value of the wrong kind or out of range.
    """
    if preset not in PRESETS:
        raise TrainingConfigError(f"there is no preset {preset!r}; choose one of {', '.join(PRESETS)}.")
    what = given.get("what", "module")
    tables = {name: table for name, table in given.items() if name not in ("what", "preset")}
    begin = PRESETS[preset]
    made = resolve_sections(TrainConfig, tables, changes, begin)
    usual = _usual_of(made["base"])
    if usual:
        begin = {**begin, **{name: {**table, **begin.get(name, {})} for name, table in usual.items()}}
        made = resolve_sections(TrainConfig, tables, changes, begin)
    if what not in ("module", "ella"):
        raise TrainingConfigError(f"what = {what!r}; wanted module or ella.")
    return TrainConfig(what=what, **made)
