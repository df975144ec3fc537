"""What is said before files are loaded: with those of true sizes nothing happens for a minute or two."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .plain_file import is_folder, visible

_WORTH_SAYING = 100 << 20  # bytes


def loading_in_words(paths: Iterable[str | Path]) -> str:
    """The large ones among files and folders with their sizes; "" where there is none. Empty paths name nothing."""
    sizes = {Path(path): _bytes_of(Path(path)) for path in paths if path}
    large = [f"{path.name} ({size / 1e9:.1f} GB)" for path, size in sizes.items() if size >= _WORTH_SAYING]
    return f"loading {', '.join(large)}" if large else ""


def _bytes_of(path: Path) -> int:
    """0 where it is not there; what is wrong with a path is told by who loads it."""
    try:
        inside = visible(path.rglob("*")) if is_folder(path) else [path]
        return sum(file.stat().st_size for file in inside if file.is_file())
    except OSError:
        return 0
