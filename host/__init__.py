"""The adapter to ComfyUI; nodes call its parts as `host.connecting`, which imports them when they are first used.

So the pack loads in the time that its schemas take.
"""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f".{name}", __name__)
