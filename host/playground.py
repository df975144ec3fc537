"""The shipped small world in the host's own classes: its UNet, T5 and samplers run our weights."""

from dataclasses import dataclass
from functools import cached_property

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import comfy.utils
import numpy as np
import torch
from PIL import Image

from ..emma_core.base.spec import PLAYGROUND_SPEC
from ..emma_core.errors import FileError, ImageInputError
from ..emma_core.playground import PLAYGROUND_DIR, REFERENCES_DIR, load_autoencoder, reference_names, unet_tensors_and_config
from ..emma_core.playground.autoencoder import Autoencoder
from .encoders import load_playground_reference_encoder
from .loaded import LoadedConnector, LoadedEncoder, LoadedModule, load_ella, load_emma_module, patcher_for
from .playground_notices import with_notices, with_word_notices
from .text_encoder import load_text_encoder_clip


@dataclass(frozen=True)
class Playground:
    """Everything that the node hands out."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE
    ella: LoadedConnector
    style: LoadedModule
    face: LoadedModule
    object: LoadedModule
    encoder: LoadedEncoder


def load_playground() -> Playground:
    """All parts, from the pack's own folder."""
    return Playground(
        model=with_notices(load_unet()),
        clip=with_word_notices(load_text_encoder_clip(PLAYGROUND_DIR / "t5.safetensors", dtype="fp32")),
        vae=load_vae(),
        ella=load_ella(str(PLAYGROUND_DIR / "ella.safetensors")),
        style=load_emma_module(str(PLAYGROUND_DIR / "emma-style.safetensors")),
        face=load_emma_module(str(PLAYGROUND_DIR / "emma-face.safetensors")),
        object=load_emma_module(str(PLAYGROUND_DIR / "emma-object.safetensors")),
        encoder=load_playground_reference_encoder(),
    )


class PlaygroundLatents(comfy.latent_formats.SD15):
    """SD1.5's layout and scale, but previews while sampling show what the playground's own autoencoder makes of them.

    Hosts that let a format change its latents before their linear map to colours show the picture itself; others the nearest
    linear map, which is pale.
    """

    def __init__(self):
        super().__init__()
        self.taesd_decoder_name = None  # SD1.5's would show nonsense
        if hasattr(comfy.latent_formats.LatentFormat, "latent_rgb_factors_reshape"):
            self.latent_rgb_factors_reshape = self._decoded
            self.latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
        else:
            # least squares over 4,000 emoji: latents of deviation 1 -> mean colour of their 8 x 8 pixels, -1 to 1
            self.latent_rgb_factors = [[0.0323, 0.1656, 0.3173], [-0.0527, -0.1016, -0.1670], [0.2844, 0.1390, -0.0700],
                                       [-0.2373, -0.1833, -0.2050]]
            self.latent_rgb_factors_bias = [0.5944, 0.5295, 0.4747]

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        return load_autoencoder(latent_scale=1.0)

    @torch.no_grad()
    def _decoded(self, unit_B4hw: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w) of deviation 1 -> (1, 3, H, W) in [-1, 1]: the first alone is shown."""
        return self._autoencoder.decode(unit_B4hw[:1].float().cpu())


def load_unet() -> comfy.model_patcher.ModelPatcher:
    """The UNet as a model of the SD1.5 family, in float32."""
    tensors, config = unet_tensors_and_config()
    unet_config = host_unet_config(config)
    model_config = comfy.supported_models.SD15(unet_config)
    model_config.latent_format = PlaygroundLatents()
    model_config.set_inference_dtype(torch.float32, None)
    names = comfy.utils.unet_to_diffusers(unet_config)
    missing = sorted(set(tensors) - set(names))
    if missing:
        raise FileError(f"this ComfyUI has no name for {len(missing)} weights of the playground's UNet ({missing[0]}, ...). "
                        "Update ComfyUI-EMMA or ComfyUI.")
    model = model_config.get_model({}, "", device=comfy.model_management.unet_offload_device())
    model.diffusion_model.load_state_dict({names[name]: tensor.float() for name, tensor in tensors.items()})
    return patcher_for(model)


def host_unet_config(config: dict) -> dict:
    """diffusers' configuration of an SD1.5-like UNet in the host's terms."""
    widths = config["block_out_channels"]
    per_level = config["layers_per_block"]
    levels = len(widths)
    down = [int(kind.startswith("CrossAttn")) for kind in config["down_block_types"]]
    up = [int(kind.startswith("CrossAttn")) for kind in reversed(config["up_block_types"])]
    return {
        "image_size": config["sample_size"], "in_channels": config["in_channels"], "out_channels": config["out_channels"],
        "model_channels": widths[0], "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [per_level] * levels, "transformer_depth": [depth for depth in down for _ in range(per_level)],
        "transformer_depth_output": [depth for depth in up for _ in range(per_level + 1)], "transformer_depth_middle": 1,
        "context_dim": config["cross_attention_dim"], "num_heads": config["attention_head_dim"], "num_head_channels": -1,
        "use_linear_in_transformer": False, "use_spatial_transformer": True, "legacy": False, "adm_in_channels": None,
        "use_temporal_attention": False,
    }


class _HostAutoencoder(torch.nn.Module):
    """The methods that the host's VAE calls on its model."""

    autoencoder: Autoencoder

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def encode(self, pixels_B3HW: torch.Tensor, **options) -> torch.Tensor:
        return self.autoencoder.encode(pixels_B3HW)

    def decode(self, latent_B4hw: torch.Tensor, **options) -> torch.Tensor:
        return self.autoencoder.decode(latent_B4hw)


def load_vae() -> comfy.sd.VAE:
    """The autoencoder as the host's VAE; it has SD's latent layout (4 channels, 8 pixels a cell)."""
    # The host sets itself up for its own small 4-channel, 8x autoencoder; ours takes that one's place.
    vae = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD().state_dict(), dtype=torch.float32)
    autoencoder = load_autoencoder(PLAYGROUND_SPEC.latent_scale, operations=comfy.ops.manual_cast)
    vae.first_stage_model = _HostAutoencoder(autoencoder).eval()
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    return vae


def reference_picture(name: str) -> torch.Tensor:
    """A shipped reference picture as IMAGE (1, H, W, 3).

    Raises:
        FileError: no such picture.
    """
    path = REFERENCES_DIR / f"{name}.png"
    if name not in reference_names():
        raise FileError(f"the playground has no picture named {name!r}; it has {', '.join(reference_names())}. "
                        "Choose one of these, or use Load Image for a picture of your own.")
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255)[None]


def batch_of(pictures_BHW3: torch.Tensor | None, picture_1HW3: torch.Tensor) -> torch.Tensor:
    """A picture behind earlier ones, IMAGE (B + 1, H, W, 3).

    Raises:
        ImageInputError: the earlier ones have another size.
    """
    if pictures_BHW3 is None:
        return picture_1HW3
    if pictures_BHW3.shape[1:] != picture_1HW3.shape[1:]:
        found, wanted = (f"{one.shape[2]} x {one.shape[1]}" for one in (pictures_BHW3, picture_1HW3))
        raise ImageInputError(f"the earlier pictures are {found}, the playground's {wanted}: one batch holds one size. Wire "
                              "another Load Playground Picture into `pictures`, or scale yours to that size.")
    return torch.cat([pictures_BHW3, picture_1HW3])
