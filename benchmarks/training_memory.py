"""Peak memory of training a module: what `train --dry-run` computes from sizes, against what a process really takes.

    python benchmarks/training_memory.py [--side 256] [--batch 2] [--channels 320] [--teacher none|lora|ip-adapter]

A UNet, an ELLA and an autoencoder of SD1.5's sizes with random weights, in float32 on the CPU, by the preset `small-card`: two
updates. Teachers: a LoRA of rank 16 on all attention, or a plain IP-Adapter with its CLIP ViT-H/14. The process's own peak is
read from Linux's /proc.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

from emma_core.base.autoencoder_files import KlAutoencoder
from emma_core.base.backbones import Backbone
from emma_core.base.spec import SD15
from emma_core.encoders.clip_vision import clip_shapes
from emma_core.encoders.families import CLIP_TOWERS
from emma_core.model.connector import Connector, ConnectorConfig
from emma_core.training.beginning import Frozen, begin
from emma_core.training.config import TeacherConfig, resolve
from emma_core.training.losses import TimestepBuckets
from emma_core.training.memory import needed, resident_bytes
from emma_core.training.teacher import Teacher
from emma_core.training.teachers import load_teacher

_TOKENS, _CLIP_DIM, _RANK = 32, 1024, 16


class RandomSet:
    """One picture's latent, text and reference, which a teacher sees as a file."""

    def __init__(self, side_px: int, picture: Path):
        self._side_px = side_px
        self.pictures = SimpleNamespace(pictures=[picture, picture])

    def __len__(self) -> int:
        return 2

    def bucket(self, index):
        return self._side_px, self._side_px

    def group(self, index):
        return ""

    def captions(self, index):
        return ("a caption",)

    def references(self, index):
        return (index,)

    def variants(self, reference):
        return 1

    def latent(self, index, flipped=False):
        return torch.randn(4, self._side_px // 8, self._side_px // 8)

    def text(self, caption):
        return torch.randn(1, _TOKENS, ConnectorConfig().text_dim)

    def features(self, reference, variant):
        return {"global": torch.randn(1, _CLIP_DIM)}

    def mark(self):
        return "random"

    def summary(self):
        return {}


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """In place of a model's on the meta device."""
    model = model.to_empty(device="cpu")
    for value in model.parameters():
        torch.nn.init.uniform_(value, -0.02, 0.02)
    return model.eval().requires_grad_(False)


def backbone(channels: int) -> Backbone:
    """SD1.5's sizes; fewer channels make a narrower UNet of the same build."""
    widths = (channels, 2 * channels, 4 * channels, 4 * channels)
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=768, attention_head_dim=8)
        autoencoder = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                                    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    return Backbone(random_weights(unet), KlAutoencoder(random_weights(autoencoder), SD15.latent_scale), SD15, "random", "")


def teacher_on(base: Backbone, kind: str, folder: Path) -> Teacher | None:
    """Files of the real sizes with random weights, loaded as a run loads them."""
    layers = [name.removesuffix(".processor") for name in base.unet.attn_processors]
    sizes = {key: tuple(value.shape) for key, value in base.unet.state_dict().items()}
    path, encoder = folder / "teacher.safetensors", folder / "clip.safetensors"
    if kind == "lora":
        ends = [(layer, sizes[f"{layer}.weight"]) for name in layers for layer in
                (f"{name}.to_q", f"{name}.to_k", f"{name}.to_v", f"{name}.to_out.0")]
        save_random(path, {f"unet.{layer}.lora_{side}.weight": shape for layer, (out, taken) in ends
                           for side, shape in (("A", (_RANK, taken)), ("B", (out, _RANK)))})
        return load_teacher(TeacherConfig(lora=str(path)), base)
    if kind == "ip-adapter":
        width, cross = SD15.context_width, [name for name in layers if name.endswith("attn2")]
        save_random(path, {"image_proj.proj.weight": (4 * width, _CLIP_DIM), "image_proj.proj.bias": (4 * width,),
                           "image_proj.norm.weight": (width,), "image_proj.norm.bias": (width,),
                           **{f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight": sizes[f"{name}.to_{part}.weight"]
                              for number, name in enumerate(cross) for part in "kv"}})
        save_random(encoder, clip_shapes(CLIP_TOWERS["clip-vit-h-14"]))
        return load_teacher(TeacherConfig(ip_adapter=str(path), ip_image_encoder=str(encoder)), base)
    return None


def save_random(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """In half precision, as such files are published."""
    save_file({key: torch.empty(shape, dtype=torch.float16).uniform_(-0.02, 0.02) for key, shape in shapes.items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--channels", type=int, default=320, help="of the UNet's widest pictures; SD1.5 has 320")
    parser.add_argument("--teacher", choices=["none", "lora", "ip-adapter"], default="none")
    options = parser.parse_args()
    before = resident_bytes()
    base, connector = backbone(options.channels), random_weights(Connector(ConnectorConfig()))
    base.enable_gradient_checkpointing()
    with tempfile.TemporaryDirectory() as folder:
        config = resolve({}, "small-card", {"output.folder": folder, "train.batch": options.batch, "train.precision": "fp32",
                                            "train.accumulate": 1, "base.checkpoint": "random",
                                            # a batch without references learns nothing, and takes no backward pass
                                            "objective.drop_reference": 0.0, "objective.drop_both": 0.0})
        picture = Path(folder) / "picture.png"
        Image.new("RGB", (options.side, options.side), "teal").save(picture)
        data, large = RandomSet(options.side, picture), RandomSet(512, picture)
        teacher = teacher_on(base, options.teacher, Path(folder))
        frozen = Frozen(base, connector, {}, {}, teacher.target_on(data) if teacher else None)
        trainer = begin(config, frozen, data, Accelerator(cpu=True), Path(folder))
        started = time.monotonic()
        computed = needed(trainer, torch.float32)
        trainer.data = large
        in_bf16 = needed(trainer, torch.bfloat16)
        trainer.data = data
        print(f"computed in {time.monotonic() - started:.1f} s", flush=True)
        for number in range(2):
            started = time.monotonic()
            trainer.update(TimestepBuckets())
            print(f"update {number + 1}: {time.monotonic() - started:.1f} s", flush=True)
    peak = next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM"))
    told = computed.peak + before
    print(f"{options.channels} channels, {options.side} px, batch {options.batch}, fp32, CPU, teacher {options.teacher}: "
          f"computed {told / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB ({100 * (told / peak - 1):+.1f}%)")
    print(f"512 px, batch {options.batch}, bf16, tensors alone: computed {in_bf16.peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
