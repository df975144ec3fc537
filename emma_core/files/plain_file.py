"""Files as they are opened first: there, plain, of a size that can be what is wanted."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ..errors import EmmaError, FileError, short

PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pt", ".pth"})
WEIGHT_SUFFIXES = frozenset({".safetensors", ".sft", *PICKLE_SUFFIXES})
_LONGEST_NAME, _MOST_LISTED = 200, 5
_NO_LETTERS = '<>:"|?*\\/'
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$",
            *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10))}
_CONFIGURATIONS = (".json", ".yaml")
_KINDS = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


def is_file(path: Path) -> bool:
    """Whether a plain file is there; no name is too odd to ask."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # names that no file can have
        return False


def is_folder(path: Path) -> bool:
    """As `is_file`, of a folder."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_there(path: str | Path) -> bool:
    """As `is_file`, of anything."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def is_plain_name(name: object) -> bool:
    """Whether a name that a file gives can be that of another file beside it, and nowhere else."""
    return (isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\:")
            and len(name) <= _LONGEST_NAME)


def check_new_name(name: str, error: type[EmmaError] = FileError) -> None:
    """Refuse a name for a new file or folder that is none on Windows, where shared graphs and runs may go; "" is passed over.

    Raises:
        error: what about the name cannot be.
    """
    odd = sorted({letter for letter in name if letter in _NO_LETTERS or not letter.isprintable()})
    if odd:
        raise error(f"{short(repr(name))} cannot be a file's name: it has {' '.join(map(repr, odd[:_MOST_LISTED]))}, which "
                    "Windows does not allow. Use letters, digits, spaces, dots and dashes.")
    if name.split(".")[0].strip().upper() in _DEVICES:
        raise error(f"{short(repr(name))} cannot be a file's name: on Windows it is a device. Choose another.")
    if name not in ("", ".", "..") and name[-1] in ". ":
        raise error(f"{short(repr(name))} cannot be a file's name: it ends with a dot or a space, which Windows drops. Choose "
                    "another.")
    if len(name.encode("utf-8")) > _LONGEST_NAME:
        raise error(f"{short(repr(name))} is too long for a file's name: {len(name.encode('utf-8'))} bytes of {_LONGEST_NAME} "
                    "at most. Shorten it.")


def visible(paths: Iterable[Path]) -> list[Path]:
    """In order, without hidden ones: Macs put a `._x` beside each `x`, which holds none of it."""
    return sorted(path for path in paths if not path.name.startswith("."))


def check_plain_file(path: str | Path, what: str, error: type[EmmaError] = FileError) -> Path:
    """``path`` as a Path if it is a plain file: reading a pipe or a device may never end.

    Args:
        path: the file.
        what: what the file should hold, for the messages ("an ELLA connector").
        error: exception type to raise.
    Raises:
        error: no such file, a folder, a pipe, a device, a name that no file can have, no permission.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise error(f"{path} does not exist; wanted {what}. Check the path or put the file there.") from None
    except (OSError, ValueError) as found:  # ValueError of a NUL in the name
        reason = getattr(found, "strerror", None) or found
        raise error(f"{path} cannot be opened ({reason}); wanted {what}. Check the path and its permissions.") from None
    if stat.S_ISDIR(mode):
        raise error(f"{path} is a folder; wanted the file of {what}. Choose a file inside it.")
    if not stat.S_ISREG(mode):
        kind = next((kind for check, kind in _KINDS if check(mode)), "no plain file")
        raise error(f"{path} is {kind}; wanted {what}. Choose a plain file.")
    return path


def state_of(path: str | Path) -> str:
    """A text that changes when a file is replaced, whatever its new date; of a folder, when any file in it is.

    Configurations beside a file (.json, .yaml) count, as loaders read them with it. A path that is not there has a state too.
    """
    path = Path(path)
    try:
        if path.is_dir():
            files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
        else:
            files = [path, *(file for file in path.parent.iterdir() if file.suffix.lower() in _CONFIGURATIONS)]
        about = [f"{file} {_stat(file)}" for file in sorted(files)]
    except OSError as found:
        return f"{path} {type(found).__name__}"
    return hashlib.sha256("\n".join(about).encode("utf-8", "surrogateescape")).hexdigest()


def _stat(file: Path) -> str:
    # the time of the inode's change too, as copying tools set the other back
    status = os.stat(file)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def read_bytes(path: str | Path, what: str, error: type[EmmaError] = FileError, most: int | None = None) -> bytes:
    """The content of a plain file of ``most`` bytes at most. Raises as `check_plain_file`, and for more bytes."""
    path = check_plain_file(path, what, error)
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if most is not None and size > most:
                raise error(f"{path.name} holds {size:,} bytes; {what} has {most:,} at most. Choose another file.")
            return stream.read() if most is None else stream.read(most)
    except OSError as found:
        raise error(f"{path} cannot be read ({found.strerror or found}); wanted {what}. Check the file and its permissions."
                    ) from found


def read_text(path: str | Path, what: str, error: type[EmmaError] = FileError, most: int | None = None) -> str:
    """The text of a plain file in UTF-8, with or without a byte order mark. Raises as `read_bytes`, and for other bytes."""
    try:
        return read_bytes(path, what, error, most).decode("utf-8-sig")
    except UnicodeDecodeError as found:
        raise error(f"{Path(path).name} is not UTF-8 (byte {found.start}); wanted {what}. Save it as UTF-8.") from None
