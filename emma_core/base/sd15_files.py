"""Stable Diffusion 1.5 and its kin on disk: diffusers folders and single files in the original (LDM) layout, read strictly.

Widths are read from the weights, so smaller models of the same build load too. Nothing is ever downloaded.
Shapes: B pictures H x W, latents 4 x h x w, T timesteps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import FileError
from ..files.tensor_file import PICKLE_SUFFIXES, check_finite, check_shapes, open_tensors, sha256_of_file
from ..playground.unet import TIMESTEPS, alphas_cumprod

LATENT_CHANNELS = 4
_UNET, _VAE = "an SD1.5-family UNet", "an SD1.5-family autoencoder"
_CHECKPOINT = "an SD1.5-family checkpoint"
# What shapes do not tell; the rest of SD1.5's configuration is diffusers' default. diffusers' `attention_head_dim` is here
# the number of heads.
_HEADS = 8
_SD15_SCALE = 0.18215
_UNET_PREFIX, _VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
_OTHER_WIDTHS = {1024: "Stable Diffusion 2", 1280: "the SDXL refiner", 2048: "SDXL"}
_OTHER_INPUTS = {5: "a depth-to-image model", 8: "InstructPix2Pix or another editing model", 9: "an inpainting model"}
_DECLARED = {"epsilon": "eps", "eps": "eps", "v_prediction": "v", "v": "v"}
# names of attention layers in autoencoder folders of before 2023
_OLD_ATTENTION = re.compile(r"(.*mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)")
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class KlAutoencoder(nn.Module):
    """diffusers' AutoencoderKL as the playground's autoencoder is used: unscaled latents, the posterior's mean."""

    def __init__(self, model: nn.Module, latent_scale: float):
        super().__init__()
        self.model = model
        self.latent_scale = latent_scale

    def encode(self, image_B3HW: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, 4, h, w)."""
        return self.model.encode(image_B3HW).latent_dist.mean

    def decode(self, latent_B4hw: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w) -> picture (B, 3, H, W) in [-1, 1]."""
        return self.model.decode(latent_B4hw, return_dict=False)[0].clamp(-1, 1)


@dataclass(frozen=True)
class Sd15Model:
    """What a checkpoint holds, in float32 on the CPU. `autoencoder` is None where it was not asked for."""

    unet: nn.Module
    autoencoder: KlAutoencoder | None
    alphas_cumprod_T: torch.Tensor
    declared_prediction: str | None
    sha256: str


def load_folder(folder: Path, with_autoencoder: bool = True) -> Sd15Model:
    """A diffusers folder with unet/, scheduler/ and vae/.

    Raises:
        FileError: parts that are missing, pickled, of another model, damaged; a schedule that is not of 1000 timesteps.
    """
    config = _read_json(folder / "unet" / "config.json")
    name = f"{folder.name}/unet"
    _refuse_other_models(config.get("in_channels"), config.get("cross_attention_dim"), name)
    weights = _weights_in(folder / "unet")
    from diffusers import UNet2DConditionModel

    unet = _build(UNet2DConditionModel, config, _read(weights, _UNET), name, _UNET)
    alphas_cumprod_T, prediction = _read_schedule(folder)
    autoencoder = load_autoencoder(folder / "vae") if with_autoencoder else None
    return Sd15Model(unet, autoencoder, alphas_cumprod_T, prediction, sha256_of_file(weights))


def load_single_file(path: Path, with_autoencoder: bool = True) -> Sd15Model:
    """A whole checkpoint in one file: `model.diffusion_model.*` and `first_stage_model.*`; the text encoder is not read.

    What the UNet predicts is declared by the metadata `modelspec.prediction_type` or by a marker key `v_pred`; a key
    `ztsnr` declares a schedule that ends without signal.

    Raises:
        FileError: no such file, a pickle, another model, missing, unexpected, misshapen or non-finite weights.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    shapes, metadata = _shapes_of(path, _CHECKPOINT)
    config = unet_config_of({key.removeprefix(_UNET_PREFIX): shape for key, shape in shapes.items()
                             if key.startswith(_UNET_PREFIX)}, path.name)
    if with_autoencoder and not any(key.startswith(_VAE_PREFIX) for key in shapes):
        raise FileError(f"{path.name} holds no autoencoder; wanted first_stage_model.* beside the UNet. Name one as base.vae.")
    found = _read(path, _CHECKPOINT, (_UNET_PREFIX,))
    # both helpers of diffusers drop what they do not know, so nothing may be lost
    converted = _without_loss(found, convert_ldm_unet_checkpoint(dict(found), config), path.name)
    unet = _build(UNet2DConditionModel, config, converted, path.name, _UNET)
    autoencoder = load_autoencoder(path) if with_autoencoder else None
    alphas_cumprod_T = _zero_terminal(alphas_cumprod()) if "ztsnr" in shapes else alphas_cumprod()
    return Sd15Model(unet, autoencoder, alphas_cumprod_T, _declared(shapes, metadata, path.name), sha256_of_file(path))


def load_autoencoder(path: Path) -> KlAutoencoder:
    """An autoencoder: a diffusers folder (or one with vae/ in it), a single file in either layout, or a whole checkpoint.

    Raises:
        FileError: no such thing, a pickle, other latents than four channels, missing, unexpected or non-finite weights.
    """
    if path.is_dir():
        folder = path if (path / "config.json").exists() else path / "vae"
        config = _read_json(folder / "config.json")
        tensors = _read(_weights_in(folder), _VAE)
        return _autoencoder(config, tensors, f"{folder.parent.name}/{folder.name}")
    shapes, _ = _shapes_of(path, _VAE)
    prefix = _VAE_PREFIX if any(key.startswith(_VAE_PREFIX) for key in shapes) else ""
    parts = tuple(f"{prefix}{part}" for part in _VAE_PARTS)
    tensors = {key.removeprefix(prefix): value for key, value in _read(path, _VAE, parts).items()}
    config = vae_config_of({key: tuple(value.shape) for key, value in tensors.items()}, path.name)
    if "encoder.down.0.block.0.conv1.weight" in tensors:
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        tensors = _without_loss(tensors, convert_ldm_vae_checkpoint(dict(tensors), config), path.name)
    return _autoencoder(config, tensors, path.name)


def unet_config_of(shapes: Mapping[str, tuple[int, ...]], name: str) -> dict[str, Any]:
    """diffusers' configuration of a UNet in the LDM layout (names without prefix), from its shapes.

    Raises:
        FileError: no such UNet, or that of another model.
    """
    first, key = shapes.get("input_blocks.0.0.weight"), "attn2.to_k.weight"
    contexts = {shape[1] for layer, shape in shapes.items() if layer.endswith(key)}
    if first is None or not contexts:
        raise FileError(f"{name} holds no {_UNET_PREFIX}* weights of a UNet with cross-attention; wanted {_CHECKPOINT}, UNet "
                        "and autoencoder in one file. Choose another file, or the diffusers folder as a whole.")
    context_width = max(contexts)
    _refuse_other_models(first[1], context_width, name, more="label_emb.0.0.weight" in shapes)
    widths, attends, layers = _levels(shapes)
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)]
    return {"in_channels": first[1], "out_channels": LATENT_CHANNELS, "block_out_channels": widths, "layers_per_block": layers,
            "down_block_types": down, "up_block_types": up, "cross_attention_dim": context_width,
            "attention_head_dim": _HEADS}


def vae_config_of(shapes: Mapping[str, tuple[int, ...]], name: str) -> dict[str, Any]:
    """diffusers' configuration of an autoencoder in the LDM layout, or in diffusers' own, from its shapes.

    Raises:
        FileError: no such autoencoder, or one with other latents.
    """
    last = shapes.get("encoder.conv_out.weight")
    widths, layers = [], 0
    for layer in ("encoder.down.{}.block.{}.conv1.weight", "encoder.down_blocks.{}.resnets.{}.conv1.weight"):
        while layer.format(len(widths), 0) in shapes:
            widths.append(shapes[layer.format(len(widths), 0)][0])
        layers = layers or sum(layer.format(0, index) in shapes for index in range(8))
    if last is None or not widths:
        raise FileError(f"{name} holds no autoencoder (encoder.*, decoder.*); wanted {_VAE}. Choose another file.")
    if last[0] != 2 * LATENT_CHANNELS:
        raise FileError(f"{name} has latents of {last[0] // 2} channels; wanted {LATENT_CHANNELS}, as {_VAE} has. Choose an "
                        "autoencoder made for Stable Diffusion 1.5.")
    return {"block_out_channels": widths, "layers_per_block": layers, "latent_channels": LATENT_CHANNELS,
            "down_block_types": ["DownEncoderBlock2D"] * len(widths), "up_block_types": ["UpDecoderBlock2D"] * len(widths),
            "scaling_factor": _SD15_SCALE}


def _levels(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[int], list[bool], int]:
    """Width of each resolution, whether it attends, and residual blocks in one."""
    widths, attends, layers, block = [0], [False], 0, 1
    while any(f"input_blocks.{block}.0.{kind}.weight" in shapes for kind in ("op", "out_layers.3")):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            widths.append(0)
            attends.append(False)
        else:
            widths[-1] = shapes[f"input_blocks.{block}.0.out_layers.3.weight"][0]
            attends[-1] |= f"input_blocks.{block}.1.proj_in.weight" in shapes
            layers += len(widths) == 1
        block += 1
    return widths, attends, layers


def _refuse_other_models(in_channels: Any, context_width: Any, name: str, more: bool = False) -> None:
    kind = "SDXL" if more else _OTHER_INPUTS.get(in_channels) or _OTHER_WIDTHS.get(context_width)
    if kind is None and in_channels == LATENT_CHANNELS and isinstance(context_width, int):
        return
    raise FileError(f"{name} is {kind or 'another model'}: {in_channels} input channels, cross-attention of width "
                    f"{context_width}; wanted Stable Diffusion 1.5 or a model tuned from it: {LATENT_CHANNELS} input "
                    "channels, width 768. Choose such a checkpoint.")


def _autoencoder(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], name: str) -> KlAutoencoder:
    from diffusers import AutoencoderKL

    if config.get("latent_channels") != LATENT_CHANNELS:
        raise FileError(f"{name} has latents of {config.get('latent_channels')} channels; wanted {LATENT_CHANNELS}, as {_VAE} "
                        "has. Choose an autoencoder made for Stable Diffusion 1.5.")
    renamed = {}
    for key, value in tensors.items():
        old = _OLD_ATTENTION.fullmatch(key)
        renamed[f"{old[1]}.{_OLD_NAMES[old[2]]}.{old[3]}" if old else key] = value
    model = _build(AutoencoderKL, config, renamed, name, _VAE)
    return KlAutoencoder(model, float(config.get("scaling_factor", _SD15_SCALE)))


def _build(kind: Any, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], name: str, what: str) -> nn.Module:
    """The model with the tensors as its float32 weights, none missing, none left over, all finite."""
    with torch.device("meta"):
        model = kind.from_config(dict(config))
    check_shapes(tensors, {key: tuple(value.shape) for key, value in model.state_dict().items()}, name, what)
    check_finite(tensors, name)
    model.load_state_dict({key: value.to(torch.float32, copy=True) for key, value in tensors.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _read_schedule(folder: Path) -> tuple[torch.Tensor, str]:
    """(1000,) alphas_cumprod and the declared prediction of a folder's scheduler."""
    from diffusers import DDPMScheduler

    config = _read_json(folder / "scheduler" / "scheduler_config.json")
    declared, steps = config.get("prediction_type", "epsilon"), config.get("num_train_timesteps", TIMESTEPS)
    if declared not in _DECLARED or steps != TIMESTEPS:
        raise FileError(f"{folder.name}/scheduler declares prediction {declared!r} over {steps} timesteps; wanted epsilon or "
                        f"v_prediction over {TIMESTEPS}. Choose another model.")
    # only what makes the schedule: folders name many kinds of scheduler
    made_of = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    scheduler = DDPMScheduler(**{key: config[key] for key in made_of if key in config})
    return scheduler.alphas_cumprod.float(), _DECLARED[declared]


def _declared(shapes: Mapping[str, Any], metadata: Mapping[str, str], name: str) -> str | None:
    declared = metadata.get("modelspec.prediction_type")
    if declared is not None and declared not in _DECLARED:
        raise FileError(f"{name}: its metadata modelspec.prediction_type is {declared!r}; wanted one of "
                        f"{', '.join(_DECLARED)}. Choose another model.")
    return "v" if declared is None and "v_pred" in shapes else _DECLARED.get(declared or "")


def _zero_terminal(alphas_cumprod_T: torch.Tensor) -> torch.Tensor:
    # Lin et al. 2023 (arXiv:2305.08891), algorithm 1: shift the last sqrt(alpha bar) to 0, scale the first back
    root_T = alphas_cumprod_T.double().sqrt()
    return ((root_T - root_T[-1]) * root_T[0] / (root_T[0] - root_T[-1])).square().float()


def _without_loss(found: Mapping, converted: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    kept = {value.data_ptr() for value in converted.values()}
    lost = [key for key, value in found.items() if value.data_ptr() not in kept]
    if lost:
        raise FileError(f"{name} has {len(lost)} weights that SD1.5 has not, such as {lost[0]}; wanted {_CHECKPOINT}. Choose "
                        "another file.")
    return converted


def _shapes_of(path: Path, what: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    with open_tensors(path, what) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
        return shapes, dict(file.metadata() or {})


def _read(path: Path, what: str, starts: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
    with open_tensors(path, what) as file:
        return {key: file.get_tensor(key) for key in list(file.keys()) if key.startswith(starts)}


def _weights_in(folder: Path) -> Path:
    for name in _WEIGHTS:
        if (folder / name).exists():
            return folder / name
    pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLE_SUFFIXES]
    found = f"holds only {pickles[0]}, a pickled file, which can run code when opened" if pickles else "holds no weights"
    raise FileError(f"{folder} {found}; wanted {_WEIGHTS[0]}. Download the safetensors version.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as found:
        raise FileError(f"{path} cannot be read ({found.strerror}); wanted a diffusers folder with unet/, vae/ and "
                        "scheduler/. Check the path, or download what is missing.") from found
    except ValueError as found:
        raise FileError(f"{path} is not JSON ({found}). Download it again.") from found
    if not isinstance(content, dict):
        raise FileError(f"{path} is not a JSON object. Download it again.")
    return content
