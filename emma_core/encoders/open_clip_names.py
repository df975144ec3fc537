"""Which models open_clip has; a file of its own, as ComfyUI asks while it starts."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def model_names() -> list[str]:
    """Names of the models open_clip can build, without importing it; empty if it is not installed."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        return []
    folder = Path(package.submodule_search_locations[0]) / "model_configs"
    return sorted(path.stem for path in folder.glob("*.json"))
