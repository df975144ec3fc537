"""What EMMA costs on a card, in at most eight minutes: prints Markdown for docs/performance.md.

Random weights of the real sizes, nothing is downloaded. Every part has a share of the time and of the memory: one that does not
fit is named with the reason, and the others go on. `--small` runs all of it at toy sizes on a CPU, in seconds: that it runs, no
more. Connector and modules are in float32, the frozen models in float16 (training: bfloat16 products).

    python benchmarks/gpu.py                    # on the first GPU
    python benchmarks/gpu.py --part tokens      # one part
    python benchmarks/gpu.py --small
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "core")]

import torch  # noqa: E402
from schedule_tokens import plain_copies  # noqa: E402
from schedule_tokens import random_weights as weights_near_one  # noqa: E402
from torch import nn  # noqa: E402
from training_step import Held, full_autoencoder, random_weights  # noqa: E402

from emma_core import Assembly, Connector, ConnectorConfig, FeatureSpec, ModuleConfig, Reference  # noqa: E402
from emma_core.base.backbones import Backbone  # noqa: E402
from emma_core.base.pipeline import Request, Sampling, generate, pipeline_for  # noqa: E402
from emma_core.base.spec import SD15  # noqa: E402
from emma_core.model.addition import ADDITIONS  # noqa: E402
from emma_core.model.assembly import assembled_tokens, tokens_over_schedule  # noqa: E402
from emma_core.model.own_tokens import OwnTokens  # noqa: E402
from emma_core.model.source_spec import SourceSpec, TimeSpec  # noqa: E402
from emma_core.model.token_resampler import resampler_for  # noqa: E402
from emma_core.training.config import resolve  # noqa: E402
from emma_core.training.losses import TimestepBuckets  # noqa: E402
from emma_core.training.starts import begin_module  # noqa: E402
from emma_core.training.student import Student  # noqa: E402
from emma_core.training.trainer import Trainer  # noqa: E402

GB, STEPS, MODULES = 1e9, 20, (0, 1, 3)
# condition -> feature -> (vectors, dim, tokens per vector)
CONDITIONS = {"style": {"global": (1, 1024, 4)}, "object": {"global": (1, 1024, 1), "local": (257, 1280, 1)},
              "face": {"identity": (1, 512, 4)}}
# changes of a preset, and GB of the card that it is meant for
RUNS = {"small-card (8 GB)": ("small-card", {}), "12 GB": ("small-card", {"train.batch": 4, "train.accumulate": 2}),
        "paper, batch 32": ("paper", {})}


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    connector: ConnectorConfig
    unet: dict
    sdxl_unet: dict
    sdxl_width: int
    autoencoder: Callable[[], nn.Module]
    t5: dict
    clip: dict
    side: int  # of SD1.5's latents
    sdxl_side: int
    batches: int | None  # None: those of the presets
    repeats: int


def full_sizes() -> Sizes:
    sdxl = {"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
            "attention_head_dim": (5, 10, 20)}
    t5 = {"vocab_size": 32128, "d_model": 2048, "d_kv": 64, "num_heads": 32, "d_ff": 5120, "num_layers": 24}
    clip = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
            "patch_size": 14, "image_size": 224, "projection_dim": 1024}
    return Sizes(ConnectorConfig(), {"cross_attention_dim": 768}, sdxl, 2048, full_autoencoder, t5, clip, 64, 128, None, 5)


def small_sizes() -> Sizes:
    from diffusers import AutoencoderKL

    connector = ConnectorConfig(width=64, latents=8, layers=2, heads=4, text_dim=24, time_channels=32, time_width=48)
    unet = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4,
            "cross_attention_dim": 64, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    t5 = {"vocab_size": 32, "d_model": 24, "d_kv": 8, "num_heads": 3, "d_ff": 32, "num_layers": 2}
    clip = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14,
            "image_size": 28, "projection_dim": 1024}

    def autoencoder() -> nn.Module:
        return AutoencoderKL(block_out_channels=[8] * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4,
                             down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)

    return Sizes(connector, unet, unet, 64, autoencoder, t5, clip, 8, 8, 2, 1)


@dataclass(frozen=True)
class Bench:
    """Where and how large; and until when the part that runs may take.

    Args:
        device, dtype: of the frozen models.
    """

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    small: bool
    until: list[float]

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Median of some repeats, the first one left out; fewer where the part's time ends."""
        run()
        found = []
        while len(found) < self.sizes.repeats and (not found or time.monotonic() < self.until[-1]):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            found.append(1000 * (time.perf_counter() - started))
        return statistics.median(found)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def normal(self, *shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def backbone(self) -> Backbone:
        """SD1.5 and its autoencoder."""
        from diffusers import UNet2DConditionModel

        from emma_core.base.autoencoder_files import KlAutoencoder

        unet = random_weights(lambda: UNet2DConditionModel(**self.sizes.unet), self.dtype).to(self.device)
        kl = KlAutoencoder(random_weights(self.sizes.autoencoder, self.dtype).to(self.device), SD15.latent_scale)
        return Backbone(unet, kl, SD15, "random", "")

    def connector(self) -> Connector:
        return weights_near_one(Connector(self.sizes.connector)).to(self.device)

    def references(self, count: int, source: OwnTokens | None = None) -> list[Reference]:
        return [self._reference(condition, source) for condition in list(CONDITIONS)[:count]]

    def _reference(self, condition: str, source: OwnTokens | None) -> Reference:
        size, features = self.sizes.connector, CONDITIONS[condition]
        own = {"time_width": size.time_width} if source is None else {
            "source": source.source, "time": source.time, "time_width": 64 if self.small else 512}
        specs = {name: FeatureSpec(dim, tokens) for name, (_, dim, tokens) in features.items()}
        width = size.width if source is None or self.small else 512
        config = ModuleConfig(condition=condition, width=width, heads=size.heads, layers=size.layers if source is None else 4,
                              features=specs, **own)
        module = weights_near_one(resampler_for(config)).to(self.device)
        return Reference(module, {name: self.normal(1, vectors, dim) for name, (vectors, dim, _) in features.items()})


def tokens(bench: Bench) -> Iterator[str]:
    """Tokens of a whole schedule, positive and negative prompt, against a loop, and in percent of the UNet's steps."""
    connector, times = bench.connector(), torch.linspace(999, 0, STEPS, device=bench.device)
    texts = bench.normal(1, 20, bench.sizes.connector.text_dim), bench.normal(1, 1, bench.sizes.connector.text_dim)
    unet_ms = unet_step(bench, bench.sizes.unet, bench.sizes.side, bench.sizes.connector.width, bench.sizes.connector.latents)
    yield f"SD1.5 at {8 * bench.sizes.side} px: one step of the UNet (two prompts) takes {unet_ms:.1f} ms."
    yield "\n| modules | loop ms | one pass ms | ratio | of the UNet's steps |\n| --- | --- | --- | --- | --- |"
    for count in MODULES:
        assembly = Assembly(bench.references(count))
        plain, used = plain_copies(connector, assembly.references)
        plain.to(bench.device)

        def loop(plain=plain, used=used) -> None:
            for timestep in times.tolist():
                plain(texts[0], timestep, used)
                plain(texts[1], timestep)

        def one_pass(assembly=assembly) -> None:
            tokens_over_schedule(connector, texts[0], times, assembly)
            tokens_over_schedule(connector, texts[1], times, Assembly())

        loop_ms, pass_ms = bench.milliseconds(loop), bench.milliseconds(one_pass)
        share = 100 * pass_ms / (STEPS * unet_ms)
        yield f"| {count} | {loop_ms:.1f} | {pass_ms:.1f} | {loop_ms / pass_ms:.2f} | {share:.2f}% |"


def sdxl_tokens(bench: Bench) -> Iterator[str]:
    """Modules on SDXL's own tokens, in percent of its UNet's steps."""
    width = bench.sizes.sdxl_width
    source = OwnTokens(SourceSpec("sdxl", width), TimeSpec("ddpm"))
    times, text = torch.linspace(999, 0, STEPS, device=bench.device), bench.normal(1, 77, width)
    unet_ms = unet_step(bench, bench.sizes.sdxl_unet, bench.sizes.sdxl_side, width, 77)
    yield f"SDXL at {8 * bench.sizes.sdxl_side} px: one step of the UNet (two prompts) takes {unet_ms:.1f} ms."
    yield "\n| modules on its own tokens | one pass ms | of the UNet's steps |\n| --- | --- | --- |"
    for count in MODULES[1:]:
        assembly = Assembly(bench.references(count, source))
        pass_ms = bench.milliseconds(lambda assembly=assembly: tokens_over_schedule(source, text, times, assembly))
        yield f"| {count} | {pass_ms:.1f} | {100 * pass_ms / (STEPS * unet_ms):.2f}% |"


def unet_step(bench: Bench, sizes: dict, side: int, width: int, count: int) -> float:
    """Milliseconds of one evaluation of two prompts."""
    from diffusers import UNet2DConditionModel

    unet = random_weights(lambda: UNet2DConditionModel(**sizes), bench.dtype).to(bench.device)
    latent, context = (bench.normal(*shape).to(bench.dtype) for shape in ((2, 4, side, side), (2, count, width)))
    time_2 = torch.tensor([500, 500], device=bench.device)
    return bench.milliseconds(lambda: unet(latent, time_2, context).sample)


def adding(bench: Bench) -> Iterator[str]:
    """One picture with three modules, by how they are added up."""
    backbone, connector = bench.backbone(), bench.connector()
    side_px, dim = 8 * bench.sizes.side, bench.sizes.connector.text_dim
    pipeline = pipeline_for(backbone, connector, lambda prompts: [bench.normal(1, 20, dim) for _ in prompts])
    sampling, references = Sampling(2 if bench.small else STEPS, 7.0, side_px, side_px), bench.references(3)
    text_ms = 0.0
    yield f"A picture of {sampling.steps} steps at {side_px} px with three modules, decoding included:"
    yield "\n| added up in | ms | against text only |\n| --- | --- | --- |"
    for name, addition in {"(text only)": None, **ADDITIONS}.items():
        assembly = Assembly() if addition is None else Assembly(references, addition)
        picture_ms = bench.milliseconds(lambda assembly=assembly: generate(pipeline, [Request("a", assembly)], sampling))
        text_ms = text_ms or picture_ms
        yield f"| {name} | {picture_ms:.0f} | {picture_ms / text_ms:.2f} |"


def training(bench: Bench) -> Iterator[str]:
    """Updates of presets, their peak memory, and what a loop takes that encodes everything anew."""
    yield "| run | updates/s | peak GB | updates/s of a loop that encodes anew | ratio |\n| --- | --- | --- | --- | --- |"
    for name, (preset, changes) in RUNS.items():
        with guarded(name) as failed:
            yield _trained(bench, name, preset, changes)
        if failed:
            yield f"| {name} | {failed[0]} | | | |"


def _trained(bench: Bench, name: str, preset: str, changes: dict) -> str:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    cuda = bench.device.type == "cuda"
    small = {"train.batch": bench.sizes.batches, "train.accumulate": 1} if bench.small else {}
    config = resolve({}, preset, {"train.precision": "bf16" if cuda else "fp32", "module.condition": "style",
                                  "train.held_out": 0.0, "objective.place_weight": False, **changes, **small})
    backbone, connector = bench.backbone(), Connector(bench.sizes.connector)
    if config.train.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    dim, side = bench.sizes.connector.text_dim, bench.sizes.side
    data = Held(torch.randn(16, 4, side, side), _AnyText(dim), torch.randn(16, 1024), 8 * side)
    module = begin_module(config, connector, {"global": 1024}, {}, torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Student(backbone, connector, module, config.objective), data,
                          Accelerator(mixed_precision=config.train.precision if cuda else "no", cpu=not cuda), Path(folder))
        if cuda:
            torch.cuda.reset_peak_memory_stats(bench.device)
        update_ms = bench.milliseconds(lambda: trainer.update(TimestepBuckets()))
        peak = f"{torch.cuda.max_memory_allocated(bench.device) / GB:.2f}" if cuda else "-"
    rows = config.train.batch * config.train.accumulate
    anew_ms = update_ms + config.train.accumulate * _encoding_ms(bench, config.train.batch)
    return (f"| {name}, {rows} rows an update | {1000 / update_ms:.2f} | {peak} | {1000 / anew_ms:.2f} | "
            f"{anew_ms / update_ms:.2f} |")


class _AnyText(dict):
    """Every caption has a text of its length."""

    def __init__(self, dim: int):
        super().__init__()
        self._dim = dim

    def __missing__(self, caption: str) -> torch.Tensor:
        self[caption] = torch.randn(1, 2 * len(caption.split()) + 1, self._dim)
        return self[caption]


@torch.no_grad()
def _encoding_ms(bench: Bench, rows: int) -> float:
    """Latents, texts and references of one batch."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    clip = random_weights(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**bench.sizes.clip)), bench.dtype)
    clip, t5, kl = clip.to(bench.device), _t5(bench), bench.backbone().autoencoder
    ids = torch.full((rows, 20), 7, device=bench.device)
    seen = bench.normal(rows, 3, bench.sizes.clip["image_size"], bench.sizes.clip["image_size"]).to(bench.dtype)
    pixels = bench.normal(rows, 3, 8 * bench.sizes.side, 8 * bench.sizes.side).to(bench.dtype)

    def encode() -> None:
        kl.encode(pixels)
        t5(ids)
        clip(seen)

    return bench.milliseconds(encode)


def _t5(bench: Bench) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return random_weights(lambda: T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **bench.sizes.t5)), bench.dtype).to(
        bench.device)


def text_encoder(bench: Bench) -> Iterator[str]:
    """The text encoder: onto the card, and a prompt."""
    t5 = _t5(bench)
    ids, count = torch.full((1, 20), 7, device=bench.device), sum(value.numel() for value in t5.parameters())
    host = t5.to("cpu")
    onto_ms = bench.milliseconds(lambda: host.to("cpu").to(bench.device))
    prompt_ms = bench.milliseconds(lambda: t5(ids))
    yield (f"{count / 1e9:.2f} B parameters in {str(bench.dtype).removeprefix('torch.')}: from memory to the device and back "
           f"{onto_ms:.0f} ms; a prompt of 20 tokens {prompt_ms:.1f} ms.")


def parity(bench: Bench) -> Iterator[str]:
    """Tokens of the device against those of the CPU in float32, three modules, three timesteps."""
    cpu = Bench(bench.sizes, torch.device("cpu"), torch.float32, bench.small, bench.until)
    connector, references = cpu.connector(), cpu.references(3)
    text, time_3 = cpu.normal(1, 20, bench.sizes.connector.text_dim), torch.tensor([981.0, 501.0, 21.0])
    wanted = assembled_tokens(connector, text, time_3, Assembly(references))
    yield "| precision | largest difference of a token, in standard deviations | root mean square |\n| --- | --- | --- |"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        moved = [Reference(one.module.to(bench.device, dtype), {name: value.to(bench.device, dtype) for name, value
                                                               in one.features.items()}) for one in references]
        found = assembled_tokens(connector.to(bench.device, dtype), text.to(bench.device, dtype), time_3.to(bench.device),
                                 Assembly(moved))
        gap = (found.float().cpu() - wanted) / wanted.std()
        yield (f"| {str(dtype).removeprefix('torch.')} | {gap.abs().max().item():.1e} | "
               f"{gap.square().mean().sqrt().item():.1e} |")
        connector.to("cpu", torch.float32)
        for one in references:
            one.module.to("cpu", torch.float32)


def demo(bench: Bench) -> Iterator[str]:
    """The pictures of `python run.py demo` (README)."""
    from emma_core.base.config import BaseConfig, EllaConfig
    from emma_core.base.text_to_image import TextToImage
    from emma_core.playground import PLAYGROUND_DIR
    from lab.demo import ROWS, VARIANTS, shown

    machine = TextToImage(BaseConfig(), EllaConfig(), [str(PLAYGROUND_DIR / "encoder.safetensors")], "", "fp32", bench.device)
    requests = []
    for row in ROWS[:1] if bench.small else ROWS:
        of_kind = {}
        for kind in ("style", "face"):
            module = machine.load_module(str(PLAYGROUND_DIR / f"emma-{kind}.safetensors"))
            of_kind[kind] = Reference(module, machine.features(module, shown(getattr(row, kind))))
        requests += [Request(row.prompt, Assembly([of_kind[kind] for kind in kinds]), seed=row.seed)
                     for kinds in VARIANTS.values()]
    sampling = Sampling(2 if bench.small else STEPS)
    started = time.perf_counter()
    machine.draw(requests, sampling)
    bench.wait()
    yield f"{len(requests)} pictures of the playground, {sampling.steps} steps, fp32: {time.perf_counter() - started:.1f} s."


# title, part, share of the time, GB of the card's memory that it takes
PARTS: dict[str, tuple[str, Callable[[Bench], Iterator[str]], float, float]] = {
    "tokens": ("Tokens of a 20-step schedule", tokens, 0.12, 4), "sdxl": ("The same on SDXL", sdxl_tokens, 0.12, 8),
    "adding": ("Ways of adding up", adding, 0.2, 5), "training": ("Training", training, 0.3, 7),
    "text": ("Text encoder", text_encoder, 0.08, 4), "parity": ("Device against CPU", parity, 0.1, 2),
    "demo": ("The playground's demo", demo, 0.08, 2),
}


@contextmanager
def guarded(what: str) -> Iterator[list[str]]:
    """What runs out of memory inside is noted in the list, and ends nothing else."""
    failed: list[str] = []
    try:
        yield failed
    except torch.cuda.OutOfMemoryError:
        failed.append("does not fit this card")
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def report(bench: Bench, names: Sequence[str], seconds: float) -> Iterator[str]:
    """The parts in Markdown."""
    cuda = bench.device.type == "cuda"
    card = torch.cuda.get_device_name(bench.device) if cuda else "CPU"
    yield f"Measured on: {card}, torch {torch.__version__}, {str(bench.dtype).removeprefix('torch.')}" + (
        ", **toy sizes: the figures mean nothing**." if bench.small else ".")
    end = time.monotonic() + seconds
    for name in names:
        title, part, share, needed = PARTS[name]
        yield f"\n### {title}\n"
        free = torch.cuda.mem_get_info(bench.device)[0] / GB if cuda else float("inf")
        if time.monotonic() >= end or free < needed:
            yield "Not measured: " + ("the time was over." if free >= needed else f"needs {needed} GB, {free:.1f} are free.")
            continue
        bench.until.append(min(end, time.monotonic() + share * seconds))
        with guarded(title) as failed, torch.inference_mode(name not in ("training", "demo")):
            yield from part(bench)
        if failed:
            yield f"Not measured: {failed[0]}."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=7.0, help="of the parts, beside starting (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="toy sizes, on the CPU")
    options = parser.parse_args(arguments)
    if not options.small and not torch.cuda.is_available():
        print("there is no GPU here; nothing was measured. --small runs the script at toy sizes on the CPU.")
        return 1
    device = torch.device("cpu" if options.small else "cuda")
    bench = Bench(small_sizes() if options.small else full_sizes(), device, torch.float32 if options.small else torch.float16,
                  options.small, [])
    for line in report(bench, options.part, 60 * options.minutes):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
