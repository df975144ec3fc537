"""What each kind of the host's models reads as text: its family's name, the width of its tokens, how it counts time."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
import torch

from ..emma_core.errors import ConnectorMismatchError
from ..emma_core.model.own_tokens import OwnTokens
from ..emma_core.model.source_spec import SourceSpec, TimeSpec

_LOWEST_LAST_TIMESTEP = 100
_UNSHIFTED_FLOW_HALF = 0.5


@dataclass(frozen=True)
class Family:
    """Models whose text comes from the same encoders, so that their tokens are alike.

    Args:
        name: in module files.
        width_of: the width of the tokens, by the host's configuration of the model; None where it does not say.
    """

    name: str
    width_of: Callable[[Mapping[str, Any]], int | None]


def _entry(key: str, otherwise: int | None = None) -> Callable[[Mapping[str, Any]], int | None]:
    return lambda unet_config: unet_config.get(key, otherwise)


# class of comfy.supported_models -> its family; classes derived from it count too
_FAMILIES = {
    "SD15": Family("sd15", _entry("context_dim")),
    "SD20": Family("sd2", _entry("context_dim")),
    "SDXL": Family("sdxl", _entry("context_dim")),
    "SDXLRefiner": Family("sdxl-refiner", _entry("context_dim")),
    "SD3": Family("sd3", lambda unet_config: unet_config["context_embedder_config"]["params"]["in_features"]),
    "Flux": Family("flux", _entry("context_in_dim")),
    "Flux2": Family("flux2", _entry("context_in_dim")),
    "Chroma": Family("chroma", _entry("context_in_dim")),
    "Lumina2": Family("lumina2", _entry("cap_feat_dim")),
    "ZImage": Family("z-image", _entry("cap_feat_dim")),
    "QwenImage": Family("qwen-image", _entry("joint_attention_dim", 3584)),
    "Anima": Family("anima", _entry("crossattn_emb_channels")),
    "WAN21_T2V": Family("wan", _entry("text_dim", 4096)),
}


def family_of(model) -> Family:
    """The family of the host's model (``BaseModel``); one that is not listed is a family of its own, of unknown width."""
    kinds = [kind.__name__ for kind in inspect.getmro(type(model.model_config))]
    return next((_FAMILIES[kind] for kind in kinds if kind in _FAMILIES), Family(kinds[0].lower(), _entry("context_dim")))


def context_width(model) -> int | None:
    """What the text input of the host's model reads; None where only its tokens tell."""
    return family_of(model).width_of(model.model_config.unet_config)


def own_tokens_of(model, conditioning: list) -> OwnTokens:
    """The tokens that a MODEL reads anyway, of this conditioning where only that tells their width.

    Raises:
        ConnectorMismatchError: its sampling counts no time that modules know.
    """
    time = time_of(model.get_model_object("model_sampling"))
    width = context_width(model.model) or next((tokens.shape[-1] for tokens, _ in conditioning if tokens is not None), 1)
    return OwnTokens(SourceSpec(family_of(model.model).name, width), time.spec, shift=time.shift)


@dataclass(frozen=True)
class ModelTime:
    """How a model's sampling counts time, as modules on its own tokens read it.

    Args:
        spec: ddpm or flow.
        shift: of a flow model's sampling: sigma = s u / (1 + (s - 1) u) at the share 1 - u of its steps.
        sampling: the host's.
    """

    spec: TimeSpec
    shift: float
    sampling: Any

    def of_sigma(self, sigma_B: torch.Tensor) -> torch.Tensor:
        """Timesteps 0 to 999, or sigma x 1000: flow models' own timesteps have several scales."""
        return self.sampling.timestep(sigma_B) if self.spec.kind == "ddpm" else sigma_B * self.spec.last


def time_of(sampling) -> ModelTime:
    """How the host's ``model_sampling`` counts time.

    Raises:
        ConnectorMismatchError: neither DDPM's timesteps nor a flow's sigmas.
    """
    if isinstance(sampling, comfy.model_sampling.CONST):
        half = sampling.percent_to_sigma(_UNSHIFTED_FLOW_HALF)
        return ModelTime(TimeSpec("flow"), half / (1 - half), sampling)
    check_timesteps(sampling, "a module on the model's own tokens")
    return ModelTime(TimeSpec("ddpm"), 1.0, sampling)


def check_timesteps(sampling, who: str = "ELLA") -> None:
    """Refuse a sampling that does not count timesteps 0 to 999, which ``who`` needs.

    Raises:
        ConnectorMismatchError: it counts something else.
    """
    last = float(sampling.timestep(sampling.sigma_max.reshape(1)))
    if last < _LOWEST_LAST_TIMESTEP:
        raise ConnectorMismatchError(
            f"this MODEL's sampling ({type(sampling).__name__}) counts time from {last:.2f}, {who} needs timesteps 0 to 999. "
            "Remove the node that changes the model's sampling to EDM or continuous sigmas."
        )
