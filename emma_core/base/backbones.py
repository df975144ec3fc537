"""The frozen diffusion model a module is trained on: the playground's, a diffusers folder, or a file, of SD1.5 or SDXL.

Shapes: B pictures H x W, K cross-attention tokens of width W (in BKW), latents 4 x h x w, T timesteps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SettingsError
from ..files.tensor_file import sha256_of_file
from ..playground import PLAYGROUND, PLAYGROUND_DIR
from .autoencoder_files import load_autoencoder
from .checkpoint_files import LoadedBase
from .config import PLAYGROUND_UNET, BaseConfig, is_playground, playground_spec
from .denoiser import NO_EXTRA
from .lora import merge_lora
from .spec import PLAYGROUND_SPEC, BaseSpec
from .unet_files import load_folder, load_single_file
from .without_numbers import without_numbers

_PIXELS_AT_ONCE = 1 << 20  # that are encoded together: four pictures of 512 x 512


@dataclass(eq=False)
class Backbone:
    """UNet and autoencoder, frozen: nothing of it learns, gradients flow through to the context. It is a `Denoiser`.

    Args:
        unet: diffusers' UNet2DConditionModel.
        autoencoder: encodes to and decodes from unscaled latents; stays in float32, as it runs once for each picture.
        spec: what kind of base it is.
        name: for metadata: the file, and the LoRA merged into it.
        sha256: for metadata: hex digest of the file that the UNet is in.
    """

    unet: Any
    autoencoder: nn.Module
    spec: BaseSpec
    name: str
    sha256: str
    alphas_cumprod_T: torch.Tensor = field(init=False)  # the spec's, on the device

    def __post_init__(self):
        self.alphas_cumprod_T = self.spec.alphas_cumprod_T

    @property
    def prediction(self) -> str:
        """What the UNet predicts, "eps" or "v"."""
        return self.spec.prediction

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
        extra: Mapping[str, Any] = NO_EXTRA,
    ) -> torch.Tensor:
        """As `Denoiser.predict_noise`."""
        predicted = self.unet(noised_B4hw.to(self.dtype), timestep_B, context_BKW.to(self.dtype),
                              added_cond_kwargs=dict(extra) or None, return_dict=False)[0]
        return predicted.float()

    @torch.no_grad()
    def encode(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Pictures in [-1, 1], on any device -> latents (B, 4, h, w) of unit deviation: the posterior's mean, scaled."""
        device, (height, width) = next(self.autoencoder.parameters()).device, pixels_B3HW.shape[2:]
        parts = pixels_B3HW.split(max(1, _PIXELS_AT_ONCE // (height * width)))
        return torch.cat([self.autoencoder.encode(part.to(device, torch.float32)) for part in parts]) * self.spec.latent_scale

    @torch.no_grad()
    def decode(self, latents_B4hw: torch.Tensor) -> torch.Tensor:
        """Latents of unit deviation -> pictures (B, 3, H, W) in [-1, 1], in float32 under autocast too: fp16 overflows."""
        with torch.autocast(latents_B4hw.device.type, enabled=False):
            return self.autoencoder.decode(latents_B4hw.float() / self.spec.latent_scale)

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

    def without_numbers(self, dtype: torch.dtype) -> Backbone:
        """As `Denoiser.without_numbers`; the autoencoder stays in float32."""
        made = copy.copy(self)
        made.unet, made.autoencoder = without_numbers(self.unet, dtype), without_numbers(self.autoencoder, torch.float32)
        return made

    def twin(self) -> Backbone:
        """Another UNet on the very same weights (no copy): adapters put on it never touch this one."""
        with torch.device("meta"):
            unet = type(self.unet).from_config(self.unet.config)
        unet.requires_grad_(False).load_state_dict(self.unet.state_dict(keep_vars=True), strict=True, assign=True)
        unet.set_attn_processor(dict(self.unet.attn_processors))
        twin = copy.copy(self)
        twin.unet = unet.eval()
        return twin


def load_backbone(config: BaseConfig, dtype: torch.dtype = torch.float32, text_is_used: bool = False) -> Backbone:
    """The model that `config` names: `playground`, another folder of its layout, a diffusers folder, or a .safetensors file.

    Args:
        config: its `vae` replaces the autoencoder; its `lora` becomes part of the UNet.
        dtype: of the UNet's weights.
        text_is_used: the base's own text encoders are, so that a LoRA's part for them has its effect there.
    Raises:
        FileError: not such a model (SD2 and inpainting models are named), a pickle, damaged or incomplete weights.
        SettingsError: a prediction that the playground has not.
    """
    if config.checkpoint == PLAYGROUND:
        if config.prediction == "v":
            raise SettingsError("base.prediction is v, but the playground predicts eps. Set it to auto.")
        backbone = _backbone(load_playground(with_autoencoder=not config.vae), config, PLAYGROUND)
    else:
        path = Path(config.checkpoint)
        backbone = _backbone(_load(path, not config.vae, torch.float32 if config.lora else dtype), config, path.name)
    if config.lora:
        merge_lora(backbone.unet, Path(config.lora), text_is_used)
        backbone.name += f" + {Path(config.lora).name}"
    return backbone.to("cpu", dtype)


def load_playground(folder: Path = PLAYGROUND_DIR, with_autoencoder: bool = True) -> LoadedBase:
    """The playground's UNet and autoencoder.

    Raises:
        FileError: a part is missing or damaged.
    """
    from ..playground.files import load_autoencoder as load_own
    from ..playground.files import load_unet
    from ..playground.unet import PlainAttention

    unet: Any = load_unet(folder / PLAYGROUND_UNET)
    unet.set_attn_processor(PlainAttention())
    own = load_own(PLAYGROUND_SPEC.latent_scale, folder / "autoencoder.safetensors") if with_autoencoder else None
    return LoadedBase(unet, own, playground_spec(folder), sha256_of_file(folder / PLAYGROUND_UNET))


def _load(path: Path, with_autoencoder: bool, dtype: torch.dtype) -> LoadedBase:
    if is_playground(path):
        return load_playground(path, with_autoencoder)
    return (load_folder if path.is_dir() else load_single_file)(path, with_autoencoder, dtype)


def _backbone(model: LoadedBase, config: BaseConfig, name: str) -> Backbone:
    autoencoder: Any = model.autoencoder or load_autoencoder(Path(config.vae), model.spec)
    prediction = model.spec.prediction if config.prediction == "auto" else config.prediction
    spec = replace(model.spec, prediction=prediction, latent_scale=autoencoder.latent_scale)
    return Backbone(model.unet, autoencoder, spec, name, model.sha256)
