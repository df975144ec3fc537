"""The playground's reference encoder: the CLIP vision tower of SD1.5 in miniature, whose embedding stands for a face's too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from .clip_vision import ClipVisionEncoder, clip_family, load_clip_vision
from .options import EncodeOptions
from .weights import weights_path

FAMILY = "clip-miniature"


class MiniatureEncoder(ClipVisionEncoder):
    """`global` and `local` as CLIP's; `face` (B, 1, D) is `global` again: it has no face recognition beside it."""

    feature_names = (*ClipVisionEncoder.feature_names, "face")

    def features_of(self, seen_B3SS: torch.Tensor, options: EncodeOptions) -> dict[str, torch.Tensor]:
        features = super().features_of(seen_B3SS, options)
        return {**features, "face": features["global"]}


def recognises(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these are its tensors."""
    return clip_family(shapes) == FAMILY


def load(path: Path, open_clip_model: str | None = None) -> MiniatureEncoder:
    """As `load_clip_vision`.

    Raises:
        EncoderFileError: see there.
    """
    clip = load_clip_vision(weights_path(path))
    return MiniatureEncoder(clip.model, clip.description["family"], clip.description["fingerprint"])
