"""How a run begins, on the command line and in the graph: the module with its metadata, the student, the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..base.denoiser import Denoiser
from ..encoders.options import AS_TRAINED
from ..files.module_file import module_tensors
from ..files.tensor_file import fingerprint_of_weights
from ..model.connector import Connector
from ..model.gated_resampler import GatedResampler
from ..model.own_tokens import OwnTokens
from .config import ADAMW, TrainConfig
from .draws import TrainingSet
from .reading import Reading
from .starts import begin_module, size_of_tokens
from .student import OwnText, Student, TeacherTarget
from .trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, eq=False)
class Frozen:
    """Everything around the module that stays as it is.

    Args:
        denoiser: the diffusion model.
        connector: ELLA, which learns itself if there is no module; or the model's own tokens.
        base: the diffusion model in a module's metadata: its name, and a digest.
        encoder: the reference encoder as it describes itself; empty where there is none.
        teacher: gives the target in place of the noise.
        places: (1, h, w) weights of a target by its index.
        own: what goes with the model's own tokens; None with an ELLA.
        reading: what teaches an ELLA first.
        files: marks of the files that these come from, which belong to the run.
    """

    denoiser: Denoiser
    connector: Connector | OwnTokens
    base: Mapping[str, str]
    encoder: Mapping[str, Any]
    teacher: TeacherTarget | None = None
    places: Callable[[int], torch.Tensor] | None = None
    own: OwnText | None = None
    reading: Reading | None = None
    files: Mapping[str, str] = field(default_factory=dict)


def begin(config: TrainConfig, frozen: Frozen, data: TrainingSet, accelerator: Accelerator, folder: Path) -> Trainer:
    """A trainer at its first update.

    Raises:
        TrainingConfigError: see `begin_module`.
    """
    module = new_module(config, frozen, data) if config.what == "module" else None
    student = Student(frozen.denoiser, frozen.connector, module, config.objective, frozen.teacher, frozen.places,
                      frozen.own, frozen.reading)
    return Trainer(config, student, data, accelerator, folder, frozen.files)


def new_module(config: TrainConfig, frozen: Frozen, data: TrainingSet) -> GatedResampler:
    """The module that learns, with its metadata.

    Raises:
        TrainingConfigError: see `begin_module`.
    """
    features = data.features(data.references(0)[0], 0)
    dims = {name: tensor.shape[-1] for name, tensor in features.items()}
    described = encoder_metadata(config, frozen.encoder, tuple(features))
    generator = torch.Generator().manual_seed(config.train.seed)
    size = 1.0 if frozen.own is None else size_of_tokens(data.text(data.captions(0)[0]))
    module = begin_module(config, frozen.connector, dims, described, generator, size)
    start = fingerprint_of_weights(module_tensors(module)) if config.module.start else ""
    module.config = module.config.replace(training=recipe(config, frozen, data, start), file_metadata=model_spec(config))
    return module


def encoder_metadata(config: TrainConfig, encoder: Mapping[str, Any], features: tuple[str, ...]) -> dict[str, Any]:
    """The encoder as a module's metadata names it."""
    chosen = {key: value for key in ("frame", "background") if (value := getattr(config.encoder, key)) != AS_TRAINED}
    layer = {"layer": config.encoder.layer} if "local" in features else {}
    return {**encoder, **layer, **chosen, **({"masked": True} if config.encoder.masked else {})}


def recipe(config: TrainConfig, frozen: Frozen, data: TrainingSet, start: str) -> dict[str, Any]:
    """How the module is trained, for its metadata: what is used, and no paths.

    Args:
        start: fingerprint of the weights that it begins with, "" for new ones.
    """
    train = config.train
    objective = {name: value for name, value in vars(config.objective).items() if value}
    if frozen.places is None:
        objective.pop("place_weight", None)
    begins_with = {"start": start} if start else {} if frozen.own else {"blocks": config.module.blocks}
    optimizer = {"optimizer": train.optimizer} if train.optimizer != ADAMW else {}
    return {
        "base": dict(frozen.base), "data": data.summary(),
        "recipe": {
            "batch": train.batch * train.accumulate, "rate": train.rate, "gate_rate": train.gate_rate, "decay": train.decay,
            "warmup": train.warmup, "schedule": train.schedule, "precision": train.precision, "average": train.average,
            "seed": train.seed, **optimizer, **begins_with, **objective,
            **({"teacher": frozen.teacher.kind} if frozen.teacher else {}),
        },
    }


def model_spec(config: TrainConfig) -> dict[str, str]:
    """ModelSpec entries that model managers show."""
    output = config.output
    entries = {"title": output.title or output.name, "author": output.author, "license": output.license,
               "description": f"EMMA {config.module.condition} module"}
    return {f"modelspec.{key}": value for key, value in entries.items() if value}
