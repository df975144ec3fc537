"""Picture files of any kind, read as plain RGB or grey.

Shapes: pictures H x W.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MASK_SUFFIX = ".mask.png"
_WHITE, _BLACK = (255, 255, 255, 255), (0, 0, 0, 255)
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_LEVELS_16_PER_8 = 257


class Readable(Protocol):
    """A file, wherever it is: a `Path`, a member of a shard."""

    def read_bytes(self) -> bytes: ...


def open_picture(source: Readable | io.BytesIO) -> Image.Image:
    """RGB in 8 bits, turned as EXIF says; white behind what is transparent.

    Raises:
        OSError, SyntaxError, ValueError: whatever Pillow raises for a file that it cannot decode.
    """
    return _plain(source, _WHITE).convert("RGB")


def open_mask(source: Readable | io.BytesIO) -> Image.Image:
    """Grey in 8 bits, turned as EXIF says; black behind what is transparent. Raises as `open_picture`."""
    return _plain(source, _BLACK).convert("L")


def picture_size(source: Readable | io.BytesIO) -> tuple[int, int]:
    """Width and height as shown, from the file's header."""
    with Image.open(_stream(source)) as opened:
        width_px, height_px = opened.size
        turned = opened.getexif().get(_ORIENTATION) in _TURNED
    return (height_px, width_px) if turned else (width_px, height_px)


def picture_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB as (1, H, W, 3), grey as (1, H, W), in [0, 1]."""
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)[None]


def mask_beside(picture: Path) -> Path | None:
    """The file `<name>.mask.png` of a picture, if there is one."""
    mask = picture.with_name(picture.stem + MASK_SUFFIX)
    return mask if mask.is_file() else None


def _stream(source: Readable | io.BytesIO) -> io.BytesIO:
    return source if isinstance(source, io.BytesIO) else io.BytesIO(source.read_bytes())


def _plain(source: Readable | io.BytesIO, behind: tuple[int, int, int, int]) -> Image.Image:
    with Image.open(_stream(source)) as opened:
        picture = ImageOps.exif_transpose(opened)
        picture.load()
    if picture.mode.startswith("I"):  # 16 bits: Pillow's own conversion cuts them off at 255
        levels = np.asarray(picture).astype(np.float64) / _LEVELS_16_PER_8
        return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if "transparency" not in picture.info and not {"A", "a"} & set(picture.mode):
        return picture
    shown = Image.new("RGBA", picture.size, behind)
    shown.alpha_composite(picture.convert("RGBA"))
    return shown
