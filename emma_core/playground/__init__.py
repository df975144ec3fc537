"""The playground: a small world of emoji whose weights are shipped, so that everything runs without a download.

Names are imported on first use: the pack must load fast, and a bare machine needs diffusers only where it generates.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .files import load_autoencoder, load_unet, unet_tensors_and_config

PLAYGROUND = "playground"  # what settings call it in place of a file
_INSTALLED_DIR = Path(__file__).resolve().with_name("weights")  # in a wheel; in the repository they lie at the top
PLAYGROUND_DIR = _INSTALLED_DIR if _INSTALLED_DIR.is_dir() else Path(__file__).resolve().parents[2] / "playground"
REFERENCES_DIR = PLAYGROUND_DIR / "references"
__all__ = [
    "PLAYGROUND", "PLAYGROUND_DIR", "REFERENCES_DIR", "load_autoencoder", "load_unet", "reference_names",
    "unet_tensors_and_config",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".files", __name__), name)


def reference_names() -> list[str]:
    """Shipped reference pictures, by file name without its ending."""
    return sorted(path.stem for path in REFERENCES_DIR.glob("*.png"))
