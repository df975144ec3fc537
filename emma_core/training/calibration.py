"""Which strength a trained module does best at, found by drawing; a user's strength 1 then stands for it.

Training pictures are shown as references beside prompts that are not theirs, at several strengths, with the same noise. The
module's own encoder says how like their references the pictures are. Nothing that a module is scored on is looked at.

Shapes: S strengths, B pictures, V vectors of dim D, pictures H x W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..base.parts import AUTOENCODER, REFERENCE_ENCODER, UNET, Parts
from ..encoders.base import ReferenceEncoder
from ..encoders.loading import load_encoder
from ..errors import ImageInputError
from .checks import encoder_file
from .parts import encode_references
from .samples import Sampler
from .trainer import Trainer

STRENGTHS = (0.75, 1.0, 1.25, 1.5)
REFERENCES = 8
_AS_TRAINED = STRENGTHS.index(1.0)
_STANDARD_ERRORS = 2.0
Features = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Args:
        likeness: mean cosine between pictures and references at each strength.
        strength: the best of them.
        pictures: drawn at each strength.
    """

    likeness: Mapping[float, float]
    strength: float
    pictures: int

    @property
    def metadata(self) -> dict[str, Any]:
        """As a module's file holds it."""
        return {"strength": self.strength, "by": f"likeness to references of {self.pictures} pictures a strength: {self.table}"}

    @property
    def table(self) -> str:
        """Every strength with its likeness."""
        return ", ".join(f"{strength:g}: {likeness:.3f}" for strength, likeness in self.likeness.items())


def calibrate(
    draw: Callable[[float], torch.Tensor], encode: Callable[[torch.Tensor], Sequence[Features]], wanted: Sequence[Features]
) -> Calibration:
    """Draws at every strength, and chooses one.

    Args:
        draw: strength -> pictures (B, H, W, 3) in [0, 1], the same ones at each.
        encode: pictures -> for each what the module reads of it, name -> (V, D).
        wanted: features of the reference that each picture was drawn with.
    """
    rows = [likeness_of(encode(draw(strength)), wanted) for strength in STRENGTHS]
    likeness_SB = torch.stack(rows)
    means = dict(zip(STRENGTHS, likeness_SB.mean(1).tolist(), strict=True))
    return Calibration(means, STRENGTHS[best_of(likeness_SB)], len(wanted))


def likeness_of(found: Sequence[Features], wanted: Sequence[Features]) -> torch.Tensor:
    """(B,) cosine between a picture and its reference: of the mean vector of each feature, the mean over features."""
    def cosine(one: Features, other: Features) -> torch.Tensor:
        each = [F.cosine_similarity(one[name].float().mean(0), other[name].float().mean(0), dim=0) for name in other]
        return torch.stack(each).mean()

    return torch.stack([cosine(one, other) for one, other in zip(found, wanted, strict=True)])


def best_of(likeness_SB: torch.Tensor) -> int:
    """Number of the strength with the largest mean; of strength 1 where that is not above it by two standard errors.

    The differences are paired, as the same pictures are drawn at each strength.
    """
    best = int(likeness_SB.mean(1).argmax())
    gain_B = likeness_SB[best] - likeness_SB[_AS_TRAINED]
    error = gain_B.std() / len(gain_B) ** 0.5
    return best if gain_B.mean() > _STANDARD_ERRORS * error else _AS_TRAINED


def calibrate_result(trainer: Trainer, sampler: Sampler, parts: Parts) -> Calibration:
    """Find the best strength of what a run has trained, and save the module with it.

    References are those of held-out pictures, where there are some, else those of the sample sheet. The reference encoder is
    loaded again.
    """
    config, module = trainer.config, trainer.student.module
    encoder = load_encoder(encoder_file(config), config.encoder.open_clip_model or None)
    parts.reference_encoder = encoder
    wanted = _held_out_references(trainer) or list(sampler.references)

    def draw(strength: float) -> torch.Tensor:
        parts.place(UNET, AUTOENCODER)
        return sampler.at_strength(trainer, wanted, strength)

    def encode(picture_BHW3: torch.Tensor) -> list[Features]:
        parts.place(REFERENCE_ENCODER)
        return [_seen(trainer, encoder, picture_1HW3, wanted[0]) for picture_1HW3 in picture_BHW3.split(1)]

    found = calibrate(draw, encode, wanted)
    parts.reference_encoder = None
    module.config = module.config.replace(calibration=found.metadata)
    trainer.save_result()
    return found


def _held_out_references(trainer: Trainer) -> list[Features]:
    """Of REFERENCES held-out pictures at most, each reference once."""
    data, indices = trainer.data, sorted(trainer.held_out.indices) if trainer.held_out else ()
    references = dict.fromkeys(data.references(index)[0] for index in indices)
    return [data.features(reference, 0) for reference in list(references)[:REFERENCES]]


def _seen(trainer: Trainer, encoder: ReferenceEncoder, picture_1HW3: torch.Tensor, like: Features) -> Features:
    """A picture's features; zeros, which are like nothing, of one that cannot be encoded: it has no face."""
    try:
        return encode_references(trainer.config, encoder, picture_1HW3.float().cpu())[0]
    except ImageInputError:
        return {name: torch.zeros_like(tensor) for name, tensor in like.items()}
