"""What is in a PyTorch file (.bin, .ckpt, .pt, .pth), without running it and without reading its numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import EmmaError, FileError
from .pickle_reading import BYTES_OF_KIND, MOST_INSTRUCTIONS, PickleFault, Storage, StoredTensor, read_pickle
from .zip_entries import Entry, ZipFault, zip_entries

ARCHIVE = b"PK\x03\x04"
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_LARGEST_PICKLE = 64 << 20  # of an archive, without its tensors
_OLD_MAGIC, _OLD_VERSION = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of a file from before PyTorch 1.6
_OLD_COUNT_BYTES = 8  # before the numbers of each storage


def describe_pytorch_file(
    path: Path, what: str, error: type[EmmaError] = FileError, most: int = MOST_INSTRUCTIONS
) -> tuple[Any, dict[str, int]]:
    """What a PyTorch file holds, and where the numbers of each storage begin; no numbers are read yet.

    Args:
        path: a plain file, an archive or in the format of before PyTorch 1.6.
        what: what it should hold, for the messages.
        error: exception type to raise.
        most: instructions of its pickles.
    Returns:
        Lists, dicts, texts and numbers as they are, tensors as `StoredTensor`; key of a storage -> place in the file.
    Raises:
        error: damaged, compressed, or naming anything but tensors; see `read_pickle`.
    """
    try:
        with open(path, "rb") as stream:
            is_archive = stream.read(4) == ARCHIVE
            stream.seek(0)
            return _in_archive(stream, most) if is_archive else _in_old_file(stream, most)
    except (PickleFault, ZipFault) as found:
        raise error(f"{path.name} cannot be opened as weights alone: it {found}; wanted {what}. Get the file again, or its "
                    "safetensors version.") from None
    except OSError as found:
        raise error(f"{path} cannot be read ({found.strerror or found}); wanted {what}. Check its permissions.") from None


def _in_archive(stream: BinaryIO, most: int) -> tuple[Any, dict[str, int]]:
    entries = zip_entries(stream)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ZipFault("is an archive of something else than PyTorch's tensors")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise ZipFault("is a program (TorchScript)")
    if f"{root}byteorder" in entries and _content(stream, entries[f"{root}byteorder"]) != b"little":
        raise ZipFault("was written on a machine that orders the bytes of a number the other way")
    content = read_pickle(_content(stream, entries[pickles[0]]), most)
    places = {name.removeprefix(f"{root}data/"): entry for name, entry in entries.items() if name.startswith(f"{root}data/")}
    sizes = {key: entry.nbytes for key, entry in places.items()}
    return _with_room(content, sizes), {key: entry.start for key, entry in places.items()}


def _content(stream: BinaryIO, entry: Entry) -> bytes:
    if entry.nbytes > _LARGEST_PICKLE:
        raise ZipFault(f"describes its tensors in {entry.nbytes:,} bytes")
    stream.seek(entry.start)
    return stream.read(entry.nbytes)


def _in_old_file(stream: BinaryIO, most: int) -> tuple[Any, dict[str, int]]:
    """Five pickles (a mark, a version, the machine, the content, the storages' keys), then the numbers of each storage."""
    if read_pickle(stream) != _OLD_MAGIC or read_pickle(stream) != _OLD_VERSION:
        raise PickleFault("is a pickle, but not one of PyTorch's")
    machine, content, keys = read_pickle(stream), read_pickle(stream, most), read_pickle(stream)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True or not isinstance(keys, list):
        raise PickleFault("was written on a machine that orders the bytes of a number the other way")
    storages = {storage.key: storage for storage in _storages(content)}
    size, starts, sizes = os.fstat(stream.fileno()).st_size, {}, {}
    for key in keys:
        if not isinstance(key, str) or key not in storages:
            raise PickleFault("is damaged: the numbers of its tensors are in disorder")
        count = int.from_bytes(stream.read(_OLD_COUNT_BYTES), "little")
        starts[key], sizes[key] = stream.tell(), count * BYTES_OF_KIND[storages[key].kind or "U8"]
        if count != storages[key].count or starts[key] + sizes[key] > size:
            raise PickleFault("is truncated or damaged: numbers of its tensors are missing")
        stream.seek(starts[key] + sizes[key])
    return _with_room(content, sizes), starts


def _with_room(content: Any, sizes: Mapping[str, int]) -> Any:
    """The content, if every storage that is there is as large as its tensors were told."""
    for storage in _storages(content):
        wanted = storage.count * BYTES_OF_KIND[storage.kind or "U8"]
        if storage.key in sizes and sizes[storage.key] < wanted:
            raise PickleFault(f"is truncated or damaged: {sizes[storage.key]:,} bytes where a tensor needs {wanted:,}")
    return content


def _storages(content: Any) -> Iterator[Storage]:
    """Of all tensors in lists and dicts of any depth, each container looked into once."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, StoredTensor):
            yield item.storage
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item
