"""What an evaluation is made of: one frozen configuration, from a TOML file and flags; unknown keys are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.config import BaseConfig, EllaConfig, EncodersConfig, SamplingConfig, size_px
from ..base.pipeline import PIXELS_PER_LATENT
from ..errors import EvaluationError
from ..model.addition import ADDITIONS, BLOCKS
from ..playground import PLAYGROUND
from ..settings import key, resolve_sections

PROTOCOLS = ("style", "portrait", "object")
AS_TRAINED, MASK_ALWAYS, MASK_NEVER = MASKS = "as trained", "always", "never"
SUBJECT = "{subject}"
TEXT_ONLY = "text only"


@dataclass(frozen=True)
class ResultsConfig:
    """Where results go."""

    folder: str = key("", "folder of pictures, scores, and results; an evaluation that was stopped goes on in it")


@dataclass(frozen=True)
class PlanConfig:
    """What is drawn: every prompt with every reference."""

    protocol: str = key("style", "style: each reference with each prompt, judged by CLIP-T and CLIP-I; portrait, object: each "
                                 f"subject's references with each prompt, in which {SUBJECT} stands for the subject's name, "
                                 "judged by CLIP-T and DINO", choices=PROTOCOLS)
    per_pair: int = key(4, "pictures of each prompt with each reference, from different noise", least=1)
    seed: int = key(0, "added to the seeds, which come from the prompts", least=0)


@dataclass(frozen=True)
class ModulesConfig:
    """The modules, assembled; without any, only text is judged."""

    files: tuple[str, ...] = key((), "EMMA module files", folders=("emma",))
    strengths: tuple[str, ...] = key((), "one row of results each: a strength for all modules, or one for each, as in 1,0.5 "
                                         "(default: 1)")
    adding: str = key(BLOCKS, "where several modules are added up, as `generate` has it", choices=tuple(ADDITIONS))


@dataclass(frozen=True)
class ReferencesConfig:
    """The reference pictures: a folder, or annotated pictures in COCO's format."""

    folder: str = key("", "folder of pictures; its sub-folders are subjects (persons, things, styles)")
    coco: str = key("", "instances JSON in COCO's format: the box of each annotation is a reference")
    images: str = key("", "folder of the pictures that the COCO file names")
    categories: tuple[str, ...] = key((), "only annotations of these categories")
    smallest_px: int = key(64, "annotations whose box has a shorter side are left out", least=1)
    most: int = key(0, "this many references, chosen at random, but the same ones every time; 0: all", least=0)
    mask: str = key(AS_TRAINED, "masks (<name>.mask.png beside a picture, or COCO's segmentation) remove the background for "
                                "the encoder: of modules trained so, always, or never", choices=MASKS)


@dataclass(frozen=True)
class PromptsConfig:
    """The prompts."""

    file: str = key("", "text file, a prompt a line")
    captions: str = key("", "captions JSON in COCO's format: the first caption of each picture is a prompt")
    most: int = key(0, "this many prompts, chosen at random, but the same ones every time; 0: all", least=0)


@dataclass(frozen=True)
class ScoresConfig:
    """The models that judge, from local files; what is not named is left out."""

    clip_model: str = key("", "open_clip's name of the model of CLIP-T and CLIP-I, such as ViT-L-14-quickgelu")
    clip_file: str = key("", "its weights: both towers, in open_clip's layout")
    dino_model: str = key("", "timm's name of the ViT of DINO, such as vit_small_patch16_224.dino")
    dino_file: str = key("", "its weights, in timm's layout")
    batch: int = key(16, "pictures at once", least=1)

    @property
    def named(self) -> bool:
        """Whether a model is named; on the playground its own encoder judges where none is."""
        return bool(self.clip_model or self.dino_model)


@dataclass(frozen=True)
class EvalConfig:
    """A whole evaluation."""

    output: ResultsConfig = field(default_factory=ResultsConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    ella: EllaConfig = field(default_factory=EllaConfig)
    modules: ModulesConfig = field(default_factory=ModulesConfig)
    encoder: EncodersConfig = field(default_factory=EncodersConfig)
    references: ReferencesConfig = field(default_factory=ReferencesConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    scores: ScoresConfig = field(default_factory=ScoresConfig)

    @property
    def on_playground(self) -> bool:
        return self.base.checkpoint == PLAYGROUND

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of the pictures."""
        return size_px(self.base, self.sampling)


@dataclass(frozen=True)
class ResultRow:
    """A row of results: a strength for each module file; text only has none.

    Args:
        name: modules and strengths in words.
        title: the same in few words, for the head of a column.
        strengths: one for each file of `modules.files`, or empty.
    """

    name: str
    title: str
    strengths: tuple[float, ...] = ()


def resolve_evaluation(given: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> EvalConfig:
    """Defaults, then a file's tables, then `section.key` changes.

    Raises:
        SettingsError: an unknown section or key, a value of the wrong kind or out of range.
    """
    return EvalConfig(**resolve_sections(EvalConfig, given, changes))


def rows_of(modules: ModulesConfig) -> list[ResultRow]:
    """Text only, and a row for each entry of the strengths; modules of strength 0 take no part in a row.

    Raises:
        EvaluationError: strengths that are no numbers or not one for all or for each module; strengths of no module; rows
            that are the same; modules with the same file name.
    """
    names = [Path(file).stem for file in modules.files]
    if len(set(names)) < len(names):
        raise EvaluationError(f"modules.files has files of the same name ({', '.join(names)}), which results could not tell "
                              "apart. Rename one.")
    if modules.strengths and not names:
        raise EvaluationError("modules.strengths is set, but modules.files is empty. Name the module files.")
    rows = [ResultRow(TEXT_ONLY, TEXT_ONLY)]
    for text in (modules.strengths or ("1",)) if names else ():
        strengths = _strengths(text, len(names))
        parts = [f"{name} {strength:g}" for name, strength in zip(names, strengths, strict=True) if strength]
        rows.append(ResultRow(" + ".join(parts), f"strength {text}", strengths))
        if [row.name for row in rows].count(rows[-1].name) > 1:
            raise EvaluationError(f"modules.strengths has {text!r} twice. Remove one.")
    return rows


def _strengths(text: str, count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    numbers = numbers * count if len(numbers) == 1 else numbers
    if len(numbers) != count or not all(map(math.isfinite, numbers)) or not any(numbers):
        raise EvaluationError(f"modules.strengths has {text!r}; wanted a number for all {count} modules, or {count} numbers "
                              "with commas between them, not all 0 (text only is always a row). Correct it.")
    return numbers


def check(config: EvalConfig) -> None:
    """Refuse what is missing or does not go together, before any file is read.

    Raises:
        EvaluationError: which keys, and what to set.
    """
    references, prompts, scores = config.references, config.prompts, config.scores
    if not config.output.folder:
        raise EvaluationError("output.folder is not set. Name a folder for pictures and results.")
    _exactly_one("references.folder", references.folder, "references.coco", references.coco)
    _exactly_one("prompts.file", prompts.file, "prompts.captions", prompts.captions)
    if references.coco and not references.images:
        raise EvaluationError("references.images is not set; wanted the folder of the pictures that references.coco names.")
    if not config.on_playground and bool(config.ella.file) != bool(config.ella.text_encoder):
        lacking = "text_encoder" if config.ella.file else "file"
        raise EvaluationError(f"ella.{lacking} is not set: an ELLA and its text encoder belong together. Name both, for "
                              "instance ella-sd1.5-tsc-t5xl.safetensors and the folder of flan-t5-xl, or none: then the "
                              "checkpoint's own text encoders are used.")
    if config.modules.files and not config.encoder.files and not config.on_playground:
        raise EvaluationError("encoder.files is not set; wanted the reference encoders that the modules were trained with. "
                              "Name the files or folders.")
    if any(side % PIXELS_PER_LATENT for side in config.size_px):
        raise EvaluationError(f"pictures of {config.size_px[0]} x {config.size_px[1]} px; wanted multiples of "
                              f"{PIXELS_PER_LATENT}. Correct sampling.width_px and sampling.height_px.")
    for what in ("clip", "dino"):
        model, file = getattr(scores, f"{what}_model"), getattr(scores, f"{what}_file")
        if bool(model) != bool(file):
            raise EvaluationError(f"scores.{what}_{'file' if model else 'model'} is not set, scores.{what}_"
                                  f"{'model' if model else 'file'} is: both belong together. Set both, or none.")
    if not (scores.named or config.on_playground):
        raise EvaluationError("no model to judge with: set scores.clip_model and scores.clip_file, or scores.dino_model and "
                              "scores.dino_file, or all four. Nothing is downloaded.")


def _exactly_one(one: str, first: str, other: str, second: str) -> None:
    if bool(first) == bool(second):
        raise EvaluationError(f"{one} and {other} are {'both' if first else 'both not'} set; wanted exactly one of them.")
