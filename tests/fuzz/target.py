"""What a reader of strangers' files is tried with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """One reader.

    Args:
        make: writes a valid file, or several, into an empty folder.
        load: reads it from there, and uses what it got as its callers do.
        files: names of those that are damaged in turn.
        share: of the inputs, beside the others'; less where the smallest valid file is large.
    """

    make: Callable[[Path], Any]
    load: Callable[[Path], Any]
    files: tuple[str, ...]
    share: float = 1.0


TARGETS: dict[str, Target] = {}


def target(name: str, files: str, make: Callable[[Path], Any], load: Callable[[Path], Any], share: float = 1.0) -> None:
    """Add one to TARGETS."""
    TARGETS[name] = Target(make, load, tuple(files.split()), share)
