"""The host's MODEL as training sees it: a frozen copy of its UNet that lets gradients through to the context.

Shapes: B rows, K cross-attention tokens of width W, latents 4 x h x w, T timesteps.
"""

import copy

import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.model_management
import comfy.model_sampling
import torch
import torch.utils.checkpoint

from ..emma_core.base.schedule import TIMESTEPS
from ..emma_core.errors import TrainingConfigError, TrainingError

_CHECKPOINTED = (comfy.ldm.modules.diffusionmodules.openaimodel.ResBlock, comfy.ldm.modules.attention.SpatialTransformer)


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
            self.alphas_cumprod_T = 1 / (sampling.sigmas.detach().cpu().clone() ** 2 + 1)
            self.network = _copied_network(model).to(device, dtype).eval().requires_grad_(False)
        self._dtype = dtype
        self._options = {"optimized_attention_override": _attention_with_gradients,
                         **model.model_options.get("transformer_options", {})}
        for layer in self.network.modules():
            if checkpointing and isinstance(layer, _CHECKPOINTED):
                layer.forward = _checkpointed(layer.forward)

    def predict_noise(
        self, noised_B4hw: torch.Tensor, timestep_B: torch.Tensor, context_BKW: torch.Tensor
    ) -> torch.Tensor:
        """What the UNet gives (noise or velocity), in float32, with gradients to the context.

        ``noised_B4hw`` keeps its variance at 1, which is what the host's UNets read: no scaling by sigma is left to do.

        Raises:
            TrainingError: a patch of the MODEL lets no gradients through.
        """
        kept_B = self.alphas_cumprod_T.to(timestep_B.device)[timestep_B]
        options = {**self._options, "cond_or_uncond": [0], "sigmas": ((1 - kept_B) / kept_B).sqrt()}
        predicted_B4hw = self.network(noised_B4hw.to(self._dtype), timestep_B.float(), context=context_BKW.to(self._dtype),
                                      transformer_options=options)
        if context_BKW.requires_grad and not predicted_B4hw.requires_grad:
            raise TrainingError("a patch of this MODEL lets no gradients through its cross-attention, so nothing can be learnt "
                                "from it. Wire the MODEL without its attention patches into Train EMMA Module.")
        return predicted_B4hw.float()


def prediction_of(model) -> str:
    """"eps" or "v", by how the host turns the output of a MODEL's UNet into a picture.

    Raises:
        TrainingConfigError: it predicts something else, or not at 1000 timesteps.
    """
    sampling = model.get_model_object("model_sampling")
    denoised = type(sampling).calculate_denoised
    known = {comfy.model_sampling.EPS.calculate_denoised: "eps", comfy.model_sampling.V_PREDICTION.calculate_denoised: "v"}
    if denoised not in known:
        kinds = [kind.__name__ for kind in type(sampling).__mro__ if "calculate_denoised" in vars(kind)]
        raise TrainingConfigError(f"this MODEL ({type(model.model).__name__}, {model.model.model_type.name}) predicts by "
                                  f"{kinds[0]}; wanted EPS or V_PREDICTION. Use an SD1.5 checkpoint, without a node that "
                                  "changes its sampling.")
    sigmas = getattr(sampling, "sigmas", None)
    if sigmas is None or len(sigmas) != TIMESTEPS or round(float(sampling.timestep(sigmas[-1:]))) != TIMESTEPS - 1:
        raise TrainingConfigError(f"this MODEL's sampling ({type(sampling).__name__}) does not count timesteps 0 to 999, which "
                                  "ELLA needs. Remove the node that changes the model's sampling.")
    return known[denoised]


def context_width_of(model) -> int | None:
    """Width of the tokens that a MODEL's cross-attention reads; None: it has none.

    Raises:
        TrainingConfigError: it reads more than a latent of 4 channels, a timestep and a context.
    """
    unet = model.model.model_config.unet_config
    if unet.get("in_channels") != 4 or unet.get("adm_in_channels"):
        raise TrainingConfigError(f"this MODEL ({type(model.model).__name__}) reads {unet.get('in_channels')} channels"
                                  f"{' and a vector of sizes' if unet.get('adm_in_channels') else ''}; wanted 4 channels and "
                                  "no more. Use an SD1.5 checkpoint that is made neither for inpainting nor for SDXL.")
    return unet.get("context_dim")


def _copied_network(model) -> torch.nn.Module:
    # newer hosts stream weights through layers that a copy would not keep; their whole form is made first
    dynamic = getattr(model, "is_dynamic", bool)()
    whole = model.clone(disable_dynamic=True) if dynamic else model.clone()
    with torch.inference_mode():  # weights loaded by a node can be changed in this mode only
        comfy.model_management.load_models_gpu([whole], force_patch_weights=True, force_full_load=True)
    return copy.deepcopy(whole.model.diffusion_model)


def _attention_with_gradients(chosen, *arguments, **options):
    """In place of the attention the host was started with: some of those have no backward pass."""
    return comfy.ldm.modules.attention.attention_pytorch(*arguments, **options)


def _checkpointed(forward):
    def run(*arguments):
        # the UNet goes on writing into its options, and the second pass must see those of the first
        arguments = [dict(value) if isinstance(value, dict) else value for value in arguments]
        return torch.utils.checkpoint.checkpoint(forward, *arguments, use_reentrant=False)

    return run
