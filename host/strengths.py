"""Strengths that change: lists of numbers as schedule nodes give them, and the host's hook keyframes."""

import math
from collections.abc import Iterable
from typing import Any

import comfy.hooks
import torch

from ..emma_core.errors import ReferenceMismatchError
from ..emma_core.model.strength_keyframes import StrengthKeyframe, StrengthKeyframes


def changing_strength(strength: float, strengths: Any) -> tuple[float | torch.Tensor, StrengthKeyframes]:
    """``strength`` times what is wired: for each frame, and over the sampling.

    Args:
        strength: of the whole.
        strengths: a number; numbers, one per frame (list, array, tensor); HOOK_KEYFRAMES; or None.
    Returns:
        A float or (frames,), and keyframes.
    Raises:
        ReferenceMismatchError: not numbers, or none.
    """
    if strengths is None:
        return strength, StrengthKeyframes()
    if isinstance(strengths, comfy.hooks.HookKeyframeGroup):
        return strength, StrengthKeyframes([
            StrengthKeyframe(float(keyframe.start_percent), float(keyframe.strength), keyframe.guarantee_steps)
            for keyframe in strengths.keyframes
        ])
    factors = [strength * factor for factor in _numbers(strengths)]
    return factors[0] if len(factors) == 1 else torch.tensor(factors), StrengthKeyframes()


def _numbers(strengths: Any) -> list[float]:
    if isinstance(strengths, str) or not isinstance(strengths, Iterable):
        strengths = [strengths]
    elif isinstance(strengths, torch.Tensor):
        strengths = strengths.flatten()
    numbers = []
    for frame, found in enumerate(strengths):
        number = _number(found)
        if not math.isfinite(number):
            raise ReferenceMismatchError(f"the strength of frame {frame} is {found}; wanted a finite number. Wire one number, "
                                         "a list with one per frame, or hook keyframes into strengths.")
        numbers.append(number)
    if not numbers:
        raise ReferenceMismatchError("the list of strengths is empty; wanted one number for each frame, or a single one. Check "
                                     "the node that makes it.")
    return numbers


def _number(found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError):
        return math.nan
