"""Writing files: whole or not at all, and on the disk before they have their name."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import FileError

_PROBE = bytes(1 << 20)


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Call ``write(temporary_path)``, then put the result, once it is on the disk, in place of ``path``: never half a file.

    Raises:
        FileError: no such folder.
        OSError: the disk is full, or cannot be written; whatever ``write`` raised of it.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileError(f"{path} cannot be written: the folder {path.parent} does not exist. Make it, or choose another.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            write(temporary)
        except (RuntimeError, SafetensorError):  # torch and safetensors hide the system's reason
            with open(temporary, "ab") as stream:
                stream.write(_PROBE)
            raise
        _to_disk(temporary, os.O_RDWR)
        os.replace(temporary, path)
        with suppress(OSError):  # some systems cannot open folders
            _to_disk(path.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


def _to_disk(path: Path, flags: int) -> None:
    """Without this a loss of power may leave the new name with no content."""
    opened = os.open(path, flags)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
