"""A short mark of what is in a file or a folder, cheap enough for gigabytes.

Of large files a sample counts: other weights under the same name differ in almost every block.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import EmmaError, FileError
from .plain_file import check_plain_file, is_folder, visible

_WHOLE = 8 << 20  # bytes of files that count whole
_BLOCK, _BLOCKS = 1 << 16, 64
_OF_FOLDERS = (".safetensors", ".sft", ".bin", ".ckpt", ".pt", ".pth", ".json")


def content_mark(path: str | Path, error: type[EmmaError] = FileError) -> str:
    """SHA-256 of a file's size, its first block, and blocks evenly over it; of a folder, of the weights and JSON files in it.

    Raises:
        error: it cannot be read.
    """
    path = Path(path)
    if not is_folder(path):
        return _mark_of(check_plain_file(path, "a file of a run", error), error)
    inside = [file for file in visible(path.rglob("*")) if file.suffix.lower() in _OF_FOLDERS and file.is_file()]
    marks = [f"{file.relative_to(path).as_posix()} {_mark_of(file, error)}" for file in inside]
    return hashlib.sha256("\n".join(marks).encode("utf-8", "surrogateescape")).hexdigest()


def _mark_of(file: Path, error: type[EmmaError]) -> str:
    try:
        size = file.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(file, "rb") as stream:
            if size <= _WHOLE:
                digest.update(stream.read())
            for block in range(_BLOCKS + 1 if size > _WHOLE else 0):
                stream.seek((size - _BLOCK) * block // _BLOCKS)
                digest.update(stream.read(_BLOCK))
    except OSError as found:
        raise error(f"{file} cannot be read ({found.strerror or found}). Check the file and its permissions.") from found
    return digest.hexdigest()
