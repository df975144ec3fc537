"""One run in a folder at a time: a lock that its process holds, and that the system takes back however the process ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import TrainingError
from ..files.writing import remove_parts, write_error

_NAME = ".running.lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, and clear it of what killed runs left half written.

    Raises:
        TrainingError: another run is at work there.
        WriteError: nothing can be written there.
    """
    lock = FileLock(folder / _NAME)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise TrainingError(f"another run is at work in {folder}. Wait until it has ended, or give this one a folder of its "
                            "own.") from None
    except OSError as found:
        raise write_error(folder, found) from found
    try:
        remove_parts(folder)
        yield
    finally:
        lock.release()
