"""Pictures of any shape: looked at, then resized to one of a few sizes of about equal area."""

from __future__ import annotations

import hashlib
import io
import math
import os
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import ImageInputError, TrainingConfigError
from ..files.picture_file import check_whole, open_mask, open_picture, picture_size
from ..files.plain_file import is_file
from .config import DataConfig
from .shards import Source

_LEAST_AREA = 0.75  # of the square's; a shape that only fits with less, or its inverse, is left out
_MOST_SHAPE_ERROR = 0.02  # of log(width / height): what rounding to whole pixels explains
_CROP_AREA, _CROP_SHAPE, _CROP_TRIES, _LEAST_OBJECT = (0.5, 1.0), (3 / 4, 4 / 3), 10, 0.5


@dataclass(frozen=True, slots=True)
class Look:
    """Width and height as shown and SHA-256 of a picture's file, or what is wrong with it."""

    size: tuple[int, int] = (0, 0)
    digest: str = ""
    fault: str = ""


def look_at(source: Source, is_mask: bool = False) -> Look:
    """A picture or a mask, decoded."""
    if not (is_file(source) if isinstance(source, Path) else source.is_file()):
        return Look(fault="is no plain file; check the name" if _exists(source) else "does not exist; check the name")
    try:
        content = source.read_bytes()
        if not content:
            return Look(fault="is empty (0 bytes); get the file again")
        check_whole(content)
        shown = (open_mask if is_mask else open_picture)(io.BytesIO(content))
        if is_mask and not shown.getbbox():
            return Look(fault="is all black, so nothing would be left of the picture; white marks the object to keep")
    except ImageInputError as found:
        return Look(fault=f"cannot be used: {found}")
    except UnidentifiedImageError:
        return Look(fault="is no picture that can be read; save it as PNG or JPEG")
    except Exception as found:  # each of Pillow's formats raises kinds of its own for damage
        return Look(fault=f"cannot be decoded ({found}); get the file again")
    return Look(shown.size, hashlib.sha256(content).hexdigest())


def _exists(source: Source) -> bool:
    return isinstance(source, Path) and os.path.exists(source)


def content_of(source: Source) -> Look:
    """Size and digest of a picture that was decoded before, its size from the header."""
    try:
        content = source.read_bytes()
        return Look(picture_size(io.BytesIO(content)), hashlib.sha256(content).hexdigest())
    except Exception as found:  # each of Pillow's formats raises kinds of its own for damage
        return Look(fault=f"cannot be read any more ({found}); check the file")


def buckets(data: DataConfig) -> tuple[tuple[int, int], ...]:
    """The sizes (width, height) in pixels that pictures are trained at, from tall to wide.

    Raises:
        TrainingConfigError: the resolution is no multiple of the step.
    """
    if data.resolution_px % data.bucket_step_px:
        step = data.bucket_step_px
        nearest = max(step, round(data.resolution_px / step) * step)
        raise TrainingConfigError(f"data.resolution_px = {data.resolution_px} is no multiple of data.bucket_step_px = {step}; "
                                  f"choose {nearest}, or another step.")
    return _buckets(data.resolution_px, data.bucket_step_px, data.longest_shape)


@lru_cache
def _buckets(resolution_px: int, step_px: int, longest_shape: float) -> tuple[tuple[int, int], ...]:
    area = resolution_px**2
    found = {(resolution_px, resolution_px)}
    for short in range(step_px, resolution_px, step_px):
        long = round(area / short / step_px) * step_px
        if long / short <= longest_shape and _LEAST_AREA <= short * long / area <= 1 / _LEAST_AREA:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found, key=lambda size: size[0] / size[1]))


def bucket_of(width_px: int, height_px: int, data: DataConfig) -> tuple[int, int]:
    """The size (width, height) whose shape is nearest to the picture's, by the logarithm of width over height."""
    shape = math.log(width_px / height_px)
    return min(buckets(data), key=lambda size: abs(math.log(size[0] / size[1]) - shape))


def enlargement(width_px: int, height_px: int, size: tuple[int, int]) -> float:
    """The factor by which `fit` scales a picture to ``size``."""
    return max(size[0] / width_px, size[1] / height_px)


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) are of one shape, but for rounding."""
    return abs(math.log(one[0] / one[1]) - math.log(other[0] / other[1])) <= _MOST_SHAPE_ERROR


def fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture or a mask scaled to cover ``size`` (width, height) and cut to it around the centre."""
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def random_crop(
    width_px: int, height_px: int, chance: random.Random, mask_HW: np.ndarray | None = None
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random part: 50 to 100% of the area, its shape 3/4 to 4/3 of the picture's.

    With a mask it shows half of the object at least; where that is not found, it is the whole picture.
    """
    for _ in range(_CROP_TRIES):
        area = chance.uniform(*_CROP_AREA)
        shape = math.exp(chance.uniform(*map(math.log, _CROP_SHAPE)))
        shape = min(max(shape, area), 1 / area)  # neither side is longer than the picture's
        wide, high = max(1, round(width_px * math.sqrt(area * shape))), max(1, round(height_px * math.sqrt(area / shape)))
        left, top = chance.randint(0, width_px - wide), chance.randint(0, height_px - high)
        if mask_HW is None or mask_HW[top:top + high, left:left + wide].sum() >= _LEAST_OBJECT * mask_HW.sum():
            return left, top, left + wide, top + high
    return 0, 0, width_px, height_px
