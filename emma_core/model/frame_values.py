"""Numbers that change over the frames of a video: from keyframes in a text, or from one end to the other."""

import math
import re
from collections.abc import Mapping
from itertools import pairwise

from ..errors import TextInputError

INTERPOLATIONS = ("linear", "ease", "hold")

_EXAMPLE = "0: 0.0, 12: 1.0"
_KEYFRAME = re.compile(r"(\d{1,9})\s*:\s*\(?\s*([^\s()]+)\s*\)?")


def parse_keyframes(text: str) -> dict[int, float]:
    """``"0: 0.0, 12: 1.0"`` as {frame: value}, in the order of the frames; brackets around values and new lines are fine.

    Raises:
        TextInputError: no keyframes, a part that is not ``frame: value``, a value that is no number, a frame twice.
    """
    keyframes: dict[int, float] = {}
    for part in filter(None, (part.strip() for part in re.split(r"[,;\n]", text))):
        found = _KEYFRAME.fullmatch(part)
        value = _number(found[2]) if found else math.nan
        if not found or not math.isfinite(value):
            raise TextInputError(f"the keyframe {part!r} cannot be read; wanted a frame and a number, as in {_EXAMPLE!r}. "
                                 "Frames count from 0; keyframes are divided by commas.")
        if int(found[1]) in keyframes:
            raise TextInputError(f"the keyframe {part!r} names frame {int(found[1])} a second time. Remove one of the two.")
        keyframes[int(found[1])] = value
    if not keyframes:
        raise TextInputError(f"there are no keyframes; wanted frames and numbers, as in {_EXAMPLE!r}. Write at least one.")
    return dict(sorted(keyframes.items()))


def values_over_frames(keyframes: Mapping[int, float], frames: int, interpolation: str) -> list[float]:
    """One value for each frame; before the first keyframe its value, after the last one its.

    Args:
        keyframes: {frame: value}, in the order of the frames.
        frames: how many; keyframes behind the last frame are only aimed at.
        interpolation: "linear", "ease" (slow at both keyframes), "hold" (the value stays until the next keyframe).
    """
    places = list(keyframes)
    values = [keyframes[places[0]] if frame < places[0] else keyframes[places[-1]] for frame in range(frames)]
    for first, last in pairwise(places):
        for frame in range(first, min(last, frames)):
            share = _SHARES[interpolation]((frame - first) / (last - first))
            # so that both ends are exact
            values[frame] = keyframes[first] * (1.0 - share) + keyframes[last] * share
    return values


def values_between(start: float, end: float, frames: int, interpolation: str) -> list[float]:
    """From ``start`` at the first frame to ``end`` at the last; a single frame has ``start``."""
    return values_over_frames({0: start, **({frames - 1: end} if frames > 1 else {})}, frames, interpolation)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


_SHARES = dict(zip(INTERPOLATIONS, (lambda x: x, lambda x: (1.0 - math.cos(math.pi * x)) / 2.0, lambda x: 0.0), strict=True))
