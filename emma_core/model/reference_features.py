"""Features of reference pictures, the encoder they come from, and how those of several are combined.

Shapes: R references (pictures), V vectors of one picture, D dim of a feature.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

from ..errors import ReferenceMismatchError

COMBINATIONS = ("concat", "average", "normalised average", "per frame")


@dataclass(frozen=True, eq=False)
class ReferenceFeatures:
    """Features ready for a module.

    Args:
        features: feature name -> (R, vectors, dim); R is 1 unless ``per_frame``.
        encoder: where they come from ({family, fingerprint, input_size, layer, masked}), as in a module's metadata.
        per_frame: one reference for each frame (row) of the batch, instead of one for all.
    Raises:
        ReferenceMismatchError: no features; several references that are neither combined nor per frame.
    """

    features: Mapping[str, torch.Tensor]
    encoder: Mapping[str, Any] = field(default_factory=dict)
    per_frame: bool = False

    def __post_init__(self):
        rows = {name: tensor.shape[0] for name, tensor in _checked(self.features).items()}
        if not self.per_frame and set(rows.values()) != {1}:
            raise ReferenceMismatchError(
                f"features of {max(rows.values())} references that are not one per frame; wanted 1. Combine them "
                f"({', '.join(COMBINATIONS[:3])}), or mark them as one per frame."
            )

    def __repr__(self) -> str:
        """Short: a host shows what is wired into a node that failed."""
        return f"<reference: {features_in_words(self.features)}; encoder {self.encoder.get('family', 'not named')}>"

    @property
    def rows(self) -> int:
        """R: 1, or the number of frames."""
        return max(tensor.shape[0] for tensor in self.features.values())


def features_in_words(features: Mapping[str, torch.Tensor]) -> str:
    """Names and shapes."""
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in features.items())


def combine_features(
    features: Mapping[str, torch.Tensor], how: str, encoder: Mapping[str, Any] | None = None
) -> ReferenceFeatures:
    """Features of several pictures (R, V, D) as those of one reference, or of one reference per frame.

    Args:
        features: of R pictures that were encoded together.
        how: "concat": all vectors side by side (1, R*V, D), the module sees every picture;
            "average": (1, V, D), one picture between them;
            "normalised average": the same for directions, so that no picture counts more for the length of its
            vectors; the result has their mean length (identity features such as AdaFace's);
            "per frame": unchanged, picture r serves frame r.
        encoder: kept in the result.
    Raises:
        ReferenceMismatchError: no pictures, features of unequal numbers of pictures, an unknown ``how``.
    """
    if how not in _COMBINE:
        raise ReferenceMismatchError(f"references cannot be combined by {how!r}; choose one of "
                                     f"{', '.join(COMBINATIONS)}.")
    counts = {name: tensor.shape[0] for name, tensor in _checked(features).items()}
    if len(set(counts.values())) > 1:
        raise ReferenceMismatchError(f"features of unequal numbers of pictures ({counts}). Encode them together.")
    combined = {name: _COMBINE[how](tensor) for name, tensor in features.items()}
    return ReferenceFeatures(combined, dict(encoder or {}), per_frame=how == "per frame")


def _checked(features: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    if not features:
        raise ReferenceMismatchError("a reference without features. Encode a picture with the module connected.")
    for name, tensor in features.items():
        if tensor.ndim != 3 or 0 in tensor.shape:
            empty = "no pictures: " if tensor.ndim and not tensor.shape[0] else ""
            raise ReferenceMismatchError(
                f"{empty}the feature '{name}' has shape {tuple(tensor.shape)}; wanted (pictures, vectors, dim) with at "
                "least one picture. Give the encoder one picture or more."
            )
    return features


def _concat(x_RVD: torch.Tensor) -> torch.Tensor:
    return rearrange(x_RVD, "r v d -> 1 (r v) d")


def _average(x_RVD: torch.Tensor) -> torch.Tensor:
    return x_RVD.mean(dim=0, keepdim=True)


def _normalised_average(x_RVD: torch.Tensor) -> torch.Tensor:
    length_1V1 = x_RVD.norm(dim=-1, keepdim=True).mean(dim=0, keepdim=True)
    direction_1VD = F.normalize(_average(F.normalize(x_RVD, dim=-1)), dim=-1)
    return direction_1VD * length_1V1


def _per_frame(x_RVD: torch.Tensor) -> torch.Tensor:
    return x_RVD


_COMBINE = dict(zip(COMBINATIONS, (_concat, _average, _normalised_average, _per_frame), strict=True))
