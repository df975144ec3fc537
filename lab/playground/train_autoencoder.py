"""`python -m lab.playground.train_autoencoder --data DIR --out FILE`: the playground's autoencoder from scratch.

With `--decoder-only FILE` the encoder (and so every latent made with it) stays as it is and the decoder learns on.
Held-out pictures are never trained on; the log gives their PSNR.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.files.tensor_file import read_tensors
from emma_core.playground.autoencoder import DOWNSCALE, LATENT_CHANNELS, Autoencoder

from ..emoji.dataset import load
from .training import TimedLog, cosine_rate, random_shift, set_rate, to_float

BATCH, RATE, WARMUP_STEPS, SHIFT_PX = 16, 2e-3, 100, 6
MOST_LATENT_NOISE = 0.12  # in units of the latents' deviation: the decoder must bear what the UNet gets wrong
EDGE_WEIGHT, SQUARE_WEIGHT = 1.0, 1.0


def reconstruction_loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """L1 for flat colours, squares for what stands out, differences of neighbours for sharp edges."""
    loss = F.l1_loss(found, wanted) + SQUARE_WEIGHT * F.mse_loss(found, wanted)
    for dim in (-1, -2):
        loss = loss + EDGE_WEIGHT * F.l1_loss(found.diff(dim=dim), wanted.diff(dim=dim))
    return loss


def psnr_db(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of pictures in [-1, 1], one number each, channels and pixels together."""
    return -10 * torch.log10(((found - wanted) / 2).square().flatten(1).mean(1))


def _unit_latent(raw_B4hw: torch.Tensor) -> torch.Tensor:
    """Normalised over the batch, per channel: keeps scale and spread of the latents while they are being invented."""
    deviation, mean = torch.std_mean(raw_B4hw, dim=(0, 2, 3), keepdim=True)
    return (raw_B4hw - mean) / (deviation + 1e-4)


def _training_step(model: Autoencoder, image: torch.Tensor, noise: torch.Tensor, decoder_only: bool) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        if decoder_only:
            with torch.no_grad():
                unit = model.encode(image).float() * model.latent_scale
        else:
            unit = _unit_latent(model.encoder(image).float())
        found = model.decoder(unit + noise)
    return reconstruction_loss(found.float(), image)


def _batch(images_NHWC: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    picked = torch.randint(len(images_NHWC), (BATCH,), generator=generator).numpy()
    image = random_shift(to_float(images_NHWC[picked]), SHIFT_PX, generator)
    if torch.rand((), generator=generator) < 0.5:
        image = image.flip(-1)
    level_B111 = MOST_LATENT_NOISE * torch.rand(BATCH, 1, 1, 1, generator=generator)
    size = (BATCH, LATENT_CHANNELS, image.shape[-2] // DOWNSCALE, image.shape[-1] // DOWNSCALE)
    return image.contiguous(memory_format=torch.channels_last), level_B111 * torch.randn(size, generator=generator)


@torch.no_grad()
def measure_statistics(model: Autoencoder, images: torch.Tensor) -> None:
    """Training normalised each batch; from now on the mean and deviation over `images` do."""
    raw = torch.cat([model.encoder(chunk) for chunk in images.split(32)])
    deviation, mean = torch.std_mean(raw, dim=(0, 2, 3))
    model.latent_mean.copy_(mean)
    model.latent_deviation.copy_(deviation)


@torch.no_grad()
def heldout_psnr_db(model: Autoencoder, images: torch.Tensor) -> float:
    found = torch.cat([model.decode(model.encode(chunk)) for chunk in images.split(32)])
    return psnr_db(found, images).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.emoji build`")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--decoder-only", type=Path, help="autoencoder whose encoder is kept")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    data = load(options.data)
    images = data.images_NHWC[data.positions("train")]
    heldout = to_float(data.images_NHWC[data.positions("heldout-pair")])
    model = Autoencoder(PLAYGROUND_SPEC.latent_scale)
    if options.decoder_only:
        model.load_state_dict(read_tensors(options.decoder_only, "an autoencoder")[0])
    model = model.to(memory_format=torch.channels_last)
    learning = model.decoder if options.decoder_only else model
    optimizer = torch.optim.AdamW(
        [{"params": learning.parameters(), "base_lr": options.rate}], weight_decay=0.01, fused=True
    )
    log = TimedLog(options.out.with_suffix(".jsonl"))
    for step in range(options.steps):
        set_rate(optimizer, cosine_rate(step, options.steps, WARMUP_STEPS))
        image, noise = _batch(images, generator)
        loss = _training_step(model, image, noise, bool(options.decoder_only))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            log.write(step=step, loss=round(loss.item(), 4))
    if not options.decoder_only:
        measure_statistics(model, to_float(images))
    log.write(step=options.steps, heldout_psnr_db=round(heldout_psnr_db(model, heldout), 2))
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, options.out, metadata={"steps": str(options.steps), "licence": "see CREDITS.md"})


if __name__ == "__main__":
    main()
