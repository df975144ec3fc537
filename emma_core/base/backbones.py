"""The frozen diffusion model a module is trained on: the playground's, a diffusers folder, or an SD1.5-family file.

Shapes: B pictures H x W, K cross-attention tokens of width W (in BKW), latents 4 x h x w, T timesteps.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import EmmaWarning, FileError, TrainingConfigError
from ..files.tensor_file import check_finite, read_tensors, sha256_of_file
from ..playground import PLAYGROUND_DIR
from ..training.config import PLAYGROUND, BaseConfig
from .sd15_files import Sd15Model, load_autoencoder, load_folder, load_single_file

_PIXELS_AT_ONCE = 1 << 20  # that are encoded together: four pictures of 512 x 512
_LORA = "a LoRA for an SD1.5-family UNet"
# LyCORIS's other kinds, and DoRA: the weight is changed in another way than by a product of two matrices
_OTHER_KINDS = ("hada_", "lokr_", "lora_mid", "dora_scale", "lora_magnitude_vector")


@dataclass(eq=False)
class Backbone:
    """UNet and autoencoder, frozen: nothing of it learns, gradients flow through to the context.

    Args:
        unet: diffusers' UNet2DConditionModel.
        autoencoder: encodes to and decodes from unscaled latents; stays in float32, as it runs once for each picture.
        latent_scale: factor that gives latents unit deviation.
        prediction: what the UNet predicts, "eps" or "v".
        alphas_cumprod_T: (1000,) share of the latents' variance left at each timestep.
        name: for metadata: the file, and the LoRA merged into it.
        sha256: for metadata: hex digest of the file that the UNet is in.
    """

    unet: Any
    autoencoder: nn.Module
    latent_scale: float
    prediction: str
    alphas_cumprod_T: torch.Tensor
    name: str
    sha256: str

    @property
    def context_width(self) -> int:
        """Width of the cross-attention tokens."""
        return self.unet.config.cross_attention_dim

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the UNet's weights."""
        return next(self.unet.parameters()).dtype

    def predict_noise(
        self, noised_B4hw: torch.Tensor, timestep_B: torch.Tensor, context_BKW: torch.Tensor,
        image_embeds: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The UNet's own prediction (B, 4, h, w), eps or v, in float32; `image_embeds` is what an IP-Adapter sees."""
        added = None if image_embeds is None else {"image_embeds": image_embeds}
        predicted = self.unet(noised_B4hw.to(self.dtype), timestep_B, context_BKW.to(self.dtype), added_cond_kwargs=added,
                              return_dict=False)[0]
        return predicted.float()

    @torch.no_grad()
    def encode(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Pictures in [-1, 1], on any device -> latents (B, 4, h, w) of unit deviation: the posterior's mean, scaled."""
        device, (height, width) = next(self.autoencoder.parameters()).device, pixels_B3HW.shape[2:]
        parts = pixels_B3HW.split(max(1, _PIXELS_AT_ONCE // (height * width)))
        return torch.cat([self.autoencoder.encode(part.to(device, torch.float32)) for part in parts]) * self.latent_scale

    @torch.no_grad()
    def decode(self, latents_B4hw: torch.Tensor) -> torch.Tensor:
        """Latents of unit deviation -> pictures (B, 3, H, W) in [-1, 1], in float32 under autocast too: fp16 overflows."""
        with torch.autocast(latents_B4hw.device.type, enabled=False):
            return self.autoencoder.decode(latents_B4hw.float() / self.latent_scale)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Backbone:
        """Move it, and give the UNet's weights another type; also of what shares its weights."""
        # past diffusers' own `to`, which warns at every change of type
        nn.Module.to(self.unet, device, dtype or self.dtype)
        self.autoencoder.to(device)
        self.alphas_cumprod_T = self.alphas_cumprod_T.to(device)
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Compute the UNet's activations again in the backward pass: less memory, more time, the same gradients."""
        self.unet.enable_gradient_checkpointing()

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights; none wants a gradient."""
        yield from self.unet.parameters()
        yield from self.autoencoder.parameters()

    def twin(self) -> Backbone:
        """Another UNet on the very same weights (no copy): adapters put on it never touch this one."""
        with torch.device("meta"):
            unet = type(self.unet).from_config(self.unet.config)
        unet.requires_grad_(False).load_state_dict(self.unet.state_dict(keep_vars=True), strict=True, assign=True)
        unet.set_attn_processor(dict(self.unet.attn_processors))
        twin = copy.copy(self)
        twin.unet = unet.eval()
        return twin


def load_backbone(config: BaseConfig, dtype: torch.dtype = torch.float32) -> Backbone:
    """The model that `config` names: `playground`, a diffusers folder, or a single .safetensors file.

    Args:
        config: its `vae` replaces the autoencoder; its `lora` becomes part of the UNet.
        dtype: of the UNet's weights.
    Raises:
        FileError: not such a model (SDXL, SD2 and inpainting models are named), a pickle, damaged or incomplete weights.
        TrainingConfigError: a prediction that the playground has not; a LoRA without the package peft.
    """
    if config.checkpoint == PLAYGROUND:
        backbone = _playground(config)
    else:
        path = Path(config.checkpoint)
        load = load_folder if path.is_dir() else load_single_file
        backbone = _backbone(load(path, with_autoencoder=not config.vae), config)
    if config.lora:
        add_lora(backbone.unet, Path(config.lora), "base")
        backbone.unet.fuse_lora()
        backbone.unet.unload_lora()
        backbone.unet.requires_grad_(False)
        backbone.name += f" + {Path(config.lora).name}"
    return backbone.to("cpu", dtype)


def add_lora(unet: Any, path: Path, adapter: str) -> None:
    """Put a LoRA (kohya's or diffusers' layout) beside the UNet's weights, with the alphas of the file, frozen.

    Raises:
        FileError: no LoRA, LoHa, LoKr or DoRA, layers or sizes that this UNet has not, non-finite weights.
        TrainingConfigError: the package peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise TrainingConfigError(f"the LoRA {path.name} needs the package peft, which is not installed; wanted peft and "
                                  "diffusers. Install it: pip install peft")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    tensors, _ = read_tensors(path, _LORA)
    check_finite(tensors, path.name)
    other = next((key for key in tensors if any(kind in key for kind in _OTHER_KINDS)), None)
    if other is not None:
        raise FileError(f"{path.name} is no plain LoRA (it has {other}); wanted a LoRA of two matrices a layer. LoHa, LoKr, "
                        "LoCon with a core and DoRA are not supported: choose another file, or merge it into the base.")
    try:
        state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(path.parent), weight_name=path.name, use_safetensors=True, local_files_only=True, return_lora_metadata=True)
    except (ValueError, KeyError) as found:
        raise FileError(f"{path.name} is not {_LORA} that diffusers can read ({found}). Choose another file.") from found
    _check_places(unet, state, path.name)
    if any(key.startswith("text_encoder") for key in state):
        warnings.warn(f"{path.name} also changes the CLIP text encoder; that part is left out, as ELLA's tokens do not come "
                      "from CLIP.", EmmaWarning, stacklevel=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name=adapter, metadata=metadata)
    unet.requires_grad_(False)


def _check_places(unet: Any, state: dict[str, torch.Tensor], name: str) -> None:
    from diffusers.utils import convert_unet_state_dict_to_peft

    places = {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
    if not places:
        raise FileError(f"{name} has no weights for a UNet (unet.*, lora_unet_*); wanted {_LORA}. Choose another file.")
    if not any("lora_A" in key for key in places):
        places = convert_unet_state_dict_to_peft(places)
    # as the base calls them: an adapter that is there already puts `base_layer` into the names
    weights = {key.replace(".base_layer", ""): value for key, value in unet.state_dict().items()}
    for key, value in places.items():
        module, _, side = key.removesuffix(".weight").rpartition(".")
        weight = weights.get(f"{module}.weight")
        # down (lora_A) takes what the layer takes, up (lora_B) gives what it gives
        axis = {"lora_A": 1, "lora_B": 0}.get(side)
        if weight is None or axis is None or value.shape[axis] != weight.shape[axis]:
            size = "no such layer" if weight is None else f"a layer of shape {tuple(weight.shape)}"
            raise FileError(f"{name} changes {key} with shape {tuple(value.shape)}, and the base has {size}; wanted a LoRA "
                            "made for this kind of model. Choose another file.")


def _playground(config: BaseConfig) -> Backbone:
    from ..playground.autoencoder import LATENT_SCALE
    from ..playground.files import load_autoencoder as load_own
    from ..playground.files import load_unet
    from ..playground.unet import PlainAttention, alphas_cumprod

    if config.prediction == "v":
        raise TrainingConfigError("base.prediction is v, but the playground predicts eps. Set it to auto.")
    path = PLAYGROUND_DIR / "unet.safetensors"
    unet: Any = load_unet(path)
    unet.set_attn_processor(PlainAttention())
    own = load_autoencoder(Path(config.vae)) if config.vae else None
    return Backbone(unet, own or load_own(), own.latent_scale if own else LATENT_SCALE, "eps", alphas_cumprod(), PLAYGROUND,
                    sha256_of_file(path))


def _backbone(model: Sd15Model, config: BaseConfig) -> Backbone:
    autoencoder = model.autoencoder or load_autoencoder(Path(config.vae))
    prediction = config.prediction if config.prediction != "auto" else model.declared_prediction or "eps"
    return Backbone(model.unet, autoencoder, autoencoder.latent_scale, prediction, model.alphas_cumprod_T,
                    Path(config.checkpoint).name, model.sha256)
