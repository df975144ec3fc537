"""Files that users name: they stay in their folder, and none is overwritten."""

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from ..emma_core.errors import FileError
from ..emma_core.files.plain_file import check_new_name
from ..emma_core.files.writing import make_folder


def below(root: Path, name: str) -> Path:
    """A user's name as a path below a folder.

    Raises:
        FileError: no name, one that leads out of the folder, or one that no file can have on some system.
    """
    name = name.strip().replace("\\", "/")
    for part in name.split("/"):
        check_new_name(part)
    wanted = Path(os.path.normpath(root / name))
    if not wanted.name or name.endswith("/") or wanted == root or not wanted.is_relative_to(root):
        raise FileError(f"{name!r} cannot be a name in {root}. Give a name, with folders before it if you like: people/ada.")
    return wanted


def free_file(root: Path, name: str, suffix: str) -> Path:
    """A file that is not there yet, for a user's name with or without the suffix; its folder is made.

    Raises:
        FileError: see `below`; a folder that cannot be made or written.
    """
    wanted = below(root, name.strip().removesuffix(suffix))
    make_folder(wanted.parent)
    return next(path for path in numbered(wanted, suffix) if not path.exists())


def numbered(path: Path, suffix: str = "") -> Iterator[Path]:
    """The path, then ``path_2``, ``path_3``, ..."""
    yield path.with_name(path.name + suffix)
    for number in count(2):
        yield path.with_name(f"{path.name}_{number}{suffix}")
