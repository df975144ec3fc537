"""The kinds of reference encoder there are, and what each says of itself; `loading` asks them in this order.

A kind is a row here and a file with its `recognises` and `load`, which is imported when it is first used: ComfyUI asks for the
folders while it starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import ReferenceEncoder


@dataclass(frozen=True)
class EncoderKind:
    """A kind of reference encoder.

    Args:
        name: of the kind.
        title: in messages.
        features: what it gives, by the names that modules read.
        home: the file of this package that has its `recognises` and `load`.
        folder: of ComfyUI's `models` where its files lie; "" where none are expected.
        known_file: a file that is known to work, in words.
        declared_by: name of a file that tells the kind of a folder; "": the tensors do.
    """

    name: str
    title: str
    features: tuple[str, ...]
    home: str
    folder: str = ""
    known_file: str = ""
    declared_by: str = ""

    def recognises(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a file holds it, by its tensors' shapes under their names."""
        return import_module(f".{self.home}", __package__).recognises(shapes)

    def load(self, path: Path, open_clip_model: str | None) -> ReferenceEncoder:
        """The encoder of a weights file, or of the folder of it, on the CPU in float32; open_clip's name of the model."""
        return import_module(f".{self.home}", __package__).load(path, open_clip_model)


CLIP = EncoderKind("clip", "CLIP ViT", ("global", "local"), "clip_vision", "clip_vision",
                   "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")
OPEN_CLIP = EncoderKind("open_clip", "a model of open_clip", ("global", "local"), "open_clip_models", "open_clip",
                        declared_by="open_clip_config.json")
ADAFACE = EncoderKind("adaface", "AdaFace (IR-18, 50, 101)", ("face", "face_map", "face_norm"), "adaface", "adaface",
                      "adaface_ir101_webface12m.ckpt")
MINIATURE = EncoderKind("miniature", "the playground's CLIP", ("global", "local", "face"), "miniature")
PLAYGROUND = EncoderKind("playground", "the first world's encoder", ("global", "local", "face"), "playground")
KINDS = (MINIATURE, CLIP, OPEN_CLIP, ADAFACE, PLAYGROUND)


def suggestion(features: Iterable[str]) -> str:
    """Encoders that give all of these features, in words."""
    wanted = set(features)
    known = [kind for kind in KINDS if wanted <= set(kind.features) and kind.known_file]
    return " or ".join(f"{kind.title} ({kind.known_file}, in models/{kind.folder})" for kind in known) or "another encoder"
