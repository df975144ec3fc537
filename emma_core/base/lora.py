"""LoRAs on the UNet of a base."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch

from ..errors import EmmaWarning, FileError, SettingsError
from ..files.tensor_file import check_finite, read_tensors

_LORA = "a LoRA for an SD1.5-family UNet"
# LyCORIS's other kinds, and DoRA: the weight is changed in another way than by a product of two matrices
_OTHER_KINDS = ("hada_", "lokr_", "lora_mid", "dora_scale", "lora_magnitude_vector")


def add_lora(unet: Any, path: Path, adapter: str) -> None:
    """Put a LoRA (kohya's or diffusers' layout) beside the UNet's weights, with the alphas of the file, frozen.

    Raises:
        FileError: no LoRA, LoHa, LoKr or DoRA, layers or sizes that this UNet has not, non-finite weights.
        SettingsError: the package peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise SettingsError(f"the LoRA {path.name} needs the package peft, which is not installed; wanted peft and "
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
