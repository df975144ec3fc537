"""Encoded references in ``models/emma_references``."""

from pathlib import Path

from ..emma_core.files.reference_file import load_reference, save_reference
from ..emma_core.model.reference_features import ReferenceFeatures
from .naming import free_file
from .paths import REFERENCE

_SUFFIX = ".safetensors"


def save_named_reference(reference: ReferenceFeatures, name: str) -> str:
    """Save as ``name`` below the first references folder, or as ``name_2``, ...: what is there is never overwritten.

    Returns:
        The name as Load Reference lists it.
    Raises:
        FileError: no name, or one that leads out of the folder.
    """
    root = Path(REFERENCE.roots()[0])
    path = free_file(root, name, _SUFFIX)
    save_reference(reference, path)
    return path.relative_to(root).as_posix()


def load_named_reference(name: str) -> ReferenceFeatures:
    """A reference by the name that the list shows.

    Raises:
        FileError: no such file, or not such a file.
    """
    return load_reference(REFERENCE.path(name))
