"""Annotated pictures in COCO's format: boxes as references, segmentations as their masks, captions as prompts.

The layout is that of cocodataset.org's "data format": instances_*.json and captions_*.json.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors import EvaluationError, quoted, short
from ..files.json_file import JsonFault, loads
from ..files.plain_file import is_file, read_text
from .config import PromptsConfig, ReferencesConfig
from .references import ReferencePicture

# polygons are drawn larger and scaled down: Pillow counts the pixels on an edge as inside
_FINER = 4
_HALF = 128
_ROWS_AT_ONCE = 512  # of the picture, so that the larger drawing of any picture fits the memory
_FEWEST_CORNERS, _MOST_CORNERS, _FARTHEST_PX = 3, 100_000, 1_000_000
_FIRST_LETTER, _MOST_BITS = 48, 60  # of compressed run lengths
_MOST_GROUPS, _LETTERS_PER_GROUP = 1_000_000, 12


@dataclass(frozen=True, eq=False)
class Segmentation:
    """COCO's `segmentation` of an annotation: polygons [[x, y, x, y, ...], ...], or run lengths {size, counts}."""

    content: Sequence[Sequence[float]] | Mapping[str, Any]
    name: str

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    def drawn(self, size: tuple[int, int]) -> Image.Image:
        """See `Mask.drawn`.

        Raises:
            EvaluationError: not such a segmentation, or of another size.
        """
        if isinstance(self.content, Mapping):
            return Image.fromarray(self._from_run_lengths(size))
        outlines = self._outlines()
        mask, (width, height) = Image.new("L", size), size
        for top in range(0, height, _ROWS_AT_ONCE):
            rows = min(_ROWS_AT_ONCE, height - top)
            fine = Image.new("L", (width * _FINER, rows * _FINER))
            for outline in outlines:
                ImageDraw.Draw(fine).polygon([(x, y - top * _FINER) for x, y in outline], fill=255)
            mask.paste(fine.reduce(_FINER).point(lambda level: 255 * (level >= _HALF)), (0, top))
        return mask

    def _outlines(self) -> list[list[tuple[int, int]]]:
        """The polygons' corners on the finer grid."""
        try:
            outlines = [[(int(x * _FINER), int(y * _FINER)) for x, y in zip(part[::2], part[1::2], strict=True)]
                        for part in self.content]
            corners = [corner for outline in outlines for corner in outline]
            if any(len(outline) < _FEWEST_CORNERS for outline in outlines):
                raise ValueError(f"one has fewer than {_FEWEST_CORNERS} corners")
            if len(corners) > _MOST_CORNERS or any(abs(number) > _FARTHEST_PX * _FINER for xy in corners for number in xy):
                raise ValueError(f"{len(corners)} corners, or some far outside of the picture")
        except (TypeError, ValueError, OverflowError) as found:
            raise EvaluationError(f"{self.name}: its segmentation holds no polygons ({short(str(found))}). Get the file again."
                                  ) from found
        return outlines

    def _from_run_lengths(self, size: tuple[int, int]) -> np.ndarray:
        """Grey levels (H, W) of runs of 0 and 1 in turn, column by column."""
        stated, counts = self.content.get("size"), self.content.get("counts")
        if stated != [size[1], size[0]]:
            raise EvaluationError(f"{self.name}: its segmentation is of height and width {quoted(stated)}, the picture's are "
                                  f"{(size[1], size[0])}. Get the file again.")
        counts = _unpacked(counts) if isinstance(counts, str) else counts
        if not isinstance(counts, list) or any(type(count) is not int or count < 0 for count in counts):
            raise EvaluationError(f"{self.name}: its segmentation has the run lengths {quoted(counts)}; wanted whole numbers. "
                                  "Get the file again.")
        if sum(counts) != size[0] * size[1]:
            raise EvaluationError(f"{self.name}: the run lengths of its segmentation cover {sum(counts)} pixels of "
                                  f"{size[0] * size[1]}. Get the file again.")
        levels = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return np.ascontiguousarray(levels.reshape(size).T).astype(np.uint8) * 255


def _unpacked(text: str) -> list[int] | None:
    """Run lengths of COCO's compressed form, None if it is none.

    Each character holds five bits of a number, the lowest first, and a sixth that says whether the number goes on; from the
    fourth number on it is the difference to the one before the last.
    """
    counts: list[int] = []
    number, shift = 0, 0
    for letter in text:
        bits = ord(letter) - _FIRST_LETTER
        if not 0 <= bits < 64 or shift > _MOST_BITS:
            return None
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number, shift = 0, 0
    return None if shift else counts


def coco_references(config: ReferencesConfig) -> tuple[list[ReferencePicture], str]:
    """A reference for each annotation of one thing, and in words what was left out.

    Crowds (`iscrowd`) are left out, and boxes with a side below `references.smallest_px`. Objects of one picture are a group;
    the subject is the category's name.

    Raises:
        EvaluationError: not such a file; unknown categories; pictures that are missing; nothing left.
    """
    path, folder = Path(config.coco), Path(config.images)
    content = _read(path, ("images", "annotations", "categories"))
    try:
        images = {entry["id"]: entry for entry in content["images"]}
        categories = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        _check_categories(config.categories, categories.values(), path.name)
        wanted = [entry for entry in content["annotations"]
                  if not config.categories or categories[entry["category_id"]] in config.categories]
        things = [entry for entry in wanted if not entry.get("iscrowd")]
        found = [_reference(entry, images[entry["image_id"]], categories[entry["category_id"]], folder) for entry in things]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as reason:
        raise EvaluationError(f"{path.name} is not in COCO's format ({type(reason).__name__}: {short(str(reason))}). Wanted "
                              "instances with images, annotations (image_id, category_id, bbox) and categories.") from reason
    large = [reference for reference in found if _shorter_side(reference) >= config.smallest_px]
    small = f"{len(found) - len(large)} boxes with a side below {config.smallest_px} px"
    left_out = f"{len(wanted) - len(things)} crowds and {small} are left out"
    if not large:
        raise EvaluationError(f"{path.name} has no annotation to use ({left_out}). Lower references.smallest_px, or choose "
                              "other categories.")
    missing = sorted({reference.path.name for reference in large if not is_file(reference.path)})
    if missing:
        raise EvaluationError(f"{len(missing)} pictures of {path.name} are not in {folder} (such as {missing[0]}). Set "
                              "references.images to their folder, or get them.")
    return large, left_out


def coco_captions(config: PromptsConfig) -> list[str]:
    """The first caption (of lowest id) of each picture, each text once.

    Raises:
        EvaluationError: not such a file, or no caption.
    """
    path = Path(config.captions)
    first: dict[Any, str] = {}
    try:
        for entry in sorted(_read(path, ("annotations",))["annotations"], key=lambda entry: entry["id"]):
            first.setdefault(entry["image_id"], " ".join(entry["caption"].split()))
    except (AttributeError, KeyError, TypeError) as found:
        raise EvaluationError(f"{path.name} is not in COCO's format ({type(found).__name__}: {short(str(found))}). Wanted "
                              "captions with annotations (id, image_id, caption).") from found
    captions = list(dict.fromkeys(caption for caption in first.values() if caption))
    if not captions:
        raise EvaluationError(f"{path.name} holds no caption. Choose a captions_*.json file.")
    return captions


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    text = read_text(path, "annotations in COCO's format", EvaluationError)
    if text.count("[") + text.count("{") > _MOST_GROUPS + len(text) // _LETTERS_PER_GROUP:
        raise EvaluationError(f"{path.name} has more lists and objects than annotations need. Get the file again.")
    try:
        content = loads(text)
    except JsonFault as found:
        raise EvaluationError(f"{path.name} {found}. Get the file again.") from None
    lacking = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        raise EvaluationError(f"{path.name} is not in COCO's format: it has no list of {' and of '.join(lacking)}. Choose "
                              "another file.")
    return content


def _check_categories(wanted, known, name: str) -> None:
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise EvaluationError(f"{name} has no category {unknown[0]!r}; it has {', '.join(sorted(known))}. Correct "
                              "references.categories.")


def _reference(entry: Mapping[str, Any], image: Mapping[str, Any], category: str, folder: Path) -> ReferencePicture:
    file, size = str(image["file_name"]), (int(image["width"]), int(image["height"]))
    if min(size) < 1 or max(size) > _FARTHEST_PX:
        raise ValueError(f"a picture of {size[0]} x {size[1]} px")
    left, top, width, height = map(float, entry["bbox"])
    box = (max(0, math.floor(left)), max(0, math.floor(top)), min(size[0], math.ceil(left + width)),
           min(size[1], math.ceil(top + height)))
    name = f"{file} #{entry['id']} ({category})"
    content = entry.get("segmentation")
    return ReferencePicture(name, file, category, folder / file, box, Segmentation(content, name) if content else None, size)


def _shorter_side(reference: ReferencePicture) -> int:
    left, top, right, bottom = reference.box or (0, 0, 0, 0)
    return min(right - left, bottom - top)
