"""Encoded references in ``models/emma_references``."""

import os
from pathlib import Path

from ..emma_core.errors import ReferenceFileError
from ..emma_core.reference_features import ReferenceFeatures
from ..emma_core.reference_file import load_reference, save_reference
from .paths import REFERENCE

_SUFFIX = ".safetensors"


def save_named_reference(reference: ReferenceFeatures, name: str) -> str:
    """Save as ``name`` below the first references folder, or as ``name_2``, ...: what is there is never overwritten.

    Returns:
        The name as Load Reference lists it.
    Raises:
        ReferenceFileError: no name, or one that leads out of the folder.
    """
    root = Path(REFERENCE.roots()[0])
    stem = name.strip().replace("\\", "/").removesuffix(_SUFFIX)
    wanted = Path(os.path.normpath(root / stem))
    if not wanted.name or stem.endswith("/") or wanted == root or not wanted.is_relative_to(root):
        raise ReferenceFileError(f"{name!r} cannot be the name of a reference in {root}. Give a file name, with folders below "
                                 "that one if you like: people/ada.")
    wanted.parent.mkdir(parents=True, exist_ok=True)
    path, number = wanted.with_name(wanted.name + _SUFFIX), 1
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}_{number}{_SUFFIX}")
    save_reference(reference, path)
    return path.relative_to(root).as_posix()


def load_named_reference(name: str) -> ReferenceFeatures:
    """A reference by the name that the list shows.

    Raises:
        FileError: no such file, or not such a file.
    """
    return load_reference(REFERENCE.path(name))
