"""Tensors in strangers' files, read with refusals that say what the file is instead.

On opening, names, shapes and kinds are known; numbers are read when they are wanted. Nothing that a file says is believed
before it is compared with the tensors that are there, and no file is run.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import FileError, short
from .json_file import is_whole
from .pickle_reading import BYTES_OF_KIND, StoredTensor
from .plain_file import PICKLE_SUFFIXES, check_plain_file
from .pytorch_file import ARCHIVE, PICKLES, describe_pytorch_file

_LARGEST_HEADER = 100_000_000
_MOST_TENSORS = 100_000
_MOST_DIMENSIONS = 8
_MOST_NUMBERS = 1 << 48  # of one tensor, counting an empty side as one: torch cannot count much further
_SHARED = 2  # times that the numbers of a file may be used by its tensors, as tied weights are
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8,
           "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_CHECKED_AT_ONCE = 1 << 22  # numbers
_MOST_BLOCKS, _DIGITS = 256, 4  # of a model; flan-t5-xxl has 24, CLIP ViT-bigG/14 48


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file: its shape and the kind of its numbers, as safetensors files write it ("F16")."""

    shape: tuple[int, ...]
    kind: str


class TensorFile(ABC):
    """An open file of tensors; a context manager. Values are read with `tensor`."""

    def __init__(self, path: Path, stored: Mapping[str, Stored], metadata: Mapping[str, str], error: type[FileError]):
        self.path, self.stored, self._metadata, self._error = path, stored, metadata, error
        for name, about in stored.items():
            if len(about.shape) > _MOST_DIMENSIONS or _count(tuple(side or 1 for side in about.shape)) > _MOST_NUMBERS:
                raise error(f"{path.name}: {short(name)} has the shape {short(about.shape)}, which no weight has. Get the file "
                            "again from its author.")

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *found) -> None:
        self.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: about.shape for name, about in self.stored.items()}

    def metadata(self) -> dict[str, str]:
        """What stands beside the tensors; nothing in PyTorch files."""
        return dict(self._metadata)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, as it is stored; its numbers may lie in the file itself until they are used.

        Raises:
            FileError: (the type given on opening) numbers of a kind that is not read, such as fp4.
        """
        about = self.stored[name]
        if about.kind not in _DTYPES:
            raise self._error(f"{self.path.name}: {short(name)} is stored as {about.kind}, which is not read here; wanted "
                              "fp32, fp16, bf16 or fp8. Get the file in one of these.")
        return self._tensor(name)

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Some of the tensors, or all."""
        return {name: self.tensor(name) for name in (self.stored if names is None else names)}

    @abstractmethod
    def _tensor(self, name: str) -> torch.Tensor:
        """As `tensor`, of a kind that is read."""

    @abstractmethod
    def close(self) -> None:
        """Close it; tensors that were read stay."""


class _Safetensors(TensorFile):
    def __init__(self, path: Path, what: str, error: type[FileError]):
        self._what = what
        try:
            self._file = safe_open(str(path), framework="pt", device="cpu")
            stored = dict(self._headers())
            metadata = dict(self._file.metadata() or {})
        except (SafetensorError, OSError, ValueError, OverflowError, TypeError) as found:
            raise error(f"{path.name} is truncated or damaged ({short(str(found), 200)}); wanted {what}. Download the file "
                        "again.") from None
        super().__init__(path, stored, metadata, error)

    def _headers(self) -> Iterator[tuple[str, Stored]]:
        for name in list(self._file.keys()):
            header = self._file.get_slice(name)
            yield name, Stored(tuple(header.get_shape()), str(header.get_dtype()))

    def _tensor(self, name: str) -> torch.Tensor:
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, RuntimeError, OSError, ValueError, OverflowError, TypeError) as found:
            raise self._error(f"{self.path.name}: {short(name)} cannot be read ({short(str(found), 200)}); wanted "
                              f"{self._what}. Download the file again.") from None

    def close(self) -> None:
        self._file.__exit__(None, None, None)


class _Pickled(TensorFile):
    """A PyTorch file: of a training checkpoint only its ``state_dict``."""

    def __init__(self, path: Path, what: str, error: type[FileError]):
        content, self._starts = describe_pytorch_file(path, what, error)
        state = content.get("state_dict", content) if isinstance(content, dict) else None
        self._tensors = {name: value for name, value in (state or {}).items() if isinstance(value, StoredTensor)} \
            if isinstance(state, dict) else {}
        self._check(path, what, error)
        self._bytes: torch.UntypedStorage | None = None
        stored = {name: Stored(tensor.shape, tensor.kind) for name, tensor in self._tensors.items()}
        super().__init__(path, stored, {}, error)

    def _check(self, path: Path, what: str, error: type[FileError]) -> None:
        if not self._tensors:
            raise error(f"{path.name} holds no weights; wanted {what}. Choose another file.")
        odd = [name for name in self._tensors if not isinstance(name, str) or not is_whole(name)]
        if odd:
            raise error(f"{path.name} calls a tensor {short(odd[0])}, which is no text; wanted {what}. Get the file again.")
        used = sum(_count(tensor.shape) * BYTES_OF_KIND[tensor.kind] for tensor in self._tensors.values())
        size = path.stat().st_size
        if used > _SHARED * size:
            raise error(f"{path.name} holds {size:,} bytes, and its tensors are {used:,}: they lie upon each other; wanted "
                        f"{what}. Get the file again.")
        for name, tensor in self._tensors.items():
            if tensor.storage.key not in self._starts:
                raise error(f"{path.name}: the numbers of {short(name)} are missing; wanted {what}. Download the file again.")

    def _tensor(self, name: str) -> torch.Tensor:
        stored = self._tensors[name]
        if self._bytes is None:
            # mapped: numbers stay in the file until they are used
            self._bytes = torch.UntypedStorage.from_file(str(self.path), shared=False, nbytes=self.path.stat().st_size)
        width = BYTES_OF_KIND[stored.kind]
        start = self._starts[stored.storage.key]
        nbytes = stored.storage.count * BYTES_OF_KIND[stored.storage.kind or "U8"]
        numbers = torch.empty(0, dtype=torch.uint8).set_(self._bytes)[start:start + nbytes // width * width]
        if start % width:
            numbers = numbers.clone()
        typed = numbers.view(_DTYPES[stored.kind])
        return typed.as_strided(stored.shape, stored.strides, typed.storage_offset() + stored.offset)

    def close(self) -> None:
        self._bytes = None


def check_is_safetensors(path: str | Path, what: str, error: type[FileError] = FileError) -> Path:
    """Return ``path`` as a Path if it looks like a whole safetensors file.

    Raises ``error`` if the file is missing, a folder or a device, empty, a pickle, truncated, or something else.
    """
    path = check_plain_file(path, what, error)
    try:
        size, head, start, count = _looked_at(path)
    except OSError as found:
        raise error(f"{path} cannot be read ({found.strerror or found}); wanted {what}. Check its permissions.") from None
    header_size = int.from_bytes(head, "little")
    # the header's size may begin with the bytes of a pickle, so a header that starts as JSON decides
    is_safetensors = size >= 10 and header_size <= _LARGEST_HEADER and start in (b"{", b" ")
    if not is_safetensors and head.startswith((ARCHIVE, *PICKLES)):
        raise error(
            f"{path.name} is a pickled PyTorch file, which can run code when opened; wanted {what} as .safetensors. "
            "Get the safetensors version of this file, or convert it with a tool you trust."
        )
    if size < 10:
        raise error(f"{path.name} holds only {size} bytes; wanted {what}. Download the file again.")
    if not is_safetensors:
        raise error(
            f"{path.name} is not a safetensors file (it starts with {head!r}); wanted {what}. "
            "A web page saved in place of the file is a common cause: download it again."
        )
    if 8 + header_size > size:
        raise error(f"{path.name} is truncated: {size} bytes, its header alone needs {8 + header_size}. "
                    f"Download {what} again.")
    if count > _MOST_TENSORS:
        raise error(f"{path.name} names {count:,} tensors; wanted {what}, which has far fewer. Choose another file.")
    return path


def _looked_at(path: Path) -> tuple[int, bytes, bytes, int]:
    """Bytes of the file, its first eight, the header's first, and how many tensors the header names."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(8)
        header = stream.read(min(int.from_bytes(head, "little"), _LARGEST_HEADER, max(size, 1)))
    return size, head, header[:1], header.count(b'"data_offsets"')


def open_tensors(path: str | Path, what: str, error: type[FileError] = FileError) -> TensorFile:
    """Open a safetensors file; its values are read when they are wanted.

    Args:
        path: the file.
        what: what the file should hold, for the messages ("an ELLA connector").
        error: exception type to raise.
    Raises:
        error: as `check_is_safetensors`; a damaged header, shapes that no weight has.
    """
    return _Safetensors(check_is_safetensors(path, what, error), what, error)


def open_weights(path: str | Path, what: str, error: type[FileError] = FileError) -> TensorFile:
    """Open a published weights file: safetensors, or by its ending a PyTorch file, of which the tensors alone are read.

    Of a training checkpoint only its ``state_dict`` counts.

    Raises:
        error: as `open_tensors`; a pickle that holds more than tensors, or no tensors; an archive that is compressed.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        path = check_plain_file(path, what, error)
        with open(path, "rb") as stream:
            if stream.read(4).startswith((ARCHIVE, *PICKLES)):
                return _Pickled(path, what, error)
    return open_tensors(path, what, error)


def read_tensors(
    path: str | Path, what: str, error: type[FileError] = FileError
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file on the CPU, and its metadata. Raises as `open_tensors` and `TensorFile.tensor`."""
    with open_tensors(path, what, error) as file:
        return file.tensors(), file.metadata()


def read_weights(path: str | Path, what: str, error: type[FileError] = FileError) -> dict[str, torch.Tensor]:
    """All tensors of a published weights file. Raises as `open_weights` and `TensorFile.tensor`."""
    with open_weights(path, what, error) as file:
        return file.tensors()


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def check_finite(
    tensors: Mapping[str, torch.Tensor], name: str, error: type[FileError] = FileError, integers: Collection[str] = ()
) -> None:
    """Refuse what cannot be a weight: tensors that are not of floating point numbers, or hold NaN or infinity.

    Args:
        tensors: by name.
        name: of the file.
        error: exception type to raise, naming the first such tensor.
        integers: names of tensors that hold whole numbers instead, such as counters.
    """
    for key, tensor in tensors.items():
        whole = key in integers
        if tensor.dtype == torch.bool or tensor.is_complex() or tensor.is_floating_point() == whole:
            raise error(f"{name}: {short(key)} holds {str(tensor.dtype).removeprefix('torch.')} numbers; wanted "
                        f"{'whole' if whole else 'floating point'} ones. It is another kind of file, or a quantised one: get "
                        "the fp16 or fp32 version.")
        if not whole and not is_finite(tensor):
            raise error(
                f"{name}: the weight {short(key)} holds NaN or infinite values; the file is damaged or its training broke. "
                "Use an earlier checkpoint or download it again."
            )


def integers_in(weights: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of a model's weights that are whole numbers, for `check_finite`."""
    return {key for key, value in weights.items() if not value.is_floating_point()}


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether floating point numbers are all finite, in float32; in parts, so that it takes no memory."""
    parts = tensor.reshape(-1).split(_CHECKED_AT_ONCE)
    return all(bool(torch.isfinite(part.float()).all()) for part in parts)


def count_blocks(names: Iterable[str], before: str, name: str, error: type[FileError] = FileError) -> int:
    """How many blocks a model has by the names of its tensors, such as `<before>3.weight`: the highest number and one.

    Raises:
        error: a number that no model reaches.
    """
    numbers = {match[1] for key in names if (match := re.match(re.escape(before) + "([0-9]+)[.]", key))}
    odd = next((number for number in numbers if len(number) > _DIGITS or int(number) >= _MOST_BLOCKS), None)
    if odd is not None:
        raise error(f"{name} has tensors of block {short(odd)} ({before}*); {_MOST_BLOCKS} blocks are the most. Get the file "
                    "again.")
    return max(map(int, numbers), default=-1) + 1


def check_shapes(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, Iterable[int]], name: str, what: str,
    error: type[FileError] = FileError,
) -> None:
    """Raise ``error`` unless ``found`` has exactly the keys and shapes of ``wanted``."""
    missing = sorted(set(wanted) - set(found))
    extra = sorted(set(found) - set(wanted))
    if missing or extra:
        raise error(
            f"{name} is not {what} that can be read: {_some('missing', missing)}{_some('unexpected', extra)}"
            "Choose a file made for this kind of model."
        )
    for key, shape in wanted.items():
        if tuple(found[key].shape) != tuple(shape):
            raise error(f"{name}: {short(key)} has shape {tuple(found[key].shape)}, wanted {tuple(shape)} for {what}. "
                        "The file mixes sizes: get it again from its author.")


def _some(label: str, keys: list[str], most: int = 4) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{len(keys)} {label} keys ({', '.join(map(short, keys[:most]))}{more}). "


def sha256_of_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over names, shapes and float32 values: the same weights give the same hash in any file."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of_weights(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over names, shapes and float16 values: float32 and float16 files of the same weights agree."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().to("cpu", torch.float16).contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(memoryview(value.view(torch.uint8).numpy() if value.ndim else value.numpy()))
    return digest.hexdigest()
