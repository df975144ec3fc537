"""What a teacher is: a model whose prediction is the target in place of the noise.

A teacher sees the same text as the student without its reference: the tokens that the caller hands over, which are ELLA's
for the caption. CLIP's tokens are not used, even where a checkpoint has a CLIP text encoder: the student's frozen part
speaks ELLA's, so under the same tokens teacher and base differ by the LoRA or the reference alone, and that difference is
all that the module is to learn.

Shapes: B rows, K cross-attention tokens of width W, latents 4 x h x w.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..base.backbones import Backbone
from .config import TeacherConfig
from .prepared import Prepared
from .student import TeacherTarget


class Teacher(ABC):
    """Predicts what the student is to predict: eps or v, whichever the base does."""

    @abstractmethod
    def predict(
        self, noised_B4hw: torch.Tensor, timestep_B: torch.Tensor, context_BKW: torch.Tensor,
        reference: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The target (B, 4, h, w), in float32 and without a gradient.

        Args:
            noised_B4hw: noised latents.
            timestep_B: their timesteps.
            context_BKW: the student's tokens without reference, with text dropped where the student's is.
            reference: what this teacher needs to know of the rows' references, a row each. None: no row has one.
        """

    @abstractmethod
    def target_on(self, data: Prepared) -> TeacherTarget:
        """The target of rows whose references are pictures of ``data``.

        Raises:
            TrainingConfigError: references that this teacher has nothing to say of.
        """

    @abstractmethod
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Teacher:
        """Move what the teacher has beside the base."""


@dataclass(frozen=True)
class TeacherKind:
    """A kind of teacher that a configuration may name.

    Args:
        key: of `[teacher]`, which names its file.
        check: refuses settings that do not go together, before anything is loaded.
        load: makes it, on the base.
    """

    key: str
    check: Callable[[TeacherConfig], None]
    load: Callable[[TeacherConfig, Backbone], Teacher]
