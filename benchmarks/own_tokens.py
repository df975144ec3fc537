"""What modules on a checkpoint's own tokens cost at SDXL's real size, with random weights: time of a step, memory of training.

`step` computes what one step of sampling takes: the tokens of a prompt at one timestep with 0, 1 and 3 modules, and one
evaluation of the UNet for prompt and negative prompt. `memory` measures the peak of one training update.

    python benchmarks/own_tokens.py step --side 512
    python benchmarks/own_tokens.py memory --side 512

The UNet is bf16 (5.1 GB); modules are float32, of the default size. Times are CPU seconds of this process, so that others count
less; memory is the peak of its resident pages.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from torch import nn  # noqa: E402

from emma_core.base.backbones import Backbone  # noqa: E402
from emma_core.base.own_text import beside_text, sizes_of  # noqa: E402
from emma_core.base.spec import SDXL  # noqa: E402
from emma_core.model.assembly import Assembly, Reference  # noqa: E402
from emma_core.model.gated_resampler import GatedResampler  # noqa: E402
from emma_core.training.config import resolve  # noqa: E402
from emma_core.training.draws import Batch, BatchRow  # noqa: E402
from emma_core.training.starts import begin_module  # noqa: E402
from emma_core.training.student import OwnText, Student  # noqa: E402

UNET = {
    "block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}
TOKENS, FEATURES, REPEATS = 77, {"global": 1024}, 5
GB = 1e9


def backbone() -> Backbone:
    """SDXL's UNet in bf16 with random weights that keep activations near 1."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET).to(torch.bfloat16)
    unet.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in unet.parameters():
        bound = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.0
        weight.uniform_(-bound, bound, generator=generator) if bound else weight.fill_(0.0)
    for layer in unet.modules():
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            layer.weight.fill_(1.0)
    return Backbone(unet.eval(), nn.Linear(1, 1), SDXL, "SDXL's size", "")


def module(seed: int) -> GatedResampler:
    """A style module of the default size, its gates open."""
    config = resolve({}, changes={"base.checkpoint": "SDXL's size"})
    made = begin_module(config, SDXL.own_tokens, FEATURES, {}, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for block in made.blocks:
            block.attn_gate.fill_(0.1)
            block.ffn_gate.fill_(0.1)
    return made


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """The median CPU time."""
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


@torch.no_grad()
def step(side_px: int) -> None:
    """Tokens with 0, 1 and 3 modules, and the UNet on two rows."""
    modules = [module(seed) for seed in range(3)]
    references = [Reference(one, {"global": torch.randn(1, 1, 1024)}) for one in modules]
    text_1SD = torch.randn(1, TOKENS, SDXL.context_width)
    timestep = torch.tensor([500.0])
    times = {}
    for count in (0, 1, 3):
        assembly = Assembly(references[:count])
        SDXL.own_tokens.tokens(text_1SD, timestep, assembly)
        times[count] = seconds(lambda assembly=assembly: SDXL.own_tokens.tokens(text_1SD, timestep, assembly), REPEATS)
    base, cells = backbone(), side_px // SDXL.pixels_per_latent
    latent_2Chw = torch.randn(2, SDXL.latent_channels, cells, cells)
    beside = _beside(side_px, 2)

    def evaluate() -> torch.Tensor:
        return base.predict_noise(latent_2Chw, torch.tensor([500, 500]), text_1SD.expand(2, -1, -1), beside)

    evaluate()
    unet = seconds(evaluate)
    parameters = sum(value.numel() for value in modules[0].parameters())
    print(f"SDXL at {side_px} px, {torch.get_num_threads()} thread: the UNet on two rows {unet:.1f} s; a module has "
          f"{parameters / 1e6:.1f} M parameters")
    for count, taken in times.items():
        print(f"  {count} modules: tokens {taken:.3f} s, a step {100 * (unet + taken) / (unet + times[0]) - 100:.2f}% longer")


class OnePicture:
    """A training set of one picture."""

    def __init__(self, side_px: int):
        cells = side_px // SDXL.pixels_per_latent
        self._latent = torch.randn(SDXL.latent_channels, cells, cells)
        self._text = torch.randn(1, TOKENS, SDXL.context_width)

    def latent(self, index: int, flipped: bool = False) -> torch.Tensor:
        return self._latent

    def text(self, caption: str) -> torch.Tensor:
        return self._text

    def features(self, reference: int, variant: int) -> dict[str, torch.Tensor]:
        return {"global": torch.ones(1, 1024)}


def memory(side_px: int) -> None:
    """The peak of one update: bf16, gradient checkpointing, batch 1."""
    base, data, learning = backbone(), OnePicture(side_px), module(0)
    base.enable_gradient_checkpointing()
    config = resolve({}, "sdxl-12gb", {"data.resolution_px": side_px})
    beside = _beside(side_px, 1)
    own = OwnText(torch.arange(1000).float(), lambda row: beside, lambda caption: None)
    student = Student(base, SDXL.own_tokens, learning, config.objective, own=own)
    optimizer = torch.optim.AdamW(learning.parameters(), lr=1e-4)
    loaded, started = _peak(), time.process_time()
    batch = Batch(1, (BatchRow(0, False, "", 0, 0, 1.0),), torch.tensor([700]), torch.randn(1, *data.latent(0).shape))
    with torch.autocast("cpu", torch.bfloat16):
        error_B, _ = student.errors(data, batch, torch.device("cpu"))
    error_B.mean().backward()
    optimizer.step()
    print(f"SDXL at {side_px} px: {loaded / GB:.1f} GB with the weights loaded, {_peak() / GB:.1f} GB at most in an update, "
          f"{time.process_time() - started:.0f} CPU seconds")


def _beside(side_px: int, rows: int) -> dict[str, torch.Tensor]:
    size_px = (side_px, side_px)
    return beside_text(torch.randn(rows, SDXL.pooled_width), sizes_of([(size_px, size_px)] * rows))


def _peak() -> int:
    """Bytes, of Linux, which counts in kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "memory"])
    parser.add_argument("--side", type=int, default=512, metavar="PIXELS", help="of the square pictures")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    {"step": step, "memory": memory}[options.what](options.side)


if __name__ == "__main__":
    main()
