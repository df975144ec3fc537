"""Picture files of any kind, read as plain RGB or grey, in bounded memory.

Pillow knows formats that start other programs and archives that unfold to a thousand times their size; here only formats that
it decodes itself are opened, and only pictures whose decoding fits beside their file.

Shapes: pictures H x W.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import ImageInputError
from .plain_file import check_plain_file, is_file

MASK_SUFFIX = ".mask.png"
_FORMATS = {
    "PNG": (".png",), "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "MPO": (".mpo",), "WEBP": (".webp",), "BMP": (".bmp",),
    "DIB": (".dib",), "GIF": (".gif",), "TIFF": (".tif", ".tiff"), "AVIF": (".avif",), "HEIF": (".heic", ".heif"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"), "PPM": (".ppm", ".pgm", ".pbm", ".pnm"), "TGA": (".tga",),
}
PICTURE_SUFFIXES = tuple(suffix for suffixes in _FORMATS.values() for suffix in suffixes)
_WHITE, _BLACK = (255, 255, 255, 255), (0, 0, 0, 255)
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_LEVELS_16_PER_8 = 257
# pictures of this size are read whatever their file; larger ones if three times their file and 200 MB suffice
_ALWAYS_PX, _TIMES, _ROOM = 25_000_000, 3, 200_000_000
_BYTES_OF_MODE = {"1": 1, "L": 1, "P": 1}  # of a pixel in Pillow's memory, of the other modes 4, or 2 of 16 bits
# of a picture's copies beside it while it is decoded, measured with Pillow 13
_BYTES_OF_DECODER = {"WEBP": 12, "AVIF": 8, "HEIF": 8, "JPEG2000": 16}
_BYTES_OF_PROGRESSIVE = 6
_ROWS_AT_ONCE = 256
_EXTRAS = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")  # of PNG files: colour profiles and texts, which no one reads here
_MOST_CHUNKS = 100_000
_PNG, _EXIF_AS_TEXT = b"\x89PNG\r\n\x1a\n", b"Raw profile type "
_FAINT = 128  # a mask whose whitest level is darker is one of other levels, such as 0 and 1


class Readable(Protocol):
    """A file, wherever it is: a `Path`, a member of a shard."""

    def read_bytes(self) -> bytes: ...


def open_picture(source: Readable | io.BytesIO) -> Image.Image:
    """RGB in 8 bits, turned as EXIF says; white behind what is transparent.

    Raises:
        ImageInputError: larger than memory allows, transparent everywhere.
        OSError, SyntaxError, ValueError, ...: whatever Pillow raises for a file that it cannot decode.
    """
    return _plain(source, _WHITE, "RGB")


def open_mask(source: Readable | io.BytesIO) -> Image.Image:
    """Grey in 8 bits, turned as EXIF says; black behind what is transparent.

    A faint mask, such as one of levels 0 and 1 in place of 0 and 255, is stretched. Raises as `open_picture`.
    """
    mask = _plain(source, _BLACK, "L")
    whitest = mask.getextrema()[1]
    return mask.point(lambda level: round(level * 255 / whitest)) if 0 < whitest < _FAINT else mask


def picture_size(source: Readable | io.BytesIO) -> tuple[int, int]:
    """Width and height as shown, from the file's header. Raises as `open_picture`, but for damage behind the header."""
    content = _content(source)
    with _opened(content) as opened:
        width_px, height_px = opened.size
        if not _may_be_turned(opened, content):
            return width_px, height_px
        _fit_memory(opened, content)  # in some PNG files the orientation stands behind the pixels
        turned = opened.getexif().get(_ORIENTATION) in _TURNED
    return (height_px, width_px) if turned else (width_px, height_px)


def readable_suffixes() -> frozenset[str]:
    """Endings of the pictures that this Pillow decodes, with its plugins, in small letters."""
    return frozenset(suffix for name in _known_formats() for suffix in _FORMATS[name])


def check_whole(content: bytes) -> None:
    """Raise what Pillow raises for a damaged picture, before it is decoded: its checksums are compared."""
    with _opened(content) as opened:
        opened.verify()


def picture_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB as (1, H, W, 3), grey as (1, H, W), in [0, 1]."""
    levels = np.array(picture, dtype=np.float32)
    levels /= 255
    return torch.from_numpy(levels)[None]


def mask_beside(picture: Path) -> Path | None:
    """The file `<name>.mask.png` of a picture, if there is one."""
    if not picture.name:
        return None
    mask = picture.with_name(picture.stem + MASK_SUFFIX)
    return mask if is_file(mask) else None


def _content(source: Readable | io.BytesIO) -> bytes:
    if isinstance(source, io.BytesIO):
        return source.getvalue()
    if isinstance(source, Path):
        check_plain_file(source, "a picture", ImageInputError)
    return source.read_bytes()


def _opened(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(_without_extras(content)), formats=_known_formats())
    except UnidentifiedImageError:  # it would name the stream
        raise UnidentifiedImageError("cannot identify it as a picture of a known kind") from None


@cache
def _known_formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this Pillow decodes, HEIF through its plugin."""
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _without_extras(content: bytes) -> bytes:
    """A PNG file without colour profile and texts: Pillow refuses large ones, whatever the picture."""
    if not content.startswith(_PNG):
        return content
    kept, view, place = [_PNG], memoryview(content), len(_PNG)
    for _ in range(_MOST_CHUNKS):
        end = place + 12 + int.from_bytes(view[place:place + 4], "big")
        if view[place + 4:place + 8] not in _EXTRAS or content.startswith(_EXIF_AS_TEXT, place + 8):
            kept.append(view[place:end])
        place = end
        if place >= len(content):
            break
    return b"".join([*kept, view[place:]])


def _plain(source: Readable | io.BytesIO, behind: tuple[int, int, int, int], mode: str) -> Image.Image:
    content = _content(source)
    with _opened(content) as picture:
        _fit_memory(picture, content)
        ImageOps.exif_transpose(picture, in_place=True)
        picture.load()
    if picture.mode.startswith("I"):  # 16 bits: Pillow's own conversion cuts them off at 255
        return _by_rows(picture, "L", _in_8_bits).convert(mode)
    if "transparency" not in picture.info and not {"A", "a"} & set(picture.mode):
        return picture if picture.mode == mode else picture.convert(mode)
    if picture.mode[-1] in "Aa" and picture.getchannel(picture.mode[-1]).getextrema()[1] == 0:
        raise ImageInputError("the picture is transparent everywhere, so nothing of it would be seen. Save it without "
                              "transparency, or remove it.")
    return _by_rows(picture, mode, lambda part: _upon(part, behind).convert(mode))


def _fit_memory(picture: Image.Image, content: bytes) -> None:
    """Refuse a picture that takes far more memory than its file; a large JPEG is decoded at half its size instead.

    Raises:
        ImageInputError: what it would take.
    """
    width, height = picture.size
    allowed, needed = _TIMES * len(content) + _ROOM, _bytes_for(picture, content)
    if width * height <= _ALWAYS_PX or needed <= allowed:
        return
    picture.draft(None, (width // 2, height // 2))  # what JPEG alone can
    if picture.size[0] * picture.size[1] > _ALWAYS_PX and _bytes_for(picture, content) > allowed:
        raise ImageInputError(f"the picture is {width} x {height} px, which takes {needed // 1_000_000} MB to read, of a file "
                              f"of {len(content) / 1e6:.1f} MB; wanted {_ALWAYS_PX // 1_000_000} megapixels at most. Save it "
                              "smaller.")


def _bytes_for(picture: Image.Image, content: bytes) -> int:
    """Memory at the worst moment: decoding, turning it, or putting something behind it."""
    own = 2 if picture.mode.startswith("I;16") else _BYTES_OF_MODE.get(picture.mode, 4)
    decoder = _BYTES_OF_PROGRESSIVE if "progressive" in picture.info else _BYTES_OF_DECODER.get(picture.format or "", 0)
    turned = own if _may_be_turned(picture, content) else 0
    changed = 4 if picture.mode != "RGB" else 0
    return picture.size[0] * picture.size[1] * (own + max(decoder, turned, changed))


def _may_be_turned(picture: Image.Image, content: bytes) -> bool:
    """Whether EXIF turns it; of a PNG file, which Pillow decodes to tell, whether there is any."""
    if picture.format == "PNG":
        return b"eXIf" in content or _EXIF_AS_TEXT in content
    return picture.getexif().get(_ORIENTATION, 1) != 1


def _by_rows(picture: Image.Image, mode: str, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The picture changed part by part, so that it is in memory once."""
    width, height = picture.size
    changed = Image.new(mode, picture.size)
    for top in range(0, height, _ROWS_AT_ONCE):
        changed.paste(change(picture.crop((0, top, width, min(height, top + _ROWS_AT_ONCE)))), (0, top))
    return changed


def _in_8_bits(part: Image.Image) -> Image.Image:
    levels = np.asarray(part).astype(np.float64) / _LEVELS_16_PER_8
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def _upon(part: Image.Image, behind: tuple[int, int, int, int]) -> Image.Image:
    shown = Image.new("RGBA", part.size, behind)
    shown.alpha_composite(part.convert("RGBA"))
    return shown
