"""Writing files: whole or not at all, and on the disk before they have their name."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError

from ..errors import WriteError, short
from .plain_file import is_folder

_PROBE = bytes(1 << 20)
_PART, _MOST_SHOWN = ".part", 200
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_REASONS = {
    errno.EACCES: ("there is no permission", "Give permission"), errno.EPERM: ("there is no permission", "Give permission"),
    errno.EROFS: ("the disk is read-only", "Make it writable"), errno.ENAMETOOLONG: ("the name is too long", "Shorten it"),
    errno.ENOTDIR: ("it lies below a file", "Name a folder"), errno.EEXIST: ("a file is in its place", "Name a folder"),
    errno.EISDIR: ("a folder is in its place", "Move it away"),
}


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Call ``write(temporary_path)``, then put the result, once it is on the disk, in place of ``path``: never half a file.

    Raises:
        WriteError: no such folder; the disk is full, or cannot be written; what stood at ``path`` is still there.
    """
    path = Path(path)
    if not is_folder(path.parent):
        raise WriteError(short(str(path), _MOST_SHOWN), f"the folder {short(str(path.parent), _MOST_SHOWN)} does not exist",
                         "Make it, or choose another")
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
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
    except OSError as found:
        raise write_error(path, found) from found
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """What the system says of a file that is written inside, in words.

    Raises:
        WriteError: the file cannot be written.
    """
    try:
        yield
    except OSError as found:
        raise write_error(path, found) from found


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 as `write_atomically`; parts of names that are no text, as some systems have, become question marks."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="replace"))


def write_picture(path: str | Path, picture: Image.Image, **how: Any) -> None:
    """Write a picture as `write_atomically`, in the format of the name's ending, else as PNG."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower(), "PNG")
    write_atomically(path, lambda temporary: picture.save(temporary, kind, **how))


def check_new_folder(path: str | Path, what: str) -> None:
    """Refuse a folder for results that cannot be made, or that nothing can be written in, without making it.

    Args:
        path: of the folder, which may be there.
        what: the setting that names it.
    Raises:
        WriteError: why.
    """
    path = Path(path)
    try:
        with suppress(FileNotFoundError):
            os.lstat(path)  # refuses names that cannot be
        above = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not above.is_dir():
            raise FileExistsError(errno.EEXIST, "")
        with tempfile.TemporaryFile(dir=above) as stream:
            stream.write(_PROBE[:1])
    except (OSError, ValueError) as found:
        raise write_error(path, found, what) from found


def make_folder(path: str | Path) -> Path:
    """A folder for results, and those above it, made unless it is there.

    Raises:
        WriteError: it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as found:
        raise write_error(path, found) from found
    return Path(path)


def write_error(path: str | Path, found: OSError | ValueError, what: str = "") -> WriteError:
    """What the system said, in words."""
    number = getattr(found, "errno", None)
    reason, remedy = getattr(found, "strerror", None) or str(found), "Make it possible to write there, or name another place"
    if number in _FULL:
        reason, remedy = "the disk is full", "Make room there"
    elif number in _REASONS:
        reason, remedy = _REASONS[number]
        remedy += ", or name another place"
    named = f"{what} = " if what else ""
    return WriteError(f"{named}{short(str(path), _MOST_SHOWN)}", reason, remedy, number in _FULL)


def remove_parts(folder: Path) -> None:
    """Remove what killed writers left half written in a folder, and those in it, that no other process writes to."""
    for path in folder.rglob(f".*{_PART}"):
        path.unlink(missing_ok=True)


def _to_disk(path: Path, flags: int) -> None:
    """Without this a loss of power may leave the new name with no content."""
    opened = os.open(path, flags)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
