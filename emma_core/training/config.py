"""What a training run is made of: one frozen configuration, from a TOML file, presets and flags; unknown keys are refused.

Every key is `section.key` in the file and `--section.key` on the command line.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..encoders.options import BACKGROUNDS, FRAMES, LAYERS
from ..errors import TrainingConfigError
from ..model.conditions import CONDITIONS, CUSTOM
from .presets import PRESETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

INITIALISATIONS = ("ella", "random")
PLAYGROUND = "playground"
ON_PLAYGROUND = {"resolution_px": 128}  # its UNet knows no other size
PRECISIONS = ("fp32", "fp16", "bf16")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def key(default: Any, explain: str, *, choices: tuple[str, ...] = (), least: float | None = None,
        most: float | None = None) -> Any:
    """A key of a section: its default, its explanation for ``--help``, and the values it may have."""
    limits = {"help": explain, "choices": choices, "least": least, "most": most}
    return field(default=default, metadata={name: value for name, value in limits.items() if value not in (None, ())})


_key = key


@dataclass(frozen=True)
class OutputConfig:
    """Where results go."""

    folder: str = _key("", "folder of the run: checkpoints, samples, logs, and the module itself")
    name: str = _key("emma-module", "file name of the module, without its ending")
    title: str = _key("", "title in the module's metadata (shown by model managers); default: the name")
    author: str = _key("", "author in the metadata")
    license: str = _key("", "licence in the metadata")
    thumbnail: bool = _key(True, "a picture drawn with the module, in its metadata")


@dataclass(frozen=True)
class DataConfig:
    """Pictures, captions and references to learn from."""

    folder: str = _key("", "folder of pictures with captions in .txt files of the same name; sub-folders are groups (an "
                           "identity, a style): a reference comes from the target's group")
    jsonl: str = _key("", "JSON-lines file: {image, caption or captions, group, reference or references, mask} per line, paths "
                          "relative to it")
    shards: str = _key("", "webdataset shards: a .tar file, or several by * or braces, as in data/{000..099}.tar; a sample is "
                           "a picture with .txt or .json, perhaps .ref.jpg (its reference) and .mask.png")
    cache: str = _key("", "folder of latents and features; default: `cache` in the output folder")
    resolution_px: int = _key(512, "side of a square picture; other shapes have about its area; on the playground, if nothing "
                                   "is said, 128", least=32)
    bucket_step_px: int = _key(64, "sides are multiples of this", least=8)
    longest_shape: float = _key(2.0, "most that a picture's long side exceeds its short one", least=1)
    flip: bool = _key(False, "learn mirrored targets too")
    own_reference: bool = _key(False, "the target itself may be its reference, even where its group has other pictures")
    reference_crops: int = _key(2, "randomly cropped variants of each reference, beside the whole picture", least=0, most=16)
    reference_flip: bool = _key(True, "mirrored variants of each reference")
    workers: int = _key(2, "processes that read and resize pictures", least=0)
    caption_extension: str = _key(".txt", "ending of caption files")


@dataclass(frozen=True)
class BaseConfig:
    """The frozen diffusion model."""

    checkpoint: str = _key(PLAYGROUND, "an SD1.5-family .safetensors file, a diffusers folder, or `playground`")
    vae: str = _key("", "another autoencoder: a .safetensors file or a diffusers folder")
    prediction: str = _key("auto", "what the UNet predicts", choices=("auto", "eps", "v"))
    lora: str = _key("", "a LoRA that is part of the frozen model")


@dataclass(frozen=True)
class EllaConfig:
    """The frozen connector and its text encoder (of `train ella`: the connector to start from)."""

    file: str = _key("", "ELLA file; the playground has its own")
    text_encoder: str = _key("", "T5 encoder, a file or a folder; the playground has its own")


@dataclass(frozen=True)
class EncoderConfig:
    """The frozen reference encoder."""

    file: str = _key("", "file or folder: CLIP, open_clip, AdaFace; the playground has its own")
    open_clip_model: str = _key("", "open_clip's name of the model, where the file does not tell")
    layer: str = _key("last", "hidden states that `local` features come from", choices=LAYERS)
    frame: str = _key(FRAMES[0], "part of a reference picture that the encoder sees", choices=FRAMES)
    background: str = _key(BACKGROUNDS[0], "colour behind masked objects", choices=BACKGROUNDS)
    masked: bool = _key(False, "remove the background of references with their masks")


@dataclass(frozen=True)
class ModuleSettings:
    """The module that learns."""

    condition: str = _key("style", "what it takes from a reference", choices=(*CONDITIONS, CUSTOM))
    features: str = _key("", 'features it reads, JSON {"name": tokens per vector}; default: those of the condition')
    start: str = _key("", "module to start from (a portrait starts from an object module)")
    blocks: str = _key("ella", "how attention and feed-forward of a new module begin", choices=INITIALISATIONS)
    gate_bias: float = _key(1.0, "separable gate g of a new module")
    gate_scale: float = _key(1.0, "lambda of eqs. (3) to (8), fixed", least=1e-6)
    separable_gates: bool = _key(True, "false: the paper's ablation, g = 1")


@dataclass(frozen=True)
class OptimisationConfig:
    """Steps, batch, rates; the defaults are the paper's (section 4.2)."""

    steps: int = _key(200_000, "updates of the weights in all", least=1)
    batch: int = _key(32, "pictures at once in each process", least=1)
    accumulate: int = _key(1, "batches for one update", least=1)
    rate: float = _key(1e-4, "learning rate of AdamW", least=0)
    gate_rate: float = _key(1.0, "factor on the rate of the global gates A and F", least=0)
    decay: float = _key(0.01, "weight decay, of all but the global gates", least=0)
    warmup: int = _key(1000, "updates over which the rate rises from 10% to 100%", least=0)
    schedule: str = _key("constant", "rate after the warm-up", choices=("constant", "cosine"))
    clip: float = _key(1.0, "largest norm of the gradient", least=0)
    precision: str = _key("fp16", "of the frozen parts and the matrix products", choices=PRECISIONS)
    gradient_checkpointing: bool = _key(False, "less memory for more time: the UNet's activations are computed again")
    average: float = _key(0.0, "decay of averaged weights, which are what is saved; 0: none", least=0, most=0.99999)
    seed: int = _key(0, "of everything random")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted, how timesteps are drawn and weighted, what is dropped."""

    drop_text: float = _key(0.05, "share of rows without text", least=0, most=1)
    drop_reference: float = _key(0.05, "share of rows without reference", least=0, most=1)
    drop_both: float = _key(0.05, "share of rows without either", least=0, most=1)
    timestep_power: float = _key(1.0, "timestep = 999 u^p: 1 is uniform, less draws more noise", least=0.05, most=10)
    min_snr: float = _key(0.0, "gamma of min-SNR weighting; 0: none", least=0)
    inverse_snr: float = _key(0.0, "weight 1/SNR, at most this: stresses high noise, where a reference shows; 0: none", least=0)
    noise_offset: float = _key(0.0, "one more noise value for each channel, of this size", least=0)
    place_weight: bool = _key(False, "weigh the loss by place: where pictures of one caption differ between groups")


@dataclass(frozen=True)
class ReportConfig:
    """Logs, checkpoints and sample pictures."""

    save_every: int = _key(1000, "updates between checkpoints", least=1)
    keep: int = _key(3, "checkpoints kept", least=1)
    log_every: int = _key(50, "updates between log lines", least=1)
    sample_every: int = _key(0, "updates between sample pictures; 0: none", least=0)
    sample_prompts: tuple[str, ...] = _key((), "prompts of the sample pictures")
    sample_references: tuple[str, ...] = _key((), "reference pictures of the samples; default: the first of the data")
    sample_steps: int = _key(20, "sampling steps", least=1)
    guidance: float = _key(7.0, "classifier-free guidance of the samples", least=0)
    tensorboard: bool = _key(False, "write TensorBoard events too")


@dataclass(frozen=True)
class TeacherConfig:
    """A model whose prediction is the target instead of the noise."""

    lora: str = _key("", "LoRA on the base: the teacher; or a folder of LoRAs, <group>.safetensors for each group of "
                            "references")
    ip_adapter: str = _key("", "IP-Adapter file on the base: the teacher sees the reference itself")
    ip_image_encoder: str = _key("", "CLIP vision folder of the IP-Adapter")
    scale: float = _key(1.0, "strength of the teacher's LoRA or IP-Adapter", least=0)
    own_latents: bool = _key(False, "train on samples of the model itself: prompts and references are all that is needed")
    prompts: str = _key("", "text file of prompts, one a line, for own_latents")
    samples: int = _key(4, "samples of each prompt, for own_latents", least=1)


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


def toml_of(config: Any) -> str:
    """The sections of a configuration as TOML; JSON's strings, numbers and lists are TOML's too."""
    lines = []
    for section in sections(type(config)):
        lines += ["", f"[{section}]"]
        values = dataclasses.asdict(getattr(config, section))
        # TOML has no surrogate pairs, which JSON would make of an emoji
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def sections(of: type = TrainConfig) -> dict[str, type]:
    """Section name -> its dataclass, of a class of configurations."""
    return {name: kind for name, kind in get_type_hints(of).items() if dataclasses.is_dataclass(kind)}


def read_toml(path: str | Path) -> dict[str, Any]:
    """The file's tables.

    Raises:
        TrainingConfigError: missing, or no TOML.
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as found:
        raise TrainingConfigError(f"{path} cannot be read ({found.strerror}); wanted a configuration (TOML). Check the "
                                  "path.") from found
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as found:
        raise TrainingConfigError(f"{path} is not TOML: {found}. Correct that place.") from found


def resolve(given: Mapping[str, Any], preset: str = "paper", changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """Defaults (those of the playground where it is the base), then a preset, then a file's tables, then `section.key` changes.

    Raises:
        TrainingConfigError: an unknown preset, section or key (with the nearest known one), a value of the wrong kind or
            out of range.
    """
    if preset not in PRESETS:
        raise TrainingConfigError(f"there is no preset {preset!r}; choose one of {', '.join(PRESETS)}.")
    what = given.get("what", "module")
    tables = {name: table for name, table in given.items() if name not in ("what", "preset")}
    begin = PRESETS[preset]
    made = resolve_sections(TrainConfig, tables, changes, begin)
    if made["base"].checkpoint == PLAYGROUND:
        begin = {**begin, "data": {**ON_PLAYGROUND, **begin.get("data", {})}}
        made = resolve_sections(TrainConfig, tables, changes, begin)
    if what not in ("module", "ella"):
        raise TrainingConfigError(f"what = {what!r}; wanted module or ella.")
    return TrainConfig(what=what, **made)


def resolve_sections(
    of: type, given: Mapping[str, Any], changes: Mapping[str, Any] | None = None,
    begin: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The sections of a class of configurations: defaults, then ``begin``, then a file's tables, then `section.key` changes.

    Raises:
        TrainingConfigError: an unknown section or key, a value of the wrong kind or out of range.
    """
    merged: dict[str, dict[str, Any]] = {name: dict((begin or {}).get(name, {})) for name in sections(of)}
    for name, table in given.items():
        if name not in merged or not isinstance(table, Mapping):
            raise TrainingConfigError(f"the configuration has {name!r}, which is no section; wanted {', '.join(merged)}.")
        merged[name].update(table)
    for path, value in (changes or {}).items():
        section, _, key = path.partition(".")
        merged[section][key] = value
    return {name: _section(name, kind, merged[name]) for name, kind in sections(of).items()}


def _section(name: str, kind: type, table: Mapping[str, Any]) -> Any:
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise TrainingConfigError(f"[{name}] has the unknown key {unknown[0]!r}; it knows {', '.join(known)}. Correct the "
                                  "name.")
    hints = get_type_hints(kind)
    return kind(**{key: _value(f"{name}.{key}", value, hints[key], known[key].metadata) for key, value in table.items()})


def _value(path: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, get_args(kind)[0]) for item in value):
            raise TrainingConfigError(f"{path} = {value!r}; wanted a list of texts.")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TrainingConfigError(f"{path} = {value!r}; wanted {_NAMES[kind]}.")
    if "choices" in limits and value not in limits["choices"]:
        raise TrainingConfigError(f"{path} = {value!r}; choose one of {', '.join(limits['choices'])}.")
    if not limits.get("least", value) <= value <= limits.get("most", value):
        raise TrainingConfigError(f"{path} = {value!r}; wanted {limits.get('least', '')} to {limits.get('most', 'any')}.")
    return value
