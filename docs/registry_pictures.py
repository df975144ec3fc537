"""`python docs/registry_pictures.py`: redraws docs/icon.png and docs/banner.png, which the Comfy registry shows.

The registry takes a square icon of at most 400 pixels, and a banner of 21 : 9. Both are made of the first row of docs/demo.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent)]

from lab.demo import ROWS  # noqa: E402

ICON_PX, BANNER_PX = 400, (1260, 540)
PAPER, INK, FAINT, ACCENT = (255, 255, 255), (34, 38, 52), (112, 118, 134), (44, 128, 72)
BACK = (226, 234, 250)
# left, top of the cells of the sheet's first row, and their size
STYLE, FACE, BOTH, CELL_PX = (12, 66), (184, 66), (884, 66), 160


def cell(place: tuple[int, int], size_px: int) -> Image.Image:
    """A picture of the demo's sheet."""
    left, top = place
    picture = Image.open(FOLDER / "demo.png").convert("RGB").crop((left, top, left + CELL_PX, top + CELL_PX))
    return picture.resize((size_px, size_px), Image.Resampling.LANCZOS)


def put(sheet: Image.Image, place: tuple[int, int], left: int, top: int, size_px: int) -> None:
    """A picture as a card with round corners."""
    ring, radius = max(3, size_px // 40), size_px // 10
    mask = Image.new("L", (size_px, size_px))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size_px - 1, size_px - 1), radius, fill=255)
    frame = (left - ring, top - ring, left + size_px + ring - 1, top + size_px + ring - 1)
    ImageDraw.Draw(sheet).rounded_rectangle(frame, radius + ring, fill=INK)
    sheet.paste(cell(place, size_px), (left, top), mask)


def icon() -> Image.Image:
    """A picture, and in front of it the two that it came from."""
    sheet = Image.new("RGB", (ICON_PX, ICON_PX), BACK)
    put(sheet, BOTH, 75, 24, 250)
    put(sheet, STYLE, 30, 236, 134)
    put(sheet, FACE, 236, 236, 134)
    ImageDraw.Draw(sheet).text((200, 303), "+", fill=INK, font=ImageFont.load_default(76), anchor="mm")
    return sheet


def banner() -> Image.Image:
    """What it is, in words and as prompt + style + face = picture."""
    sheet = Image.new("RGB", BANNER_PX, BACK)
    draw = ImageDraw.Draw(sheet)
    draw.text((60, 70), "EMMA", fill=INK, font=ImageFont.load_default(104), anchor="lt")
    draw.text((64, 190), "pictures as part of the prompt, in ComfyUI", fill=FAINT, font=ImageFont.load_default(32), anchor="lt")
    draw.text((64, 372), f'"{ROWS[0].prompt}"', fill=ACCENT, font=ImageFont.load_default(40), anchor="lm")
    for sign, right in (("+", 338), ("+", 566), ("=", 796)):
        draw.text((right, 372), sign, fill=INK, font=ImageFont.load_default(60), anchor="mm")
    for place, left, name in ((STYLE, 374, "style"), (FACE, 602, "face")):
        put(sheet, place, left, 292, 156)
        draw.text((left + 78, 474), name, fill=FAINT, font=ImageFont.load_default(26), anchor="mm")
    put(sheet, BOTH, 842, 104, 358)
    return sheet


if __name__ == "__main__":
    icon().save(FOLDER / "icon.png", optimize=True)
    banner().save(FOLDER / "banner.png", optimize=True)
