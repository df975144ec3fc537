"""A labelled sheet of pictures: one row per prompt, references first."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

_CELL_PX, _GAP_PX, _HEAD_PX, _LABEL_PX, _FONT_PX = 160, 12, 40, 26, 17
_TILES_PX = 256
_INK, _FAINT, _PAPER = (30, 30, 30), (120, 120, 120), (255, 255, 255)


@dataclass(frozen=True)
class SheetRow:
    """Pictures (H, W, 3) in [0, 1] of one row, and the words under its first cells."""

    label: str
    pictures: Sequence[torch.Tensor]


def draw_contact_sheet(columns: Sequence[str], rows: Sequence[SheetRow], references: int, footer: str) -> Image.Image:
    """The sheet; the first ``references`` columns are set apart by a line."""
    step = _CELL_PX + _GAP_PX
    width = _GAP_PX + len(columns) * step + _GAP_PX
    height = _HEAD_PX + len(rows) * (step + _LABEL_PX) + _LABEL_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_PX)
    lefts = [_GAP_PX + column * step + (_GAP_PX if column >= references else 0) for column in range(len(columns))]
    for left, title in zip(lefts, columns, strict=True):
        draw.text((left + _CELL_PX // 2, _HEAD_PX // 2), title, fill=_INK, font=font, anchor="mm")
    for index, row in enumerate(rows):
        top = _HEAD_PX + index * (step + _LABEL_PX)
        draw.text((_GAP_PX, top + _LABEL_PX // 2), row.label, fill=_INK, font=font, anchor="lm")
        for left, picture in zip(lefts, row.pictures, strict=True):
            sheet.paste(_cell(picture), (left, top + _LABEL_PX))
            frame = (left - 1, top + _LABEL_PX - 1, left + _CELL_PX, top + _LABEL_PX + _CELL_PX)
            draw.rectangle(frame, outline=(220, 220, 220))
    if references:
        line = lefts[references] - _GAP_PX
        draw.line((line, _HEAD_PX // 2, line, height - _LABEL_PX), fill=_FAINT)
    draw.text((_GAP_PX, height - _LABEL_PX // 2), footer, fill=_FAINT, font=ImageFont.load_default(12), anchor="lm")
    return sheet


def draw_tiles(rows: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """(H, W, 3) in [0, 1]: pictures of any sizes side by side, without a word; H and W are at most _TILES_PX."""
    across = max(map(len, rows))
    side_px = _TILES_PX // max(across, len(rows))
    sheet = Image.new("RGB", (across * side_px, len(rows) * side_px), _PAPER)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            sheet.paste(_cell(picture, side_px), (column * side_px, row * side_px))
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)


def _cell(picture_HW3: torch.Tensor, side_px: int = _CELL_PX) -> Image.Image:
    pixels = (picture_HW3.clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8)
    return ImageOps.pad(Image.fromarray(pixels), (side_px, side_px), Image.Resampling.LANCZOS, _PAPER)
