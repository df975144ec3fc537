"""A run on disk: checkpoints that resume bit for bit, written atomically, with a sum of their bytes, the last few kept.

A checkpoint is PyTorch's archive, its larger tensors packed (see `packing`), followed by `_SUMMED` and the SHA-256 of all
before it. The archive itself says that a sum follows, so that a damaged end is no checkpoint of the time before sums.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import EmmaError, TrainingError, WriteError
from ..files.plain_file import check_plain_file, is_folder
from ..files.pytorch_file import describe_pytorch_file
from ..files.writing import write_atomically
from .packing import packed, unpacked

_NAME = re.compile(r"checkpoint-(\d{8})\.pt")
FORMAT_VERSION = 2  # 1: nothing is packed
_SUMMED = b"EMMA SHA-256 of all before: "
_BLOCK = 1 << 20
_END = len(_SUMMED) + hashlib.sha256().digest_size
_MOST_INSTRUCTIONS = 100_000_000  # the order of the pictures in an epoch stands in it, a number each
_KINDS = {"step": int, "seconds": (int, float), "learning": dict, "optimizer": dict, "draws": dict, "average": dict,
          "scaler": dict, "run": dict}

_PACKED = ("learning", "average", "optimizer")


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
    kept = {**state, **packed({key: state[key] for key in _PACKED}, {"average": state["learning"]})}
    write_or_explain(path, lambda temporary: _write({"format_version": FORMAT_VERSION, **kept, "summed": True}, temporary))
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def _tensors(state: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            yield f"{place}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{place}{key} ")


def write_or_explain(path: Path, write: Callable[[Path], Any]) -> None:
    """`write_atomically`, with a disk that takes no more explained.

    Raises:
        TrainingError: the disk is full, or cannot be written; what stood at ``path`` is still there.
    """
    try:
        write_atomically(path, write)
    except WriteError as found:
        raise TrainingError(f"{path.name} could not be written: {found.reason}. Nothing was lost: earlier checkpoints are in "
                            f"{path.parent}. {found.remedy}, and start again: the run goes on.") from found


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    if not is_folder(folder):
        return []
    return sorted(path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name))


def last_step(folder: Path) -> int:
    """The update of the newest checkpoint, by its name; 0 where there is none."""
    found = checkpoints(folder)
    return int(found[-1].stem.removeprefix("checkpoint-")) if found else 0


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's state, opened as tensors and plain values alone, compared with the sum of its bytes.

    Raises:
        TrainingError: no plain file, damaged, or of another version; the newest one before it that is whole is named.
    """
    try:
        return _read(path)
    except _Damaged as found:
        raise TrainingError(f"{path} cannot be read ({found}). Remove it: {_before(path)}.") from found


class _Damaged(EmmaError):
    """What is wrong with a checkpoint's bytes."""


def _write(state: Mapping[str, Any], path: Path) -> None:
    torch.save(state, path)
    digest = _sha256(path, path.stat().st_size)
    with open(path, "ab") as stream:
        stream.write(_SUMMED + digest)


def _read(path: Path) -> dict[str, Any]:
    check_plain_file(path, "a checkpoint of a training run", _Damaged)
    summed = _check_sum(path)
    describe_pytorch_file(path, "a checkpoint of a training run", _Damaged, _MOST_INSTRUCTIONS)  # before any of it is believed
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as found:  # torch raises several kinds for a damaged file
        raise _Damaged(type(found).__name__) from found
    if not isinstance(state, dict):
        raise _Damaged(f"it holds {type(state).__name__}, no training state")
    if state.pop("summed", False) and not summed:
        raise _Damaged("the sum at its end is damaged")
    if state.get("format_version") not in range(1, FORMAT_VERSION + 1):
        raise TrainingError(f"{path} has format version {state.get('format_version')!r}, this version of ComfyUI-EMMA reads "
                            f"1 to {FORMAT_VERSION}. Finish the run with the version that began it.")
    wrong = next((key for key, kind in _KINDS.items() if not isinstance(state.get(key), kind)), None)
    if wrong:
        raise _Damaged(f"its {wrong} is {type(state.get(wrong)).__name__}")
    try:
        learning = unpacked(state["learning"])
        return {**state, "learning": learning, "average": unpacked(state["average"], learning),
                "optimizer": unpacked(state["optimizer"])}
    except ValueError as found:
        raise _Damaged(str(found)) from found


def _check_sum(path: Path) -> bool:
    """Whether a sum stands at the end of the file, and is right."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            stream.seek(max(0, size - _END))
            end = stream.read()
        if not end.startswith(_SUMMED):
            return False
        if _sha256(path, size - _END) != end[len(_SUMMED):]:
            raise _Damaged("its bytes differ from those that were written: their sum is another")
    except OSError as found:
        raise _Damaged(found.strerror or str(found)) from found
    return True


def _sha256(path: Path, nbytes: int) -> bytes:
    """Of the first ``nbytes`` of a file."""
    digest, left = hashlib.sha256(), nbytes
    with open(path, "rb") as stream:
        while left > 0 and (block := stream.read(min(left, _BLOCK))):
            digest.update(block)
            left -= len(block)
    return digest.digest()


def _before(path: Path) -> str:
    """What a run does without this checkpoint."""
    for older in reversed([other for other in checkpoints(path.parent) if other.name < path.name]):
        try:
            _read(older)
        except (_Damaged, TrainingError):
            continue
        return f"the run then goes on from {older.name}, the one before it, which is whole"
    return "there is no whole one before it, so the run then begins anew"
