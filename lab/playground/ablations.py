"""`python -m lab.playground.ablations joint|unfrozen RECIPE.toml ...`: what EMMA's claims are measured against.

`unfrozen` trains the connector's blocks along with the module (the paper keeps them frozen, section 3.2); it writes the module
and its ELLA. `joint` trains a style and a face module at once, on pictures that have both references: what assembling modules
that were trained apart could reach at best. Everything else is as in `python -m emma_core train`, with the same flags; with
`--teacher` the target is that of `python -m lab.playground.labelled distil`.

Shapes: B rows.
"""

from __future__ import annotations

import argparse
import copy
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from emma_core.base.parts import Parts
from emma_core.commands.flags import end_as_interrupt
from emma_core.commands.train import add_arguments, config_of
from emma_core.files.connector_file import save_connector
from emma_core.files.module_file import save_module
from emma_core.model.addition import ADDITIONS, BLOCKS, Addition
from emma_core.model.assembly import Assembly, Reference
from emma_core.model.gated_resampler import GatedResampler
from emma_core.training.beginning import encoder_metadata, model_spec
from emma_core.training.config import TrainConfig
from emma_core.training.draws import BatchRow, TrainingSet
from emma_core.training.examples import read_examples
from emma_core.training.prepared import Prepared
from emma_core.training.runs import begin_run, encoded, run
from emma_core.training.shards import Processes
from emma_core.training.starts import begin_module
from emma_core.training.student import Student, TeacherTarget, tokens_of_texts
from emma_core.training.trainer import Trainer

from .labelled import GUIDANCE_HELP, label_target, load_labelled

ALONE_SHARE = 10  # one row in so many shows the style only, and as many the face only


@dataclass(frozen=True, eq=False)
class Group(Student):
    """A student of which several parts learn."""

    parts: nn.ModuleDict = field(default_factory=nn.ModuleDict)

    @property
    def learning(self) -> nn.Module:
        return self.parts

    def freeze(self) -> None:
        self.connector.requires_grad_(self.connector in self.parts.values())
        self.parts.train()


@dataclass(frozen=True, eq=False)
class JointStudent(Group):
    """A style and a face module on rows that have a reference of each.

    Args:
        face_data: the face references of the same targets.
        addition: where the two are added up.
    """

    face_data: TrainingSet | None = None
    addition: Addition = field(default_factory=Addition)

    def _assembly(self, data: TrainingSet, rows: Sequence[BatchRow], device) -> Assembly:
        found = {"style": [data.features(row.reference, row.variant) for row in rows],
                 "face": [self.face_data.features(self._face_of(row), 0) for row in rows]}
        shown = strengths_of(rows)
        references = []
        for condition, module in self.parts.items():
            features = {name: torch.stack([one[name] for one in found[condition]]).to(device, torch.float32)
                        for name in module.config.features}
            references.append(Reference(module, features, torch.tensor(shown[condition], device=device)))
        return Assembly(references, self.addition)

    def _face_of(self, row: BatchRow) -> int:
        choices = self.face_data.references(row.target)
        return choices[_number_of(row) // ALONE_SHARE % len(choices)]


def _number_of(row: BatchRow) -> int:
    """A row's own large number, the same in a run that was resumed."""
    return zlib.crc32(f"{row.target} {row.reference} {row.caption}".encode())


def _untold(what: str, done: int, total: int) -> None:
    """Encoding is not shown."""


def strengths_of(rows: Sequence[BatchRow]) -> dict[str, list[float]]:
    """Strength of each reference of each row: one, both or none are shown."""
    return {"style": [row.strength * (_number_of(row) % ALONE_SHARE != 0) for row in rows],
            "face": [row.strength * (_number_of(row) % ALONE_SHARE != 1) for row in rows]}


class GroupTrainer(Trainer):
    """Writes every part into a file of its own."""

    def save_result(self) -> Path:
        path = self.folder / "emma.safetensors"
        for part in self.averaged().values():
            if isinstance(part, GatedResampler):
                path = self.folder / f"emma-{part.config.condition}.safetensors"
                part.config = self.with_steps(part.config).replace(ella={})
                save_module(part, path, torch.float16)
            else:
                save_connector(part, self.folder / "ella.safetensors", torch.float16)
        return path


def unfrozen_beginning(teacher: Path | None, guidance: float = 1.0):
    """`begin` for a module that learns together with its connector; `guidance` multiplies what the teacher's label changes."""
    def begin_unfrozen(config: TrainConfig, parts: Parts, data: Prepared, accelerator, folder: Path) -> Trainer:
        student = begin_run(config, parts, data, accelerator, folder).student
        if teacher:
            frozen = copy.deepcopy(student.connector)
            told = label_target(load_labelled(teacher), {config.module.condition: data.group}, guidance)

            def predict(noised_B4hw, timestep_B, _, rows: Sequence[BatchRow]) -> torch.Tensor:
                context_BKW = tokens_of_texts(frozen, [data.text(row.caption) for row in rows], timestep_B)
                return told.predict(noised_B4hw, timestep_B, context_BKW, rows)

            student = replace(student, teacher=TeacherTarget(told.kind, predict))
        student.connector.requires_grad_(True)
        learning = nn.ModuleDict({"module": student.module, "connector": student.connector})
        return GroupTrainer(config, Group(**vars(student), parts=learning), data, accelerator, folder)

    return begin_unfrozen


def joint_beginning(
    face_list: Path, teacher: Path | None, face_start: Path | None = None, guidance: float = 1.0,
    addition: Addition | None = None,
):
    """`begin` for a style and a face module.

    Args:
        face_list: the face data's JSON-lines file, of the same targets in order.
        face_start: module that the face module continues from, as the style module does from `module.start`.
        guidance: what the teacher's labels change is multiplied by it.
        addition: where the two modules are added up; None: in the blocks.
    """
    def begin_joint(config: TrainConfig, parts: Parts, data: Prepared, accelerator, folder: Path) -> Trainer:
        face_config = replace(config, data=replace(config.data, jsonl=str(face_list)),
                              module=replace(config.module, condition="face", start=str(face_start or "")))
        examples, _ = read_examples(face_config.data)
        face_data, *_ = encoded(face_config, parts, examples, folder, Processes.of_run(), _untold)
        features = face_data.features(face_data.references(0)[0], 0)
        described = encoder_metadata(face_config, parts.reference_encoder.description, tuple(features))
        generator = torch.Generator().manual_seed(config.train.seed)
        face = begin_module(face_config, parts.connector, {name: one.shape[-1] for name, one in features.items()}, described,
                            generator)
        student = begin_run(config, parts, data, accelerator, folder).student
        face.config = face.config.replace(training=student.module.config.training, file_metadata=model_spec(face_config))
        if teacher:
            student = replace(student, teacher=label_target(
                load_labelled(teacher), {"style": data.group, "face": face_data.group}, guidance, strengths_of))
        learning = nn.ModuleDict({"style": student.module, "face": face})
        joint = JointStudent(**vars(student), parts=learning, face_data=face_data,
                             addition=addition or Addition())
        return GroupTrainer(config, joint, data, accelerator, folder)

    return begin_joint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["joint", "unfrozen"])
    parser.add_argument("--face-list", type=Path, help="joint: the face data's JSON-lines file")
    parser.add_argument("--adding", choices=list(ADDITIONS), default=BLOCKS, help="joint: where the two modules are added up")
    parser.add_argument("--face-start", type=Path, help="joint: module that the face module continues from; the style module "
                                                        "does from --module.start")
    add_arguments(parser)
    parser.usage = None
    parser.add_argument("--teacher", type=Path, help="checkpoint of `python -m lab.playground.labelled train`")
    parser.add_argument("--teacher-guidance", type=float, default=1.0, help=GUIDANCE_HELP)
    options = parser.parse_args()
    if options.kind == "joint" and options.face_list is None:
        parser.error("joint needs --face-list")
    end_as_interrupt()
    torch.set_num_threads(1)
    if options.kind == "unfrozen":
        beginning = unfrozen_beginning(options.teacher, options.teacher_guidance)
    else:
        beginning = joint_beginning(options.face_list, options.teacher, options.face_start, options.teacher_guidance,
                                    ADDITIONS[options.adding])
    config = config_of(options)
    config = replace(config, output=replace(config.output, thumbnail=False, calibrate=False),
                     report=replace(config.report, sample_every=0))
    run(config, print, bars=sys.stderr.isatty(), begin_with=beginning)


if __name__ == "__main__":
    main()
