"""EMMA modules as files in the host's folder.

Shapes: a picture is (H, W, 3).
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..emma_core.drawing import thumbnails
from ..emma_core.files.module_file import save_module
from .images import rgb_pictures
from .loaded import LoadedModule
from .naming import free_file
from .paths import MODULE

_SUFFIX = ".safetensors"


def save_named_module(module: LoadedModule, name: str, entries: Mapping[str, str], thumbnail: torch.Tensor | None) -> str:
    """Save as ``name`` below the first folder of modules, or as ``name_2``, ...: what is there is never overwritten.

    Args:
        module: EMMA_MODULE; its metadata is kept.
        name: file name, folders allowed.
        entries: title, author, license; what is empty leaves the module's own.
        thumbnail: IMAGE whose first picture stands in the metadata, or None.
    Returns:
        The name as Load EMMA Module lists it.
    Raises:
        FileError: no name, or one that leads out of the folder.
        ImageInputError: unusable thumbnail.
    """
    root = Path(MODULE.roots()[0])
    metadata = {f"modelspec.{key}": value.strip() for key, value in entries.items() if value.strip()}
    if thumbnail is not None:
        metadata[thumbnails.KEY] = thumbnails.data_uri(rgb_pictures(thumbnail)[0])
    path = free_file(root, name, _SUFFIX)
    save_module(module.module, path, torch.float16, metadata)
    return path.relative_to(root).as_posix()
