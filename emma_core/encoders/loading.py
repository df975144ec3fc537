"""A reference encoder from a file or folder, whatever it is called: recognised by its tensors, among all kinds there are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import EncoderFileError
from .base import ReferenceEncoder
from .families import CLIP_TOWERS
from .kinds import ADAFACE, KINDS, OPEN_CLIP, EncoderKind, suggestion
from .weights import shapes_in, some, weights_path


def load_encoder(path: str | Path, open_clip_model: str | None = None) -> ReferenceEncoder:
    """The encoder of a file, or of a folder as Hugging Face lays it out; on the CPU in float32.

    Args:
        path: .safetensors, a PyTorch file that is opened as weights alone, or a folder with one of these.
        open_clip_model: open_clip's name of the model, where its tensors alone do not tell.
    Raises:
        EncoderFileError: damaged, of no known kind, or of a kind that needs to be named.
    """
    return encoder_kind(path, open_clip_model).load(Path(path), open_clip_model)


def load_encoders(paths: Iterable[str | Path], open_clip_model: str | None = None) -> list[ReferenceEncoder]:
    """Several encoders, as `load_encoder`; the name is for those among them that open_clip made.

    Raises:
        EncoderFileError: see `load_encoder`.
    """
    encoders = []
    for path in paths:
        kind = encoder_kind(path)
        encoders.append(kind.load(Path(path), open_clip_model if kind is OPEN_CLIP else None))
    return encoders


def encoder_kind(path: str | Path, open_clip_model: str | None = None) -> EncoderKind:
    """One of `KINDS`: open_clip where its name is given, else what a folder declares, else by key names and shapes.

    Raises:
        EncoderFileError: see `load_encoder`.
    """
    path = Path(path)
    if open_clip_model is not None:
        return OPEN_CLIP
    for kind in KINDS:
        if kind.declared_by and (path / kind.declared_by).is_file():
            return kind
    shapes = shapes_in(weights_path(path))
    for kind in KINDS:
        if kind.recognises(shapes):
            return kind
    raise EncoderFileError(
        f"{path.name} is no encoder that is known here ({some(shapes)}). Wanted {ADAFACE.title}, a model of open_clip "
        f"in its own layout, or {'; '.join(tower.describe() for tower in CLIP_TOWERS.values())}. Choose another file; of other "
        "models of Hugging Face (SigLIP, DFN, ...) get the open_clip version."
    )


def check_gives(path: str | Path, features: Iterable[str], open_clip_model: str | None = None) -> None:
    """Refuse a file of a kind that does not give these features, before its weights are read.

    Raises:
        EncoderFileError: what it gives, and which kinds do; see `load_encoder`.
    """
    kind = encoder_kind(path, open_clip_model)
    missing = [name for name in features if name not in kind.features]
    if missing:
        raise EncoderFileError(f"{Path(path).name} is {kind.title}, which gives {', '.join(kind.features)}; wanted an encoder "
                               f"that gives {', '.join(missing)}. Choose {suggestion(features)}.")
