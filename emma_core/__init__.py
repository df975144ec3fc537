"""EMMA on ELLA: multi-modal conditioning of frozen diffusion models (arXiv 2406.09162, 2403.05135).

The public names are imported on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .files.connector_file import load_connector, save_connector
    from .files.module_file import load_module, save_module
    from .model.assembly import Assembly, Reference
    from .model.connector import Connector, ConnectorConfig
    from .model.gated_resampler import GatedResampler
    from .model.module_config import FeatureSpec, ModuleConfig

_HOME = {
    "Assembly": "model.assembly", "Reference": "model.assembly", "Connector": "model.connector",
    "ConnectorConfig": "model.connector", "load_connector": "files.connector_file", "save_connector": "files.connector_file",
    "GatedResampler": "model.gated_resampler", "FeatureSpec": "model.module_config", "ModuleConfig": "model.module_config",
    "load_module": "files.module_file", "save_module": "files.module_file",
}
__all__ = [
    "Assembly", "Connector", "ConnectorConfig", "FeatureSpec", "GatedResampler", "ModuleConfig", "Reference",
    "load_connector", "load_module", "save_connector", "save_module",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
