"""What a teacher is: a model whose prediction is the target in place of the noise.

A teacher sees the same text as the student without its reference: the tokens that the caller hands over. With an ELLA these
are its tokens for the caption, even where a checkpoint has a CLIP text encoder: under the same tokens teacher and base differ
by the LoRA or the reference alone, and that difference is all that the module is to learn. On a checkpoint's own tokens a LoRA
may change the text encoders too: then the teacher reads the caption through these.

Shapes: B rows, K cross-attention tokens of width W, latents 4 x h x w.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..base.backbones import Backbone
from ..base.denoiser import NO_EXTRA
from .config import TeacherConfig
from .draws import BatchRow
from .prepared import Prepared
from .student import OwnText, TeacherTarget


@dataclass(frozen=True, eq=False)
class TeacherText:
    """How a teacher reads captions on a checkpoint's own tokens.

    Args:
        own: what its denoiser is told beside the tokens.
        tokens: of a caption, (1, N, W), by text encoders that its LoRA changes; None: the student's.
    """

    own: OwnText
    tokens: Callable[[str], torch.Tensor] | None = None

    def told(self, row: BatchRow, context_1KW: torch.Tensor) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The tokens of a row, given the student's, and what is beside them."""
        context_1KW = self.tokens(row.caption).to(context_1KW) if self.tokens else context_1KW
        return context_1KW, {name: value.to(context_1KW.device) for name, value in self.own.beside(row).items()}


def told_of_rows(
    texts: Sequence[TeacherText], rows: Sequence[BatchRow], context_BKW: torch.Tensor
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """What a teacher's denoiser is told of rows: tokens (B, K, W), and what is beside them.

    Args:
        texts: how each row is read; empty with an ELLA.
        context_BKW: the student's tokens.
    """
    if not texts:
        return context_BKW, NO_EXTRA
    told = [text.told(row, context_BKW[index:index + 1])
            for index, (text, row) in enumerate(zip(texts, rows, strict=True))]
    beside = {name: torch.cat([one[name] for _, one in told]) for name in told[0][1]}
    return torch.cat([context_1KW for context_1KW, _ in told]), beside


def numbers_beside(backbone: Backbone, base: Backbone) -> int:
    """How many numbers a twin's UNet has that are not the base's own."""
    shared = {id(value) for value in (*base.unet.parameters(), *base.unet.buffers())}
    return sum(value.numel() for value in (*backbone.unet.parameters(), *backbone.unet.buffers()) if id(value) not in shared)


class Teacher(ABC):
    """Predicts what the student is to predict: eps or v, whichever the base does."""

    @abstractmethod
    def predict(
        self, noised_B4hw: torch.Tensor, timestep_B: torch.Tensor, context_BKW: torch.Tensor,
        reference: Mapping[str, torch.Tensor] | None = None, beside: Mapping[str, torch.Tensor] = NO_EXTRA,
    ) -> torch.Tensor:
        """The target (B, 4, h, w), in float32 and without a gradient.

        Args:
            noised_B4hw: noised latents.
            timestep_B: their timesteps.
            context_BKW: the tokens without reference, with text dropped where the student's is.
            reference: what this teacher needs to know of the rows' references, a row each. None: no row has one.
            beside: what the denoiser reads beside the tokens, a row each.
        """

    @abstractmethod
    def target_on(self, data: Prepared, texts: Sequence[TeacherText] = ()) -> TeacherTarget:
        """The target of rows whose references are pictures of ``data``.

        Args:
            texts: on a checkpoint's own tokens, how captions are read: one for all rows, or one for each LoRA.
        Raises:
            TrainingConfigError: references that this teacher has nothing to say of.
        """

    @abstractmethod
    def bytes_beside(self, dtype: torch.dtype) -> int:
        """As `TeacherTarget.bytes_beside`."""

    @abstractmethod
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Teacher:
        """Move what the teacher has beside the base."""


@dataclass(frozen=True)
class TeacherKind:
    """A kind of teacher that a configuration may name.

    Args:
        key: of `[teacher]`, which names its file.
        check: refuses settings that do not go together, before anything is loaded.
        load: makes it, on the base; told whether the base's own text encoders are used.
    """

    key: str
    check: Callable[[TeacherConfig], None]
    load: Callable[[TeacherConfig, Backbone, bool], Teacher]
