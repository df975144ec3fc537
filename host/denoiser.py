"""The host's MODEL as training sees it: a frozen copy of its network that lets gradients through to the context.

Shapes: B rows, K cross-attention tokens of width W, latents 4 x h x w, T timesteps.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import comfy.ldm.flux.model
import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.model_management
import comfy.model_sampling
import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

from ..emma_core.base.denoiser import NO_EXTRA
from ..emma_core.base.schedule import TIMESTEPS
from ..emma_core.base.without_numbers import without_numbers
from ..emma_core.errors import TrainingConfigError, TrainingError
from .families import time_of

_CHECKPOINTED = (comfy.ldm.modules.diffusionmodules.openaimodel.ResBlock, comfy.ldm.modules.attention.SpatialTransformer)

# these networks write `x += y` where the backward pass needs the old x; they change nothing in place in any other way
_ADDS_IN_PLACE = (comfy.ldm.flux.model.Flux,)


class HostDenoiser:
    """A MODEL as training sees it: a frozen copy of its UNet, patches in it; the MODEL itself is not touched.

    Args:
        model: the host's MODEL, with its LoRAs and other patches.
        device, dtype: of the copy.
        checkpointing: compute activations again in the backward pass, for less memory.
    Raises:
        TrainingConfigError: see `prediction_of`.
    """

    def __init__(self, model, device: torch.device, dtype: torch.dtype, checkpointing: bool = False):
        sampling = model.get_model_object("model_sampling")
        self.prediction = prediction_of(model)
        self.name = type(model.model).__name__
        with torch.inference_mode(False), torch.no_grad():
            self.sigma_T = sigmas_of(model)
            self.alphas_cumprod_T = _kept(self.sigma_T, self.prediction)
            self._host_time_T = sampling.timestep(self.sigma_T.to(sampling.sigmas.device)).float().cpu().clone()
            self.network = _copied_network(model).to(device, dtype).eval().requires_grad_(False)
        self._dtype, self._process_timestep = dtype, getattr(model.model, "process_timestep", lambda time_B, **told: time_B)
        self._options = {"optimized_attention_override": _attention_with_gradients,
                         **model.model_options.get("transformer_options", {})}
        self._checkpointing = checkpointing
        self._checkpoint()

    def predict_noise(
        self, noised_B4hw: torch.Tensor, timestep_B: torch.Tensor, context_BKW: torch.Tensor,
        extra: Mapping[str, Any] = NO_EXTRA,
    ) -> torch.Tensor:
        """What the model gives (noise, velocity or flow), in float32, with gradients to the context.

        ``noised_B4hw`` keeps its variance at 1, which is what the host's UNets read; a flow model's latents are
        sigma noise + (1 - sigma) picture. ``extra`` goes to the model under the names it has in the host.

        Raises:
            TrainingError: a patch of the MODEL lets no gradients through.
        """
        sigma_B = self.sigma_T.to(timestep_B.device)[timestep_B]
        if self.prediction == "flow":
            size_B = (sigma_B.square() + (1 - sigma_B).square()).sqrt()
            noised_B4hw = noised_B4hw * size_B.reshape(-1, *(1,) * (noised_B4hw.ndim - 1))
        told = {name: self._told(value) for name, value in extra.items()}
        beside = told.pop("c_concat", None)
        time_B = self._process_timestep(self._host_time_T.to(timestep_B.device)[timestep_B], x=noised_B4hw, **told)
        read = noised_B4hw.to(self._dtype) if beside is None else torch.cat([noised_B4hw.to(self._dtype), beside], dim=1)
        options = {**self._options, "cond_or_uncond": [0], "sigmas": sigma_B}
        with _as_in_training(self.network):
            predicted_B4hw = self.network(read, time_B, context=context_BKW.to(self._dtype), control=None,
                                          transformer_options=options, **told)
        if context_BKW.requires_grad and not predicted_B4hw.requires_grad:
            raise TrainingError("a patch of this MODEL lets no gradients through its cross-attention, so nothing can be learnt "
                                "from it. Wire the MODEL without its attention patches into Train EMMA Module.")
        return predicted_B4hw.float()

    def without_numbers(self, dtype: torch.dtype) -> "HostDenoiser":
        """As `Denoiser.without_numbers`."""
        made = copy.copy(self)
        made.network, made._dtype = without_numbers(self.network, dtype), dtype
        made._checkpoint()
        return made

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self._dtype

    @property
    def numbers(self) -> int:
        """How many its network has."""
        return sum(value.numel() for value in (*self.network.parameters(), *self.network.buffers()))

    def with_attention(self, added: Mapping[tuple[str, int, int], Callable]) -> "HostDenoiser":
        """The same network, with more in some cross-attentions; what other patches put in their place stays.

        Args:
            added: the host's name of a layer -> (queries, extra_options) -> what is added to what it gives.
        """
        replaced = self._options.get("patches_replace", {})
        before = replaced.get("attn2", {})
        patches = {layer: _added_to(before.get(layer, before.get(layer[:2], _attention)), more)
                   for layer, more in added.items()}
        patched = copy.copy(self)
        patched._options = {**self._options, "patches_replace": {**replaced, "attn2": {**before, **patches}}}
        return patched

    def _checkpoint(self) -> None:
        for layer in _blocks(self.network) if self._checkpointing else ():
            vars(layer).pop("forward", None)  # of the network that this one is a copy of
            layer.forward = _checkpointed(layer.forward, self.network)

    def _told(self, value: Any) -> Any:
        is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(self._dtype) if is_number else value


def prediction_of(model) -> str:
    """"eps", "v" or "flow", by how the host turns the output of a MODEL into a picture.

    Raises:
        TrainingConfigError: it predicts something else, or not at 1000 timesteps.
    """
    sampling = model.get_model_object("model_sampling")
    denoised = type(sampling).calculate_denoised
    if denoised is comfy.model_sampling.CONST.calculate_denoised:
        return "flow"
    known = {comfy.model_sampling.EPS.calculate_denoised: "eps", comfy.model_sampling.V_PREDICTION.calculate_denoised: "v"}
    if denoised not in known:
        kinds = [kind.__name__ for kind in type(sampling).__mro__ if "calculate_denoised" in vars(kind)]
        raise TrainingConfigError(f"this MODEL ({type(model.model).__name__}, {model.model.model_type.name}) predicts by "
                                  f"{kinds[0]}; wanted EPS, V_PREDICTION or a flow (CONST). Use a checkpoint without a "
                                  "node that changes its sampling.")
    sigmas = getattr(sampling, "sigmas", None)
    if sigmas is None or len(sigmas) != TIMESTEPS or round(float(sampling.timestep(sigmas[-1:]))) != TIMESTEPS - 1:
        raise TrainingConfigError(f"this MODEL's sampling ({type(sampling).__name__}) does not count timesteps 0 to 999, which "
                                  "ELLA and modules need. Remove the node that changes the model's sampling.")
    return known[denoised]


def sigmas_of(model) -> torch.Tensor:
    """(T,) sigma at each timestep; a flow model's are spaced as it samples."""
    sampling = model.get_model_object("model_sampling")
    if prediction_of(model) != "flow":
        return sampling.sigmas.detach().cpu().clone()
    shift, share_T = time_of(sampling).shift, torch.arange(1, TIMESTEPS + 1) / TIMESTEPS
    return shift * share_T / (1 + (shift - 1) * share_T)


def context_width_of(model) -> int | None:
    """Width of the tokens that a MODEL's cross-attention reads beside an ELLA; None: it has none.

    Raises:
        TrainingConfigError: it reads more than a latent of 4 channels, a timestep and a context, or predicts no noise.
    """
    if prediction_of(model) == "flow":
        raise TrainingConfigError(f"this MODEL ({type(model.model).__name__}) is a flow model (CONST); wanted EPS or "
                                  "V_PREDICTION beside an ELLA. Use an SD1.5 checkpoint, or leave ELLA out.")
    unet = model.model.model_config.unet_config
    if unet.get("in_channels") != 4 or unet.get("adm_in_channels"):
        raise TrainingConfigError(f"this MODEL ({type(model.model).__name__}) reads {unet.get('in_channels')} channels"
                                  f"{' and a vector of sizes' if unet.get('adm_in_channels') else ''}; wanted 4 channels and "
                                  "no more beside an ELLA. Use an SD1.5 checkpoint that is made neither for inpainting "
                                  "nor for SDXL, or leave ELLA out.")
    return unet.get("context_dim")


def _copied_network(model) -> torch.nn.Module:
    # newer hosts stream weights through layers that a copy would not keep; their whole form is made first
    dynamic = getattr(model, "is_dynamic", bool)()
    whole = model.clone(disable_dynamic=True) if dynamic else model.clone()
    with torch.inference_mode():  # weights loaded by a node can be changed in this mode only
        comfy.model_management.load_models_gpu([whole], force_patch_weights=True, force_full_load=True)
    return copy.deepcopy(whole.model.diffusion_model)


def _kept(sigma_T: torch.Tensor, prediction: str) -> torch.Tensor:
    """(T,) share of the picture in the variance of noised latents."""
    if prediction == "flow":
        return (1 - sigma_T).square() / ((1 - sigma_T).square() + sigma_T.square())
    return 1 / (sigma_T.square() + 1)


def _blocks(network: torch.nn.Module) -> list[torch.nn.Module]:
    """UNets' blocks of layers; of transformers the blocks that follow one another."""
    found = [layer for layer in network.modules() if isinstance(layer, _CHECKPOINTED)]
    lists = [part for part in network.children() if isinstance(part, torch.nn.ModuleList)]
    return found or [block for blocks in lists for block in blocks if len(list(block.children())) > 1]


def _attention_with_gradients(chosen, *arguments, **options):
    """In place of the attention the host was started with: some of those have no backward pass."""
    return comfy.ldm.modules.attention.attention_pytorch(*arguments, **options)


def _attention(q_BSC, k_BKC, v_BKC, extra_options: Mapping[str, Any]) -> torch.Tensor:
    return comfy.ldm.modules.attention.attention_pytorch(q_BSC, k_BKC, v_BKC, extra_options["n_heads"])


def _added_to(attention: Callable, added: Callable) -> Callable:
    return lambda q, k, v, extra_options: attention(q, k, v, extra_options) + added(q, extra_options)


class _OutOfPlace(TorchFunctionMode):
    """`x += y` makes a new x."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        return (torch.add if function == torch.Tensor.add_ else function)(*arguments, **(named or {}))


@contextmanager
def _as_in_training(network: torch.nn.Module):
    """With the host's own sign for layers to leave out what has no backward pass; older hosts have none such."""
    before = getattr(comfy.model_management, "in_training", False)
    comfy.model_management.in_training = True
    try:
        with _OutOfPlace() if isinstance(network, _ADDS_IN_PLACE) else nullcontext():
            yield
    finally:
        comfy.model_management.in_training = before


def _checkpointed(forward, network: torch.nn.Module):
    def in_training(*arguments, **named):  # in the second pass too
        with _as_in_training(network):
            return forward(*arguments, **named)

    def run(*arguments, **named):
        # the UNet goes on writing into its options, and the second pass must see those of the first
        arguments = [dict(value) if isinstance(value, dict) else value for value in arguments]
        named = {name: dict(value) if isinstance(value, dict) else value for name, value in named.items()}
        return torch.utils.checkpoint.checkpoint(in_training, *arguments, use_reentrant=False, **named)

    return run
