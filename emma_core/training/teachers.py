"""The teachers there are, and the one that a configuration names."""

from __future__ import annotations

from ..base.backbones import Backbone
from ..errors import TrainingConfigError
from . import ip_adapter_teacher, lora_teacher
from .config import TeacherConfig
from .teacher import Teacher, TeacherKind

KINDS = (lora_teacher.KIND, ip_adapter_teacher.KIND)


def teacher_kind(config: TeacherConfig) -> TeacherKind | None:
    """The kind of teacher that ``config`` names, its settings checked; None: it names none.

    Raises:
        TrainingConfigError: several teachers, or settings that do not go together.
    """
    named = named_kinds(config)
    if len(named) > 1:
        keys = " and ".join(f"teacher.{kind.key}" for kind in named)
        raise TrainingConfigError(f"{keys} are both given; a teacher is one of them. Remove one.")
    for kind in named:
        kind.check(config)
    return named[0] if named else None


def named_kinds(config: TeacherConfig) -> list[TeacherKind]:
    """The kinds of which ``config`` names a file."""
    return [kind for kind in KINDS if getattr(config, kind.key)]


def load_teacher(config: TeacherConfig, backbone: Backbone, text_is_used: bool = False) -> Teacher | None:
    """The teacher that ``config`` names, or None if it names none.

    Args:
        config: its `scale` is the strength of the LoRA or the IP-Adapter.
        backbone: the frozen base, whose weights the teacher shares.
        text_is_used: the base's own text encoders are, so that a LoRA's part for them has its effect there.
    Raises:
        TrainingConfigError: see `teacher_kind`.
        FileError: files of another kind or for another model, pickles, non-finite weights.
    """
    kind = teacher_kind(config)
    return None if kind is None else kind.load(config, backbone, text_is_used).to(backbone.device, backbone.dtype)
