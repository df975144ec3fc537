"""Models of ours as the host's memory management sees them: each has one ModelPatcher for its life."""

from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch

from ..emma_core.encoders.base import FeatureCache
from ..emma_core.files.connector_file import load_connector
from ..emma_core.files.module_file import load_module
from ..emma_core.model.connector import Connector
from ..emma_core.model.gated_resampler import GatedResampler


def compute_dtype() -> torch.dtype:
    """float16 on the GPUs that take it (as ELLA was trained), bfloat16 where only that works, float32 on the CPU."""
    device = comfy.model_management.get_torch_device()
    if comfy.model_management.should_use_fp16(device):
        return torch.float16
    if comfy.model_management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float32


def patcher_for(model: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """A ModelPatcher with the host's usual devices."""
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


@dataclass(frozen=True, eq=False)
class LoadedConnector:
    """The ELLA that travels through the graph."""

    connector: Connector
    patcher: comfy.model_patcher.ModelPatcher

    def __repr__(self) -> str:
        """Short: the host shows what is wired into a node that failed."""
        return f"<ELLA {self.connector.name}>"


@dataclass(frozen=True, eq=False)
class LoadedModule:
    """The EMMA_MODULE that travels through the graph."""

    module: GatedResampler
    patcher: comfy.model_patcher.ModelPatcher

    def __repr__(self) -> str:
        return f"<EMMA_MODULE {self.module.name}>"

    @property
    def in_words(self) -> str:
        """What it takes from a reference, and which tokens it acts on."""
        return f"{self.module.config.condition} module {self.module.config.acts_on}"


@dataclass(frozen=True, eq=False)
class LoadedEncoder:
    """The EMMA_ENCODER that travels through the graph: a reference encoder under the host's memory management, and what it
    encoded before.
    """

    encoder: Any
    patcher: comfy.model_patcher.ModelPatcher
    cache: FeatureCache = field(default_factory=FeatureCache)

    def __repr__(self) -> str:
        return f"<EMMA_ENCODER {self.encoder.description['family']}>"


def load_ella(path: str) -> LoadedConnector:
    """An ELLA file, with the host's casting layers."""
    dtype = compute_dtype()
    connector = load_connector(path, dtype, "cpu", comfy.ops.manual_cast, compute_dtype=dtype)
    return LoadedConnector(connector, patcher_for(connector))


def load_emma_module(path: str) -> LoadedModule:
    """An EMMA module file, with the host's casting layers."""
    module = load_module(path, compute_dtype(), "cpu", comfy.ops.manual_cast)
    return LoadedModule(module, patcher_for(module))
