"""A reference encoder from a file or folder, whatever it is called: recognised by its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import EncoderFileError
from ..files.tensor_file import PICKLE_SUFFIXES, open_tensors, read_weights
from .base import ReferenceEncoder
from .families import CLIP_TOWERS

WEIGHT_SUFFIXES = {".safetensors", ".sft", *PICKLE_SUFFIXES}
OPEN_CLIP_CONFIG = "open_clip_config.json"
# of folders that hold the same weights more than once, in this order
_USUAL_NAMES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
_WHAT = "a reference encoder"
_PLAYGROUND_KEY, _ADAFACE_KEY = "stages.0.down.weight", "input_layer.0.weight"


def load_encoder(path: str | Path, open_clip_model: str | None = None, kind: str | None = None) -> ReferenceEncoder:
    """The encoder of a file, or of a folder as Hugging Face lays it out; on the CPU in float32.

    Args:
        path: .safetensors, a PyTorch file that is opened as weights alone, or a folder with one of these.
        open_clip_model: open_clip's name of the model, where its tensors alone do not tell.
        kind: what `encoder_kind` said of it, if it was asked before.
    Raises:
        EncoderFileError: damaged, of no known kind, or of a kind that needs to be named.
    """
    kind = kind or encoder_kind(path, open_clip_model)
    if kind == "playground":
        from .playground import load_playground_encoder

        return load_playground_encoder(weights_path(path))
    if kind == "adaface":
        from .adaface import load_adaface
        from .face import FaceReferenceEncoder
        from .face_detection import load_face_detector

        return FaceReferenceEncoder(load_adaface(weights_path(path)), load_face_detector)
    if kind == "clip":
        from .clip_vision import load_clip_vision

        return load_clip_vision(weights_path(path))
    from .open_clip_models import load_open_clip_encoder

    return load_open_clip_encoder(path, open_clip_model)


def encoder_kind(path: str | Path, open_clip_model: str | None = None) -> str:
    """"playground", "adaface", "clip" or "open_clip", by key names and shapes; for a safetensors file from its header.

    Raises:
        EncoderFileError: see `load_encoder`.
    """
    path = Path(path)
    if open_clip_model is not None or (path / OPEN_CLIP_CONFIG).is_file():
        return "open_clip"
    shapes = _shapes(weights_path(path))
    names = {key.removeprefix("module.").removeprefix("model.") for key in shapes}
    if _PLAYGROUND_KEY in names:
        return "playground"
    if _ADAFACE_KEY in names:
        return "adaface"
    from .clip_vision import recognise_clip_shapes

    if recognise_clip_shapes(shapes) is not None:
        return "clip"
    if "conv1.weight" in names or any(name.startswith(("visual.", "trunk.")) for name in names):
        return "open_clip"
    raise EncoderFileError(
        f"{path.name} is no encoder that is known here ({_some(names)}). Wanted AdaFace (IR-18, 50, 101), a model of open_clip "
        f"in its own layout, or {'; '.join(tower.describe() for tower in CLIP_TOWERS.values())}. Choose another file; of other "
        "models of Hugging Face (SigLIP, DFN, ...) get the open_clip version."
    )


def weights_path(path: str | Path) -> Path:
    """The weights file itself, of a file or of a folder.

    Raises:
        EncoderFileError: a folder without weights, with a model in parts, or with several models.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in _USUAL_NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in WEIGHT_SUFFIXES)
    if len(found) == 1:
        return found[0]
    raise EncoderFileError(f"the folder {path} holds {len(found)} weight files ({_some(file.name for file in found)}); wanted "
                           f"one, or one named {_USUAL_NAMES[0]}. Choose the file itself.")


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return {key: tuple(tensor.shape) for key, tensor in read_weights(path, _WHAT, EncoderFileError).items()}
    with open_tensors(path, _WHAT, EncoderFileError) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "") or "none"
