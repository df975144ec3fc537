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

from ..errors import EvaluationError
from .config import PromptsConfig, ReferencesConfig
from .references import ReferencePicture

# polygons are drawn larger and scaled down: Pillow counts the pixels on an edge as inside
_FINER = 4
_HALF = 128


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
            EvaluationError: not such a segmentation, of another size, or compressed while pycocotools is missing.
        """
        if isinstance(self.content, Mapping):
            return self._from_run_lengths(size)
        try:
            fine = Image.new("L", (size[0] * _FINER, size[1] * _FINER))
            for part in self.content:
                outline = [(x * _FINER, y * _FINER) for x, y in zip(part[::2], part[1::2], strict=True)]
                ImageDraw.Draw(fine).polygon(outline, fill=255)
        except (TypeError, ValueError) as found:
            raise EvaluationError(f"{self.name}: its segmentation holds no polygons ({found}). Get the file again.") from found
        return fine.reduce(_FINER).point(lambda level: 255 * (level >= _HALF))

    def _from_run_lengths(self, size: tuple[int, int]) -> Image.Image:
        counts, stated = self.content.get("counts"), tuple(self.content.get("size", ()))
        if stated != (size[1], size[0]):
            raise EvaluationError(f"{self.name}: its segmentation is of height and width {stated}, the picture's are "
                                  f"{(size[1], size[0])}. Get the file again.")
        if isinstance(counts, str):
            return Image.fromarray(self._uncompressed() * np.uint8(255))
        # runs of 0 and 1 in turn, column by column
        levels = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        if len(levels) != size[0] * size[1]:
            raise EvaluationError(f"{self.name}: the run lengths of its segmentation cover {len(levels)} pixels of "
                                  f"{size[0] * size[1]}. Get the file again.")
        return Image.fromarray(np.ascontiguousarray(levels.reshape(size).T).astype(np.uint8) * 255)

    def _uncompressed(self) -> np.ndarray:
        try:
            from pycocotools import mask
        except ImportError as found:
            raise EvaluationError(f"{self.name}: its segmentation is compressed, which needs the package pycocotools. Install "
                                  "it (pip install pycocotools), or set references.mask to never.") from found
        return mask.decode(dict(self.content))


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
    except (AttributeError, KeyError, TypeError, ValueError) as reason:
        raise EvaluationError(f"{path.name} is not in COCO's format ({type(reason).__name__}: {reason}). Wanted instances "
                              "with images, annotations (image_id, category_id, bbox) and categories.") from reason
    large = [reference for reference in found if _shorter_side(reference) >= config.smallest_px]
    small = f"{len(found) - len(large)} boxes with a side below {config.smallest_px} px"
    left_out = f"{len(wanted) - len(things)} crowds and {small} are left out"
    if not large:
        raise EvaluationError(f"{path.name} has no annotation to use ({left_out}). Lower references.smallest_px, or choose "
                              "other categories.")
    missing = sorted({reference.path.name for reference in large if not reference.path.is_file()})
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
        raise EvaluationError(f"{path.name} is not in COCO's format ({type(found).__name__}: {found}). Wanted captions with "
                              "annotations (id, image_id, caption).") from found
    captions = list(dict.fromkeys(caption for caption in first.values() if caption))
    if not captions:
        raise EvaluationError(f"{path.name} holds no caption. Choose a captions_*.json file.")
    return captions


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as found:
        raise EvaluationError(f"{path} cannot be read ({found.strerror}); wanted annotations in COCO's format. Check the path."
                              ) from found
    except ValueError as found:
        raise EvaluationError(f"{path.name} is not JSON ({found}). Get the file again.") from found
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
    left, top, width, height = map(float, entry["bbox"])
    box = (max(0, math.floor(left)), max(0, math.floor(top)), min(size[0], math.ceil(left + width)),
           min(size[1], math.ceil(top + height)))
    name = f"{file} #{entry['id']} ({category})"
    content = entry.get("segmentation")
    return ReferencePicture(name, file, category, folder / file, box, Segmentation(content, name) if content else None, size)


def _shorter_side(reference: ReferencePicture) -> int:
    left, top, right, bottom = reference.box or (0, 0, 0, 0)
    return min(right - left, bottom - top)
