"""A cache of tensors on disk: safetensors shards, found by content keys, checked when read, for several processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..errors import EmmaWarning, FileError, TrainingError, WriteError, short
from ..files.json_file import parse_json, read_json
from ..files.tensor_file import TensorFile, open_tensors
from ..files.writing import make_folder, write_atomically

MOST_OPEN = 64
FLUSH_ENTRIES = 64
_ENDING = ".safetensors"


@dataclass(frozen=True)
class _Entry:
    """Where an entry is and what it must be: its shard, tensor names, bytes, and SHA-256."""

    shard: Path
    names: tuple[str, ...]
    nbytes: int
    sha256: str


class FeatureStore:
    """Entries, key -> {name: tensor}, of one kind of ``settings``; other settings live in another sub-folder."""

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], most_open: int = MOST_OPEN):
        """
        Args:
            folder: of all caches; the settings' own sub-folder is made in it.
            settings: JSON values; everything but the key that the tensors depend on.
            most_open: shards kept open.
        Raises:
            TrainingError: the folder cannot be written, or its settings are not those of its name.
        """
        text = json.dumps(settings, sort_keys=True, indent=1)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._most_open = most_open
        self._index: dict[str, _Entry] = {}
        self._known: set[Path] = set()
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._sound: set[str] = set()
        self._check_settings(text)
        self._scan()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without an entry, each once, in order; what other processes wrote meanwhile counts."""
        self._scan()
        return [key for key in dict.fromkeys(keys) if key not in self._index]

    def nbytes(self, keys: Iterable[str]) -> int:
        """Bytes of the tensors of known entries."""
        return sum(self._index[key].nbytes for key in set(keys) if key in self._index)

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """An entry's tensors, read from the disk; compared with its checksum the first time.

        Raises:
            TrainingError: no such entry, or its shard is damaged: it is set aside, and its entries are missing then.
        """
        if key not in self._index:
            raise TrainingError(f"the cache {self.folder} has no entry {key}. Start the run again: it is computed then.")
        entry = self._index[key]
        try:
            shard = self._shard(entry.shard)
            tensors = {name: shard.tensor(f"{key}/{name}").clone() for name in entry.names}
        except (FileError, OSError, KeyError) as found:
            raise self._damaged(entry.shard, str(found)) from found
        if key not in self._sound and _sha256(tensors) != entry.sha256:
            raise self._damaged(entry.shard, f"the checksum of the entry {key} differs")
        self._sound.add(key)
        return tensors

    def put_many(self, entries: Mapping[str, Mapping[str, torch.Tensor]], still_to_come: int = 0) -> None:
        """Writes the entries as one new shard, whole or not at all.

        Args:
            entries: key -> {name: tensor}, of any device and dtype; kept as they are.
            still_to_come: further entries that the caller will write, for the message of a full disk.
        Raises:
            TrainingError: the disk is full or cannot be written; what was there before stays.
        """
        if not entries:
            return
        kept = {key: {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
                for key, tensors in entries.items()}
        about = {key: {"names": sorted(tensors), "bytes": sum(tensor.nbytes for tensor in tensors.values()),
                       "sha256": _sha256(tensors)} for key, tensors in kept.items()}
        path = self.folder / (hashlib.sha256("\n".join(sorted(kept)).encode()).hexdigest()[:32] + _ENDING)
        if not (path.exists() and self._read(path)):  # another process may have written the same
            content = save({f"{key}/{name}": tensor for key, tensors in kept.items() for name, tensor in tensors.items()},
                           {"entries": json.dumps(about)})
            self._write(path, content, 1 + still_to_come / len(kept))
            self._read(path)

    def _write(self, path: Path, content: bytes, times: float) -> None:
        try:
            make_folder(path.parent)
            write_atomically(path, lambda temporary: temporary.write_bytes(content))
        except WriteError as found:
            if not found.full:
                raise TrainingError(f"the cache {path.parent} cannot be written ({found.reason}). {found.remedy} (data.cache)."
                                    ) from found
            free, needed = shutil.disk_usage(path.parent).free, len(content) * times
            raise TrainingError(f"the disk of the cache {path.parent} is full: {_size(free)} free, about {_size(needed)} "
                                "needed. Make room, or name another folder in data.cache, and start again: what was written "
                                "before is kept.") from found

    def _check_settings(self, text: str) -> None:
        path = self.folder / "settings.json"
        if not path.exists():
            self._write(path, text.encode(), 1)
        try:
            found = read_json(path, "the settings of a training cache")
        except FileError:
            found = None
        if found != json.loads(text):
            raise TrainingError(f"{path} is damaged or was changed: it does not hold the settings that its folder is named "
                                "after. Delete this folder: it is computed again.")

    def _scan(self) -> None:
        """Index the shards that are new in the folder."""
        for path in sorted(self.folder.glob(f"*{_ENDING}")):
            if path not in self._known:
                self._read(path)

    def _read(self, path: Path) -> bool:
        """Index one shard by its header; a damaged one is set aside."""
        try:
            shard = self._shard(path)
            about = parse_json(shard.metadata().get("entries", ""), f"{path.name}: its `entries` metadata", FileError)
            found = {key: _entry_of(path, entry, shard) for key, entry in about.items()}
        except (FileError, OSError, KeyError, TypeError) as reason:
            self._set_aside(path, str(reason))
            return False
        self._index |= found
        self._known.add(path)
        return True

    def _shard(self, path: Path) -> TensorFile:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = open_tensors(path, "a shard of the training cache")
            while len(self._open) > self._most_open:
                self._open.popitem(last=False)
        return self._open[path]

    def _damaged(self, path: Path, reason: str) -> TrainingError:
        self._set_aside(path, reason)
        return TrainingError(f"{path} is damaged ({reason}) and was set aside. Start the run again: its entries are computed "
                             "again, the others are kept.")

    def _set_aside(self, path: Path, reason: str) -> None:
        self._open.pop(path, None)  # an open file cannot be renamed on Windows
        self._known.discard(path)
        gone = {key for key, entry in self._index.items() if entry.shard == path}
        self._index = {key: entry for key, entry in self._index.items() if key not in gone}
        self._sound -= gone
        with suppress(FileNotFoundError):  # another process did it first
            os.replace(path, path.with_name(path.name + ".damaged"))
        warnings.warn(f"{path} is damaged ({reason}); it was set aside as {path.name}.damaged, and its entries are computed "
                      "again", EmmaWarning, stacklevel=3)


def _entry_of(path: Path, entry: Any, shard: TensorFile) -> _Entry:
    """What a shard says of one entry.

    Raises:
        KeyError, TypeError: it says no such thing.
    """
    names, nbytes, sha256 = entry["names"], entry["bytes"], entry["sha256"]
    texts = isinstance(names, list) and all(isinstance(name, str) for name in (*names, sha256))
    if not texts or type(nbytes) is not int or not 0 <= nbytes <= shard.path.stat().st_size:
        raise TypeError(f"an entry of other kinds of values: {short(entry)}")
    return _Entry(path, tuple(names), nbytes, sha256)


class Filling:
    """Collects entries for a store and writes them in shards; what was collected is written even if something fails."""

    def __init__(self, what: str, store: FeatureStore, total: int, progress: Callable[[str, int, int], None]):
        self.what, self.store, self.total, self.progress = what, store, total, progress
        self.done = 0
        self.waiting: dict[str, Mapping[str, torch.Tensor]] = {}

    def __enter__(self) -> Filling:
        return self

    def __exit__(self, *found) -> None:
        self._flush()

    def add(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """One more is computed.

        Raises:
            TrainingError: it is not finite, so not kept: it would spoil every run that reads it.
        """
        broken = next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
        if broken:
            raise TrainingError(f"one of the {self.what} came out with NaN or infinite values ({broken}): it was not "
                                "cached. Check that the base's kind of prediction is right, and try bf16 or fp32 "
                                "(train.precision).")
        self.waiting[key] = tensors
        self.skip()
        if len(self.waiting) >= FLUSH_ENTRIES:
            self._flush()

    def skip(self) -> None:
        """One more is done, or cannot be."""
        self.done += 1
        self.progress(self.what, self.done, self.total)

    def _flush(self) -> None:
        entries, self.waiting = self.waiting, {}
        self.store.put_many(entries, self.total - self.done)


def _sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        digest.update(memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
