"""Folders of pictures below the host's input folder, as combos list them; light, as every start of ComfyUI asks."""

import hashlib
import os
from pathlib import Path

import folder_paths

from ..emma_core.errors import TrainingDataError
from ..emma_core.files.picture_file import PICTURE_SUFFIXES

WIRED = "wired pictures"


def folder_names() -> list[str]:
    """Folders that hold pictures, or folders of pictures; `WIRED` before them."""
    top = Path(folder_paths.get_input_directory())
    found: dict[str, None] = {}
    for name, _, files in os.walk(top, followlinks=True):
        folder = Path(name).relative_to(top)
        if folder.parts and not any(part.startswith(".") for part in folder.parts) and any(
                Path(file).suffix.lower() in PICTURE_SUFFIXES for file in files):
            found |= dict.fromkeys(part.as_posix() for part in (folder, *folder.parents) if part.parts)
    return [WIRED, *sorted(found, key=str.lower)]


def folder_path(name: str) -> Path:
    """Where a folder of `folder_names` lies.

    Raises:
        TrainingDataError: there is none of this name with pictures.
    """
    if name == WIRED or name not in folder_names():
        raise TrainingDataError(f"there is no folder {name!r} with pictures below {folder_paths.get_input_directory()}. Put "
                                "it there, and press R in the editor.")
    return Path(folder_paths.get_input_directory(), name)


def folder_state(name: str) -> str:
    """What changes when a file of the folder does, for `fingerprint_inputs`."""
    try:
        top = folder_path(name)
    except TrainingDataError:
        return ""
    digest = hashlib.sha256()
    for path in sorted(path for path in top.rglob("*") if path.is_file()):
        stat = path.stat()
        digest.update(f"{path.relative_to(top)} {stat.st_size} {stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
