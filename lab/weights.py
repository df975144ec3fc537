"""Weights that are shipped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from emma_core.files.tensor_file import check_finite
from emma_core.files.writing import write_atomically


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write weights atomically.

    Raises:
        FileError: numbers that are not finite.
    """
    check_finite(tensors, path.name)
    ready = {key: value.detach().to("cpu", dtype).contiguous() for key, value in tensors.items()}
    write_atomically(path, lambda temporary: save_file(ready, str(temporary), metadata=dict(metadata or {})))
