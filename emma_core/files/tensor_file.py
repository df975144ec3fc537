"""Reading safetensors files, with refusals that say what the file is instead."""

import hashlib
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import FileError

_LARGEST_HEADER = 100_000_000
PICKLE_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth"}
# whose classes stand in published checkpoints beside the weights
_TRAINER_MODULES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "argparse.Namespace")
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def check_is_safetensors(path: str | Path, what: str, error: type[FileError] = FileError) -> Path:
    """Return ``path`` as a Path if it looks like a whole safetensors file.

    Raises ``error`` if the file is missing, a folder, empty, a pickle, truncated, or something else.
    """
    path = Path(path)
    if not path.exists():
        raise error(f"{path} does not exist; wanted {what}. Check the path or put the file there.")
    if path.is_dir():
        raise error(f"{path} is a folder; wanted the .safetensors file of {what}. Choose a file inside it.")
    size = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(8)
        start = stream.read(1)
    header_size = int.from_bytes(head, "little")
    # the header's size may begin with the bytes of a pickle, so a header that starts as JSON decides
    is_safetensors = size >= 10 and header_size <= _LARGEST_HEADER and start in (b"{", b" ")
    if not is_safetensors and head.startswith(_PICKLE_MAGIC):
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
    return path


def open_tensors(path: str | Path, what: str, error: type[FileError] = FileError):
    """Open a safetensors file lazily (``safetensors.safe_open``) after the checks of `check_is_safetensors`."""
    path = check_is_safetensors(path, what, error)
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as found:
        raise error(f"{path.name} is truncated or damaged ({found}); wanted {what}. Download the file again.") from found


def read_tensors(
    path: str | Path, what: str, error: type[FileError] = FileError
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file on the CPU, and its metadata.

    Args:
        path: the file.
        what: what the file should hold, for the messages ("an ELLA connector").
        error: exception type to raise.
    Raises:
        error: missing, folder, empty, pickle, truncated, not safetensors.
    """
    with open_tensors(path, what, error) as tensors:
        return {key: tensors.get_tensor(key) for key in list(tensors.keys())}, dict(tensors.metadata() or {})


def read_weights(path: str | Path, what: str, error: type[FileError] = FileError) -> dict[str, torch.Tensor]:
    """All tensors of a published weights file: safetensors, or a PyTorch file opened as weights alone.

    Of a training checkpoint only its ``state_dict`` is read.

    Raises:
        error: missing, folder, empty, damaged, a pickle that holds more than tensors, or no tensors.
    """
    path = Path(path)
    if path.suffix.lower() not in PICKLE_SUFFIXES or not path.is_file():
        return read_tensors(path, what, error)[0]
    try:
        content = _load_weights_alone(path)
    except Exception as found:  # torch raises several kinds for a pickle it will not open
        reason = str(found).strip().splitlines()[0] if str(found).strip() else type(found).__name__
        raise error(f"{path.name} cannot be opened as weights alone ({reason}); wanted {what}. Get the file again, or its "
                    "safetensors version.") from found
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    entries = state.items() if isinstance(state, Mapping) else ()
    tensors = {key: value for key, value in entries if isinstance(value, torch.Tensor)}
    if not tensors:
        raise error(f"{path.name} holds no weights; wanted {what}. Choose another file.")
    return tensors


def _load_weights_alone(path: Path):
    """`torch.load` that builds tensors only; what a trainer left beside them becomes empty objects."""
    listed = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", lambda path: [])(str(path))
    mapped = zipfile.is_zipfile(path)  # tensors stay in the file until they are used
    leftovers = [name for name in listed if name.startswith(_TRAINER_MODULES)]
    if not leftovers:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    with torch.serialization.safe_globals([(type("Leftover", (), {}), name) for name in leftovers]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def check_finite(tensors: Mapping[str, torch.Tensor], name: str, error: type[FileError] = FileError) -> None:
    """Raise ``error`` naming the first tensor that holds NaN or infinity."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise error(
                f"{name}: the weight {key} holds NaN or infinite values; the file is damaged or its training broke. "
                "Use an earlier checkpoint or download it again."
            )


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
            raise error(f"{name}: {key} has shape {tuple(found[key].shape)}, wanted {tuple(shape)} for {what}. "
                        "The file mixes sizes: get it again from its author.")


def _some(label: str, keys: list[str], most: int = 4) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{len(keys)} {label} keys ({', '.join(keys[:most])}{more}). "


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


def write_atomically(path: str | Path, write) -> None:
    """Call ``write(temporary_path)``, then put the result in place of ``path``: never a half-written file."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileError(f"{path} cannot be written: the folder {path.parent} does not exist. Make it, or choose another.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
