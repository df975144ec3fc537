"""A run on disk: checkpoints that resume bit for bit, written atomically, the last few kept."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import TrainingError
from ..files.tensor_file import write_atomically

_NAME = re.compile(r"checkpoint-(\d{8})\.pt")
FORMAT_VERSION = 1


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest ``keep``.

    Raises:
        TrainingError: a number is not finite, or the disk is full; earlier checkpoints are still there.
    """
    path = folder / f"checkpoint-{step:08d}.pt"
    broken = next((name for name, tensor in _tensors(state) if not torch.isfinite(tensor).all()), None)
    if broken:
        raise TrainingError(f"after update {step} the state holds NaN or infinite values ({broken}), so it was not saved; "
                            f"earlier checkpoints are in {folder}. Try a lower rate (train.rate).")
    write_or_explain(path, lambda temporary: torch.save({"format_version": FORMAT_VERSION, **state}, temporary))
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def _tensors(state: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            yield f"{place}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{place}{key} ")


def write_or_explain(path: Path, write) -> None:
    """`write_atomically`, with a full disk explained.

    Raises:
        TrainingError: the disk is full; what stood at ``path`` is still there.
    """
    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as found:  # torch.save reports a short write as a RuntimeError
        full = getattr(found, "errno", None) == errno.ENOSPC or "write" in str(found).lower() or "space" in str(found).lower()
        if not full:
            raise
        raise TrainingError(f"{path.name} could not be written ({found}): the disk is full. Nothing was lost: earlier "
                            f"checkpoints are in {path.parent}. Make room there and start again, the run goes on.") from found


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    return sorted(path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's state, opened as tensors and plain values alone.

    Raises:
        TrainingError: damaged, or of another version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as found:  # torch raises several kinds for a damaged file
        raise TrainingError(f"{path} cannot be read ({type(found).__name__}). Remove it: the run then goes on from the "
                            "checkpoint before it.") from found
    if state.get("format_version") != FORMAT_VERSION:
        raise TrainingError(f"{path} has format version {state.get('format_version')!r}, this version of ComfyUI-EMMA reads "
                            f"{FORMAT_VERSION}. Finish the run with the version that began it.")
    return state
