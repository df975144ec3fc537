"""Files and folders of encoder weights, as they are published and downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import EncoderFileError, short
from ..files.plain_file import WEIGHT_SUFFIXES, visible
from ..files.tensor_file import open_weights

# of folders that hold the same weights more than once, in this order
_USUAL_NAMES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
_WHAT = "a reference encoder"
Shapes = Mapping[str, tuple[int, ...]]


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
    found = [file for file in visible(path.iterdir()) if file.suffix.lower() in WEIGHT_SUFFIXES]
    if len(found) == 1:
        return found[0]
    raise EncoderFileError(f"the folder {path} holds {len(found)} weight files ({some(file.name for file in found)}); wanted "
                           f"one, or one named {_USUAL_NAMES[0]}. Choose the file itself.")


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's tensors by key; no numbers are read.

    Raises:
        EncoderFileError: missing, damaged, a pickle that holds more than tensors.
    """
    with open_weights(path, _WHAT, EncoderFileError) as file:
        return file.shapes


def some(names: Iterable[str], most: int = 3) -> str:
    """The first names of many, in words."""
    listed = sorted(names)
    return ", ".join(map(short, listed[:most])) + (f" and {len(listed) - most} more" if len(listed) > most else "") or "none"
