"""Where the files inside a zip archive lie, if they are stored as they are.

PyTorch stores tensors uncompressed, so that they can be read where they lie. A compressed archive can unfold to a thousand
times its size; it is refused before anything is unpacked, and so is one that claims more than it holds.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

_END, _END_64, _LOCATOR_64, _CENTRAL, _LOCAL = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", b"PK\x03\x04"
_END_SIZE, _LOCATOR_SIZE, _END_64_SIZE, _CENTRAL_SIZE, _LOCAL_SIZE = 22, 20, 56, 46, 30
_LONGEST_COMMENT = 65535
_MOST_ENTRIES = 200_000
_LARGEST_DIRECTORY = 64 << 20
_UNKNOWN_16, _UNKNOWN_32 = 0xFFFF, 0xFFFFFFFF  # the true number stands in the zip64 fields
_ZIP_64_FIELD = 1
_ENCRYPTED = 1


class ZipFault(ValueError):
    """What is wrong with an archive, in words that begin with a verb."""


@dataclass(frozen=True)
class Entry:
    """Where a stored file begins in the archive, and its bytes."""

    start: int
    nbytes: int


def zip_entries(stream: BinaryIO) -> dict[str, Entry]:
    """The files of an archive by their names.

    Raises:
        ZipFault: no archive, damaged, compressed, encrypted, or with files that lie upon each other.
        OSError: it cannot be read.
    """
    size = os.fstat(stream.fileno()).st_size
    try:
        entries = dict(_entries(stream, size))
    except (struct.error, UnicodeDecodeError, IndexError) as found:
        raise ZipFault(f"has a damaged list of contents ({found})") from None
    if sum(entry.nbytes for entry in entries.values()) > size:
        raise ZipFault("claims more than it holds: its files lie upon each other")
    return entries


def _entries(stream: BinaryIO, size: int):
    start, nbytes, count = _directory(stream, size)
    if count > _MOST_ENTRIES or nbytes > _LARGEST_DIRECTORY or start + nbytes > size:
        raise ZipFault(f"claims {count:,} files in a list of {nbytes:,} bytes")
    stream.seek(start)
    directory, place = stream.read(nbytes), 0
    for _ in range(count):
        if directory[place:place + 4] != _CENTRAL:
            raise ZipFault("has a damaged list of contents")
        flags, method = struct.unpack_from("<HH", directory, place + 8)
        packed, unpacked, name_length, extra_length, comment_length = struct.unpack_from("<IIHHH", directory, place + 20)
        offset, = struct.unpack_from("<I", directory, place + 42)
        name_end = place + _CENTRAL_SIZE + name_length
        name = directory[place + _CENTRAL_SIZE:name_end].decode("utf-8")
        extra = directory[name_end:name_end + extra_length]
        unpacked, packed, offset = _in_64_bits(extra, (unpacked, packed, offset))
        if method or flags & _ENCRYPTED or packed != unpacked:
            raise ZipFault(f"is {'encrypted' if flags & _ENCRYPTED else 'compressed'}, as PyTorch never writes it, so that it "
                           "could unfold to any size")
        yield name, Entry(_start_of(stream, offset, size, unpacked), unpacked)
        place = name_end + extra_length + comment_length


def _directory(stream: BinaryIO, size: int) -> tuple[int, int, int]:
    """Start and bytes of the list of contents, and how many files it names."""
    tail_start = max(0, size - _END_SIZE - _LONGEST_COMMENT)
    stream.seek(tail_start)
    tail = stream.read(_END_SIZE + _LONGEST_COMMENT)
    place = tail.rfind(_END)
    if place < 0:
        raise ZipFault("is a truncated archive: its list of contents is missing")
    count, nbytes, start = struct.unpack_from("<HII", tail, place + 10)
    if count != _UNKNOWN_16 and _UNKNOWN_32 not in (nbytes, start):
        return start, nbytes, count
    locator = tail_start + place - _LOCATOR_SIZE
    stream.seek(max(0, locator))
    found = stream.read(_LOCATOR_SIZE)
    if locator < 0 or not found.startswith(_LOCATOR_64):
        return start, nbytes, count
    stream.seek(min(struct.unpack_from("<Q", found, 8)[0], size))
    end = stream.read(_END_64_SIZE)
    if not end.startswith(_END_64):
        raise ZipFault("has a damaged list of contents")
    count, nbytes, start = struct.unpack_from("<QQQ", end, 32)
    return start, nbytes, count


def _in_64_bits(extra: bytes, numbers: tuple[int, int, int]) -> list[int]:
    """Unpacked size, packed size and offset, those that did not fit into 32 bits from the extra field."""
    place, wide = 0, b""
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        if kind == _ZIP_64_FIELD:
            wide = extra[place + 4:place + 4 + length]
        place += 4 + length
    values = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[:len(wide) // 8 * 8]))
    return [next(values, number) if number == _UNKNOWN_32 else number for number in numbers]


def _start_of(stream: BinaryIO, offset: int, size: int, nbytes: int) -> int:
    stream.seek(min(offset, size))
    local = stream.read(_LOCAL_SIZE)
    if not local.startswith(_LOCAL):
        raise ZipFault("has a damaged list of contents")
    name_length, extra_length = struct.unpack_from("<HH", local, 26)
    start = offset + _LOCAL_SIZE + name_length + extra_length
    if start + nbytes > size:
        raise ZipFault("is truncated")
    return start
