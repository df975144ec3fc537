"""What a training step takes: time against a loop that encodes everything anew in each step, and memory.

`speed` runs the trainer's update and a straightforward one in turn, on the same models, rows, noise and optimizer. The
straightforward one encodes latents, text and references in every step, as IP-Adapter's public trainer does; its pictures are
in memory already, and texts of one length share a pass. Then it says where the time of the trainer's update goes.
`memory` measures the peak of two updates at the size of SD1.5 in a fresh process, with gradient checkpointing and without.

    python benchmarks/training_step.py speed --size playground --batch 8
    python benchmarks/training_step.py speed --size sd15 --batch 1 --repeats 2
    python benchmarks/training_step.py memory

Sizes: the shipped playground at 128 px, or random weights in the sizes of SD1.5, its autoencoder, flan-t5-xl, CLIP ViT-H/14 and
the released ELLA at 512 px (needs 16 GB). Memory is read from Linux's /proc, or from CUDA where there is a GPU. Times on
CPUs are CPU seconds.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from torch import nn  # noqa: E402

from emma_core.base.backbones import Backbone  # noqa: E402
from emma_core.base.spec import SD15  # noqa: E402
from emma_core.model.connector import Connector, ConnectorConfig  # noqa: E402
from emma_core.training.config import TrainConfig, resolve  # noqa: E402
from emma_core.training.losses import TimestepBuckets  # noqa: E402
from emma_core.training.starts import begin_module  # noqa: E402
from emma_core.training.student import Student  # noqa: E402
from emma_core.training.trainer import Trainer  # noqa: E402

PICTURES, WARM_UP = 16, 1
CAPTIONS = ("an astronaut riding a horse on the moon", "portrait of an old woman, oil on canvas")
GB = 1e9


def clock() -> float:
    """Seconds: of this process on CPUs, so that other processes count less; of the wall with a GPU, whose work is awaited."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Models:
    """Everything frozen, and pictures to train on: (3, H, W) in [-1, 1]."""

    backbone: Backbone
    connector: Connector
    encode_texts: Callable[[Sequence[str]], list[torch.Tensor]]
    encode_references: Callable[[torch.Tensor], torch.Tensor]  # (B, 3, H, W) in [-1, 1] -> (B, D)
    side_px: int

    def pictures(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        coarse = torch.rand(PICTURES, 3, 8, 8, generator=generator)
        return nn.functional.interpolate(coarse, (self.side_px, self.side_px), mode="bilinear") * 2 - 1


def playground(config: TrainConfig) -> Models:
    from emma_core.encoders.options import EncodeOptions
    from emma_core.training.parts import load_parts

    parts = load_parts(config, torch.float32, torch.device("cpu"))
    options = EncodeOptions(("global",))

    def references(picture_B3HW: torch.Tensor) -> torch.Tensor:
        image_BHW3 = (picture_B3HW.permute(0, 2, 3, 1) + 1) / 2
        return torch.cat([one.features["global"][0] for one in parts.reference_encoder.encode(image_BHW3, None, options)])

    return Models(parts.backbone, parts.connector, lambda captions: parts.text_encoder.encode(list(captions)), references, 128)


def sd15(config: TrainConfig) -> Models:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, T5Config, T5EncoderModel

    from emma_core.base.autoencoder_files import KlAutoencoder

    t5 = random_weights(lambda: T5EncoderModel(T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, num_heads=32, d_ff=5120, num_layers=24, feed_forward_proj="gated-gelu")))
    clip = random_weights(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14, image_size=224,
        projection_dim=1024)))

    @torch.no_grad()
    def texts(captions: Sequence[str]) -> list[torch.Tensor]:
        lengths = [2 * len(caption.split()) + 1 for caption in captions]
        known = {length: t5(torch.full((lengths.count(length), length), 7)).last_hidden_state for length in set(lengths)}
        return [known[length][:1] for length in lengths]

    @torch.no_grad()
    def references(picture_B3HW: torch.Tensor) -> torch.Tensor:
        return clip(nn.functional.interpolate(picture_B3HW, (224, 224), mode="bilinear")).image_embeds

    autoencoder = KlAutoencoder(random_weights(full_autoencoder), SD15.latent_scale)
    return Models(full_backbone(config, autoencoder), full_connector(), texts, references, 512)


def full_autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4,
                         down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)


def full_backbone(config: TrainConfig, autoencoder: nn.Module, dtype: torch.dtype = torch.float32) -> Backbone:
    from diffusers import UNet2DConditionModel

    unet = random_weights(lambda: UNet2DConditionModel(cross_attention_dim=768), dtype)  # the other defaults are SD1.5's
    backbone = Backbone(unet, autoencoder, SD15, "random", "")
    if config.train.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    return backbone


def full_connector() -> Connector:
    return Connector(ConnectorConfig()).eval()


def random_weights(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen model whose weights are small random numbers, without the time its own initialisation takes."""
    with torch.device("meta"):
        model = make()
    model = model.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        value.uniform_(-0.02, 0.02, generator=generator) if value.ndim > 1 else value.fill_(float("norm" in name))
    for name, value in model.named_buffers():
        value.copy_(torch.arange(value.numel()).view_as(value)) if "position_ids" in name else value.zero_()
    return model


class Held:
    """A training set in memory: latents, texts and features by index."""

    def __init__(self, latents: torch.Tensor, texts: dict[str, torch.Tensor], features: torch.Tensor, side_px: int):
        self.latents, self.texts, self.vectors, self.side_px = latents, texts, features, side_px

    def __len__(self) -> int:
        return len(self.latents)

    def bucket(self, index: int) -> tuple[int, int]:
        return self.side_px, self.side_px

    def group(self, index: int) -> str:
        return ""

    def captions(self, index: int) -> tuple[str, ...]:
        return (CAPTIONS[index % len(CAPTIONS)],)

    def references(self, index: int) -> tuple[int, ...]:
        return ((index + 1) % len(self),)

    def variants(self, reference: int) -> int:
        return 1

    def latent(self, index: int, flipped: bool = False) -> torch.Tensor:
        return self.latents[index]

    def text(self, caption: str) -> torch.Tensor:
        return self.texts[caption]

    def features(self, reference: int, variant: int = 0) -> dict[str, torch.Tensor]:
        return {"global": self.vectors[reference][None]}

    def mark(self) -> str:
        return ""


class Anew(Held):
    """The same set, encoded anew for every batch: latents, texts and references of its rows only."""

    def encode(self, models: Models, picture_P3HW: torch.Tensor, rows) -> None:
        targets, references = [row.target for row in rows], [row.reference for row in rows]
        captions = [row.caption for row in rows]
        self.latents = dict(zip(targets, models.backbone.encode(picture_P3HW[targets]), strict=True))
        self.texts = dict(zip(captions, models.encode_texts(captions), strict=True))
        self.vectors = dict(zip(references, models.encode_references(picture_P3HW[references]), strict=True))

    def __len__(self) -> int:
        return PICTURES


def begin(config: TrainConfig, models: Models, data: Held, folder: str) -> Trainer:
    """A trainer of a style module with 4 tokens of one vector."""
    module = begin_module(config, models.connector, {"global": data.vectors[0].shape[-1]}, {}, torch.Generator().manual_seed(0))
    # its own copy, on the same weights: `Split` times one trainer alone
    student = Student(copy.copy(models.backbone), models.connector, module, config.objective)
    return Trainer(config, student, data, Accelerator(mixed_precision="no" if config.train.precision == "fp32" else "bf16"),
                   Path(folder))


def held(models: Models) -> Held:
    picture_P3HW = models.pictures()
    latents = torch.cat([models.backbone.encode(picture[None]) for picture in picture_P3HW])
    texts = dict(zip(("", *CAPTIONS), models.encode_texts(("", *CAPTIONS)), strict=True))
    vectors = torch.cat([models.encode_references(picture[None]) for picture in picture_P3HW])
    return Held(latents.clone(), texts, vectors.clone(), models.side_px)


class Split:
    """Seconds inside chosen functions of a trainer; the backward pass is what is left beside them in an update."""

    def __init__(self, trainer: Trainer):
        self.seconds: dict[str, float] = defaultdict(float)
        student, backbone = trainer.student, trainer.student.denoiser
        self._time(trainer.draws, "draw", "draw and fetch rows")
        self._time(backbone, "predict_noise", "UNet, forward")
        self._time(trainer.accelerator, "backward", "backward")
        self._time(trainer.optimizer, "step", "optimizer")
        if trainer.average:
            self._time(trainer.average, "update", "averaged weights")
        object.__setattr__(student, "terms", self._timed(student.terms, "connector and module, forward"))

    def _time(self, owner, name: str, label: str) -> None:
        setattr(owner, name, self._timed(getattr(owner, name), label))

    def _timed(self, function: Callable, label: str) -> Callable:
        def timed(*args, **named):
            started = clock()
            try:
                return function(*args, **named)
            finally:
                self.seconds[label] += clock() - started
        return timed


def speed(options: argparse.Namespace) -> None:
    config = config_of(options)
    models = {"playground": playground, "sd15": sd15}[options.size](config)
    data = held(models)
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = (begin(config, models, data, f"{folder}/{name}") for name in ("ours", "plain"))
        anew = Anew(data.latents, data.texts, data.vectors, models.side_px)
        picture_P3HW, encoding = models.pictures(), []
        draw = plain.draws.draw

        def encode_and_draw():
            batch, started = draw(), clock()
            anew.encode(models, picture_P3HW, batch.rows)
            encoding.append(clock() - started)
            return batch

        plain.draws.draw, plain.data = encode_and_draw, anew
        seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        buckets = TimestepBuckets()
        for repeat in range(WARM_UP + options.repeats):
            if repeat == WARM_UP:
                split = Split(ours)
            for name, trainer in (("ours", ours), ("plain", plain)):
                started = clock()
                trainer.update(buckets)
                if repeat >= WARM_UP:
                    seconds[name].append(clock() - started)
        gap = max((mine - theirs).abs().max().item() for mine, theirs in
                  zip(ours.student.learning.parameters(), plain.student.learning.parameters(), strict=True))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{options.size}, batch {options.batch}, {config.train.precision}, {options.threads} thread(s), medians of "
          f"{options.repeats}: ours {medians['ours']:.3f} s, encoding anew {medians['plain']:.3f} s, "
          f"ratio {medians['plain'] / medians['ours']:.2f}; largest difference of a weight after {plain.step} updates "
          f"{gap:.1e}")
    print(f"of the plain step: encoding {statistics.median(encoding[WARM_UP:]):.3f} s")
    whole = sum(seconds["ours"])
    for label, spent in sorted(split.seconds.items(), key=lambda one: -one[1]):
        print(f"  {label}: {spent / options.repeats:.4f} s ({100 * spent / whole:.1f}%)")


def memory_child(options: argparse.Namespace) -> None:
    """Two updates at full size with what training holds: encoders and their inputs are gone by then."""
    config = config_of(options)
    cuda = torch.cuda.is_available()
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    before = resident("VmRSS")
    backbone = full_backbone(config, nn.Identity(), dtype)
    models = Models(backbone, full_connector(), lambda captions: [], lambda picture: picture, 512)
    if cuda:
        backbone.to("cuda")
    texts = {caption: torch.randn(1, 2 * len(caption.split()) + 1, 2048) for caption in ("", *CAPTIONS)}
    data = Held(torch.randn(PICTURES, 4, 64, 64), texts, torch.randn(PICTURES, 1024), 512)
    with tempfile.TemporaryDirectory() as folder:
        trainer = begin(config, models, data, folder)
        weights = resident("VmRSS") - before
        seconds = []
        for _ in range(2):
            started = clock()
            trainer.update(TimestepBuckets())
            seconds.append(clock() - started)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before
    print(f"{'GPU' if cuda else 'CPU'}, {config.train.precision}, batch {options.batch}, gradient checkpointing "
          f"{config.train.gradient_checkpointing}: peak {peak / GB:.2f} GB, before the first step {weights / GB:.2f} GB, "
          f"second step {seconds[-1]:.1f} s", flush=True)


def resident(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def config_of(options: argparse.Namespace) -> TrainConfig:
    return resolve({}, "small-card", {
        "train.batch": options.batch, "train.accumulate": 1, "train.precision": options.precision, "train.steps": 1000,
        "train.gradient_checkpointing": options.checkpointing, "module.condition": "style",
        "objective.drop_reference": 0.0, "objective.drop_both": 0.0, "objective.drop_text": 0.0,
    })


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "memory", "memory-child"])
    parser.add_argument("--size", default="playground", choices=["playground", "sd15"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what != "memory":
        return {"speed": speed, "memory-child": memory_child}[options.what](options)
    for further in ([], ["--checkpointing"]):
        subprocess.run([sys.executable, __file__, "memory-child", "--batch", str(options.batch), "--threads",
                        str(options.threads), "--precision", options.precision, *further], check=True)


if __name__ == "__main__":
    main()
