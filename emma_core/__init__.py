"""EMMA on ELLA: multi-modal conditioning of frozen diffusion models (arXiv 2406.09162, 2403.05135).

The public names are imported on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .assembly import Assembly, Reference
    from .connector import Connector, ConnectorConfig
    from .connector_file import load_connector, save_connector
    from .gated_resampler import GatedResampler
    from .module_config import FeatureSpec, ModuleConfig
    from .module_file import load_module, save_module

_HOME = {
    "Assembly": "assembly", "Reference": "assembly", "Connector": "connector", "ConnectorConfig": "connector",
    "load_connector": "connector_file", "save_connector": "connector_file", "GatedResampler": "gated_resampler",
    "FeatureSpec": "module_config", "ModuleConfig": "module_config", "load_module": "module_file",
    "save_module": "module_file",
}
__all__ = [
    "Assembly", "Connector", "ConnectorConfig", "FeatureSpec", "GatedResampler", "ModuleConfig", "Reference",
    "load_connector", "load_module", "save_connector", "save_module",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
