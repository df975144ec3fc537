"""The block layout of Stable Diffusion 1.5 at a tenth of its width, and random models of other packs that fit it.

Shapes: B rows of one UNet call, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.ops
import torch
from safetensors.torch import save_file
from tiny_models import UNET, WIDTH, fill_, noise
from token_check import CallSpy

SD15_UNET = {
    **UNET, "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_output": [1] * 9 + [0] * 3,
}
CHANNELS = {320: 32, 640: 64, 1280: 128}
# of the 16 cross-attentions, in the order of IPAdapter's files: input, output and middle blocks
ATTENTION_WIDTHS = (32, 32, 64, 64, 128, 128, 128, 128, 128, 64, 64, 64, 32, 32, 32, 128)
CLIP_VISION = {"hidden_act": "gelu", "hidden_size": 32, "image_size": 224, "intermediate_size": 64, "layer_norm_eps": 1e-5,
               "model_type": "clip_vision_model", "num_attention_heads": 4, "num_channels": 3, "num_hidden_layers": 2,
               "patch_size": 56, "projection_dim": 16}


class FrameSpy(CallSpy):
    """Also knows which frames a call's rows are, by their likeness to the noise that the sampler began with."""

    def __init__(self, network: torch.nn.Module, noise_F4hw: torch.Tensor):
        super().__init__(network)
        self._noise_F4hw = noise_F4hw
        self.frames: list[list[int]] = []

    def _at_network(self, module, arguments, options):
        super()._at_network(module, arguments, options)
        groups = self._entered[1]
        x_B4hw = arguments[0][:arguments[0].shape[0] // len(groups)]
        likeness_BF = torch.nn.functional.normalize(x_B4hw.flatten(1)) @ torch.nn.functional.normalize(
            self._noise_F4hw.flatten(1)).T
        best_B2 = likeness_BF.topk(2).values
        assert (best_B2[:, 0] > 2 * best_B2[:, 1]).all(), "the frames of a call cannot be told apart"
        self.frames.append(likeness_BF.argmax(1).tolist())


def save_motion_module(animatediff_import, path: Path, middle: bool) -> None:
    """A random motion module: every layer of the released ones (v3, or v2 with its middle block), at a tenth of the width.

    Args:
        animatediff_import: imports modules of AnimateDiff-Evolved.
        path: of the file.
        middle: with a middle block.
    """
    motion = animatediff_import("animatediff.motion_module_ad")
    stub = {"down_blocks.3.temporal.attention_blocks.1.": noise((1,), 1), "up_blocks.3.temporal": noise((1,), 1),
            "down_blocks.0.temporal.pos_encoder.pe": torch.zeros(1, 32, CHANNELS[320])}
    if middle:
        stub["mid_block.temporal"] = noise((1,), 1)
    model = motion.AnimateDiffModel(stub, motion.normalize_ad_state_dict(dict(stub), path.name)[1])
    fill_(model, 91)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)


def narrow_motion_modules(monkeypatch, animatediff_import) -> None:
    """AnimateDiff-Evolved writes the widths of Stable Diffusion into its code: a tenth of them here."""
    motion = animatediff_import("animatediff.motion_module_ad")
    original = motion.get_motion_module
    monkeypatch.setattr(motion, "get_motion_module", lambda in_channels, *rest, **options: original(
        CHANNELS[in_channels], *rest, **options))


def controlnet(seed: int = 6) -> comfy.controlnet.ControlNet:
    """CONTROL_NET of the same layout."""
    names = ("image_size", "in_channels", "model_channels", "channel_mult", "num_res_blocks", "transformer_depth",
             "transformer_depth_middle", "context_dim", "num_heads", "use_spatial_transformer", "legacy")
    model = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init,
                                       **{name: SD15_UNET[name] for name in names})
    return comfy.controlnet.ControlNet(fill_(model, seed), load_device=comfy.model_management.get_torch_device())


def save_ipadapter(
    path: Path, token_width: int = WIDTH, widths: Sequence[int] = ATTENTION_WIDTHS,
    pictures_dim: int = CLIP_VISION["projection_dim"],
) -> None:
    """An IPAdapter of the basic kind: four tokens of the picture's embedding, for every cross-attention."""
    state = {"image_proj.proj.weight": noise((4 * token_width, pictures_dim), 92),
             "image_proj.proj.bias": noise((4 * token_width,), 93),
             "image_proj.norm.weight": torch.ones(token_width), "image_proj.norm.bias": torch.zeros(token_width)}
    state |= {f"ip_adapter.{2 * number + 1}.to_{kind}_ip.weight": noise((width, token_width), 94 + number) * token_width ** -0.5
              for number, width in enumerate(widths) for kind in "kv"}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
