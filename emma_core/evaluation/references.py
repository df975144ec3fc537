"""Reference pictures and prompts: from a folder and a text file, or from annotated pictures in COCO's format."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

from PIL import Image

from ..errors import EvaluationError, FileError
from ..files.picture_file import (
    MASK_SUFFIX,
    PICTURE_SUFFIXES,
    mask_beside,
    open_mask,
    open_picture,
    picture_size,
    readable_suffixes,
)
from ..files.plain_file import is_folder, read_text, visible
from ..files.tensor_file import sha256_of_file
from .config import SUBJECT, PlanConfig, PromptsConfig, ReferencesConfig

Thing = TypeVar("Thing")


class Mask(Protocol):
    """A mask of a whole picture."""

    @property
    def digest(self) -> str:
        """Of its content."""
        ...

    def drawn(self, size: tuple[int, int]) -> Image.Image:
        """Grey, of the picture's size (width, height), white on the object."""
        ...


@dataclass(frozen=True)
class MaskFile:
    """A mask in a file, scaled to the picture."""

    path: Path

    @cached_property
    def digest(self) -> str:
        return sha256_of_file(self.path)

    def drawn(self, size: tuple[int, int]) -> Image.Image:
        return _decoded(open_mask, self.path).resize(size)


@dataclass(frozen=True)
class ReferencePicture:
    """One reference: a picture, or a part of one; it is read when it is wanted.

    Args:
        name: as results call it: the path relative to the folder, of annotations with their number.
        group: references of one group (a subject, a style, the objects of one COCO picture) are alike: an interval counts them
            as one draw.
        subject: what stands for `{subject}` in prompts.
        path: of the whole picture.
        box: left, top, right, bottom (exclusive) of the part, in pixels.
        mask: of the whole picture.
        size: width and height that the whole picture must have, if that is known.
    """

    name: str
    group: str
    subject: str
    path: Path
    box: tuple[int, int, int, int] | None = None
    mask: Mask | None = None
    size: tuple[int, int] | None = None

    @cached_property
    def digest(self) -> str:
        """Of the file's content, the box, and the mask."""
        mask = self.mask.digest if self.mask else None
        return hashlib.sha256(f"{sha256_of_file(self.path)} {self.box} {mask}".encode()).hexdigest()

    def picture(self) -> Image.Image:
        """RGB.

        Raises:
            EvaluationError: a file that cannot be decoded; a picture of another size than the annotation's.
        """
        whole = _decoded(open_picture, self.path)
        if self.size not in (None, whole.size):
            raise self._other_size(whole.size)
        return whole.crop(self.box) if self.box else whole

    def _other_size(self, found: tuple[int, int]) -> EvaluationError:
        return EvaluationError(f"{self.path.name} is {found[0]} x {found[1]} px, its annotations are for {self.size[0]} x "
                               f"{self.size[1]}. Get the picture that was annotated.")

    def mask_picture(self) -> Image.Image:
        """Grey, of the picture's size.

        Raises:
            EvaluationError: there is no mask, it cannot be decoded, or it is empty.
        """
        if self.mask is None:
            raise EvaluationError(f"{self.name} has no mask, but its background is to be removed. Put <name>{MASK_SUFFIX} "
                                  "beside the picture, or set references.mask to never.")
        size = _decoded(picture_size, self.path)
        if self.size not in (None, size):
            raise self._other_size(size)
        whole = self.mask.drawn(size)
        mask = whole.crop(self.box) if self.box else whole
        if not mask.getbbox():
            raise EvaluationError(f"the mask of {self.name} is all black; white marks the object to keep. Correct it, or "
                                  "remove the picture.")
        return mask


def references_in(config: ReferencesConfig) -> list[ReferencePicture]:
    """The pictures of `references.folder`; the first sub-folder of each is its subject, at the top level its own name.

    Raises:
        EvaluationError: no such folder, no picture in it, or files that are no pictures.
    """
    folder = Path(config.folder)
    if not is_folder(folder):
        raise EvaluationError(f"references.folder = {config.folder!r} is no folder; wanted one with pictures. Check the path.")
    found = [path for path in visible(folder.rglob("*")) if path.suffix.lower() in readable_suffixes()]
    paths = [path for path in found if not path.name.endswith(MASK_SUFFIX)]
    if not paths:
        raise EvaluationError(f"the folder {folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)}). Choose another folder.")
    references = []
    for path in paths:
        _decoded(picture_size, path)
        inside = path.relative_to(folder)
        subject = inside.parts[0] if len(inside.parts) > 1 else path.stem
        group = inside.parts[0] if len(inside.parts) > 1 else inside.as_posix()
        references.append(reference_of(path, inside.as_posix(), group, subject))
    return references


def reference_of(path: Path, name: str = "", group: str = "", subject: str = "") -> ReferencePicture:
    """The picture of a file, with its mask if there is one beside it."""
    mask = mask_beside(path)
    return ReferencePicture(name or path.name, group, subject, path, mask=MaskFile(mask) if mask else None)


def prompts_in(config: PromptsConfig) -> list[str]:
    """The lines of `prompts.file`, each once.

    Raises:
        EvaluationError: no such file, not UTF-8, or no prompt in it.
    """
    try:
        lines = read_text(config.file, "a text file with a prompt a line").splitlines()
    except FileError as found:
        raise EvaluationError(f"prompts.file = {config.file!r} cannot be read: {found}") from found
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise EvaluationError(f"prompts.file = {config.file!r} holds no prompt; wanted one a line. Write some.")
    return prompts


def check_prompts(prompts: Sequence[str], plan: PlanConfig) -> None:
    """Raise EvaluationError if a prompt of the style protocol names a subject: a style has none."""
    naming = [prompt for prompt in prompts if SUBJECT in prompt]
    if plan.protocol == "style" and naming:
        raise EvaluationError(f"the prompt {naming[0]!r} has {SUBJECT}, but plan.protocol is style, where every reference "
                              "gets the same prompts. Set the protocol to portrait or object, or remove it.")


def chosen(things: Sequence[Thing], most: int) -> list[Thing]:
    """At most this many (0: all), drawn evenly, in their order; always the same ones."""
    if not most or len(things) <= most:
        return list(things)
    return [things[index] for index in sorted(random.Random(0).sample(range(len(things)), most))]


def _decoded(read, path: Path):
    try:
        return read(path)
    except Exception as found:  # each of Pillow's formats raises kinds of its own for damage
        raise EvaluationError(f"{path.name} is no picture that can be read ({found}). Save it as PNG or JPEG, or remove it."
                              ) from found
