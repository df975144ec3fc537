"""What a kind of reference encoder says of itself; each kind has a file, and `loading` knows them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .base import ReferenceEncoder
from .weights import Shapes


@dataclass(frozen=True)
class EncoderKind:
    """A kind of reference encoder.

    Args:
        name: of the kind.
        title: in messages.
        features: what it gives, by the names that modules read.
        recognises: whether a file holds it, by the tensors' shapes under their names without the prefixes of trainers.
        load: the weights file, or the folder of it, and open_clip's name of the model -> the encoder, on the CPU in float32.
        folder: of ComfyUI's `models` where its files lie; "" where none are expected.
        known_file: a file that is known to work, in words.
        declared_by: name of a file that tells the kind of a folder; "": the tensors do.
    """

    name: str
    title: str
    features: tuple[str, ...]
    recognises: Callable[[Shapes], bool]
    load: Callable[[Path, str | None], ReferenceEncoder]
    folder: str = ""
    known_file: str = ""
    declared_by: str = ""
