"""Small weights under the names that the shipped workflows ask for, and the host's own executor in this process."""

from __future__ import annotations

import asyncio
import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path

import comfy.cldm.cldm
import comfy.ops
import comfy.sd1_clip
import comfy.taesd.taesd
import torch
from model_families import FAMILIES
from PIL import Image
from safetensors.torch import load_file, save_file
from sd15_layout import SD15_UNET, save_ipadapter
from sdxl_text import CHECKPOINT as SDXL_CHECKPOINT
from sdxl_text import FAMILY as SDXL
from tiny_models import UNET, TinyWorld, fill_, noise, save_t5

FACES = Path(__file__).resolve().parents[2] / "core" / "data" / "faces"
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
WIDTH = 768
# the narrowest UNet that the host's loader takes for Stable Diffusion 1.5
NARROWEST_UNET = {**UNET, "model_channels": 320, "channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [1],
                  "transformer_depth_output": [1, 1], "context_dim": WIDTH, "num_heads": 8}
# of SD1.5's layout for motion modules, which no loader of the host takes at a tenth of the width
FULL_LAYOUT_UNET = {**SD15_UNET, "context_dim": WIDTH}
_CONTROLNET_SIZES = ("image_size", "in_channels", "model_channels", "channel_mult", "num_res_blocks", "transformer_depth",
                     "transformer_depth_middle", "context_dim", "num_heads", "use_spatial_transformer", "legacy")


def save_workflow_files(tiny: TinyWorld, pack_import, base: Path) -> None:
    """Every file of the graphs, in the folders of a base directory; what is of 3 GB there is of a few MB here.

    The picture encoder under CLIP ViT-H's name is the playground's: the loader recognises files by their contents.
    """
    models = base / "models"
    for folder in ("checkpoints", "ella", "emma", "text_encoders", "clip_vision", "adaface", "controlnet"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    save_file(checkpoint(tiny), models / "checkpoints" / CHECKPOINT)
    pack_import("emma_core.files.connector_file").save_connector(
        tiny.ella(width=WIDTH).connector, models / "ella" / "ella-sd1.5-tsc-t5xl.safetensors")
    _save_text_encoder(models / "text_encoders" / "flan-t5-xl.safetensors")
    shipped = pack_import("emma_core.playground").PLAYGROUND_DIR / "encoder.safetensors"
    shutil.copy(shipped, models / "clip_vision" / "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")
    adaface = fill_(pack_import("emma_core.encoders.adaface").AdaFace(18), 80).state_dict()
    torch.save({"state_dict": {f"model.{key}": value for key, value in adaface.items()}},
               models / "adaface" / "adaface_ir101_webface12m.ckpt")
    save_module = pack_import("emma_core.files.module_file").save_module
    playground, face = {"family": "clip-miniature"}, {"family": "adaface-ir-18"}
    for seed, (condition, features, encoder) in enumerate((("style", {"global": (128, 4)}, playground), ("portrait", {
            "global": (128, 1), "face": (128, 2)}, playground), ("face", {"face": (512, 2)}, face))):
        module = tiny.module(condition, features, seed=20 + seed, width=WIDTH, encoder=encoder)
        save_module(module.module, models / "emma" / f"emma-{condition}-sd15.safetensors")
    sd15 = replace(FAMILIES["sd15"], text=lambda seed: noise((1, 77, WIDTH), seed))
    for family, name in ((sd15, "emma-style-sd15-clip"), (SDXL, "emma-style-sdxl")):
        module = tiny.token_module(family, "style", {"global": (128, 4)}, encoder=playground)
        save_module(module.module, models / "emma" / f"{name}.safetensors")
    (models / "checkpoints" / SDXL_CHECKPOINT).touch()  # a test double stands for it
    # for the cross-attentions of the narrowest UNet and the playground's pictures
    save_ipadapter(models / "ipadapter" / "ip-adapter_sd15.safetensors", WIDTH, (320,) * 4, pictures_dim=128)
    network = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init,
                                         **{name: NARROWEST_UNET[name] for name in _CONTROLNET_SIZES})
    save_file(_half(fill_(network, 6).state_dict()), models / "controlnet" / "control_v11p_sd15_canny_fp16.safetensors")
    save_photos(base / "input")


def checkpoint(tiny: TinyWorld) -> dict[str, torch.Tensor]:
    """A whole SD1.5 file for CheckpointLoaderSimple: the narrowest UNet, TAESD for the VAE, and CLIP-L at its own size."""
    clip = fill_(comfy.sd1_clip.SD1ClipModel(dtype=torch.float16), 60).clip_l.transformer
    vae = fill_(comfy.taesd.taesd.TAESD(), 61)
    vae.vae_scale.fill_(1)
    parts = {"model.diffusion_model.": tiny.model(sizes=NARROWEST_UNET).model.diffusion_model,
             "cond_stage_model.transformer.": clip, "first_stage_model.": vae}
    return _half({f"{prefix}{key}": value for prefix, part in parts.items() for key, value in part.state_dict().items()})


def narrow_checkpoint_loader(tiny: TinyWorld, host_nodes) -> type:
    """A test double of CheckpointLoaderSimple: its CLIP and VAE, a MODEL in SD1.5's full layout at a tenth of the width."""

    class NarrowCheckpoint(host_nodes.CheckpointLoaderSimple):
        def load_checkpoint(self, ckpt_name):
            _, clip, vae = super().load_checkpoint(ckpt_name)[:3]
            return tiny.model(sizes=FULL_LAYOUT_UNET), clip, vae

    return NarrowCheckpoint


def save_photos(folder: Path) -> None:
    """example.png, which every ComfyUI has, and other.png: photos of two people."""
    for name, person in (("example", "hopper"), ("other", "collins")):
        Image.open(FACES / f"{person}.jpg").convert("RGB").save(folder / f"{name}.png")


class Executor:
    """Validates and runs prompts as the server does; loaded models are kept from one to the next, as there."""

    def __init__(self):
        import execution  # after the host's nodes, as its modules and nodes.py have packages of one name
        from server import PromptServer

        newer = "cache_args" in inspect.signature(execution.PromptExecutor).parameters
        options = {"cache_args": {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}} if newer else {}
        self._executor = execution.PromptExecutor(PromptServer.instance, execution.CacheType.CLASSIC, **options)
        self._validate = execution.validate_prompt
        self._runs = 0

    def forget(self) -> None:
        """Drop what was kept, as a node type stands for another class now."""
        self._executor.reset()

    def run(self, prompt: dict) -> dict:
        """Outputs by node id.

        Raises:
            AssertionError: the host refuses the prompt, or a node failed.
        """
        self._runs += 1
        prompt = json.loads(json.dumps(prompt))
        _, error, outputs, node_errors = asyncio.run(self._validate(str(self._runs), prompt, None))
        assert not error and not node_errors, json.dumps([error, node_errors], indent=1, default=str)
        asyncio.run(self._executor.execute_async(prompt, str(self._runs), {}, outputs))
        failures = [message for kind, message in self._executor.status_messages if kind == "execution_error"]
        assert not failures, "\n".join(f"{one['node_type']}: {one['exception_message']}" for one in failures)
        return self._executor.history_result["outputs"]


def _save_text_encoder(path: Path) -> None:
    """The tiny T5 as one file, with the vocabulary of the tokenizer that the host has for T5."""
    save_t5(path.with_suffix(".made"))
    state = load_file(path.with_suffix(".made") / "model.safetensors")
    shutil.rmtree(path.with_suffix(".made"))
    save_file({**state, "shared.weight": noise((32128, state["shared.weight"].shape[1]), 62)}, path)


def _half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.half().contiguous() if value.is_floating_point() else value for key, value in state.items()}
