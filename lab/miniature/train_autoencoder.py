"""`python -m lab.miniature.train_autoencoder --data DIR --state FILE`: an autoencoder for all styles, from the shipped one on.

With `--decoder-only` the encoder (and so every latent made with it) stays as it is and the decoder learns on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from emma_core.playground.autoencoder import DOWNSCALE, LATENT_CHANNELS, Autoencoder
from emma_core.playground.files import load_autoencoder
from lab.playground.train_autoencoder import MOST_LATENT_NOISE, reconstruction_loss
from lab.playground.train_encoder import augmented
from lab.playground.training import to_float

from .dataset import SIZE_PX, TRAIN, load
from .feed import Feed
from .timed import TimedRun, add_run_arguments, begin, load_averaged

BATCH, RATE = 16, 1e-3
_STATISTICS_PICTURES = 2048


def unit_latents(model: Autoencoder, image_B3SS: torch.Tensor, keep_encoder: bool) -> torch.Tensor:
    """Of deviation 1: by the file's statistics, or by the batch's while the encoder learns."""
    if keep_encoder:
        with torch.no_grad():
            return model.encode(image_B3SS).float()
    raw_B4hw = model.encoder(image_B3SS).float()
    deviation, mean = torch.std_mean(raw_B4hw, dim=(0, 2, 3), keepdim=True)
    return (raw_B4hw - mean) / (deviation + 1e-4)


@torch.no_grad()
def measure_statistics(model: Autoencoder, image_N3SS: torch.Tensor) -> None:
    """Training normalised each batch; from now on the mean and deviation over these pictures do."""
    raw_N4hw = torch.cat([model.encoder(chunk) for chunk in image_N3SS.split(64)])
    deviation, mean = torch.std_mean(raw_N4hw, dim=(0, 2, 3))
    model.latent_mean.copy_(mean)
    model.latent_deviation.copy_(deviation)


def load_trained(state: Path | None, device: str) -> Autoencoder:
    """The averaged autoencoder of a state, or the shipped one; frozen, its latents of deviation 1."""
    if state is None:
        return load_autoencoder(1.0, device=device)
    return load_averaged(Autoencoder(1.0), state).to(device)


def train(options: argparse.Namespace) -> None:
    begin(options)
    data, device = load(options.data), options.device
    seen = data.positions(TRAIN)
    feed = Feed(data, seen, None, device)
    images_NHWC = torch.from_numpy(data.images_NHWC)
    if device != "cpu":
        images_NHWC = images_NHWC.to(device)
    model = load_autoencoder(1.0).to(device).requires_grad_(True).train()
    if options.decoder_only:
        model.encoder.requires_grad_(False)
    run = TimedRun(model, options, RATE)
    latent_size = (LATENT_CHANNELS, SIZE_PX // DOWNSCALE, SIZE_PX // DOWNSCALE)

    def loss_of_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        position_B = feed.draw(options.batch, generator)
        image_B3SS = images_NHWC[position_B].permute(0, 3, 1, 2).float() / 127.5 - 1
        image_B3SS = augmented(image_B3SS, generator).contiguous(memory_format=torch.channels_last)
        level_B111 = MOST_LATENT_NOISE * torch.rand(options.batch, 1, 1, 1, generator=generator, device=device)
        noise_B4hw = level_B111 * torch.randn((options.batch, *latent_size), generator=generator, device=device)
        with torch.autocast(device, torch.bfloat16):
            found_B3SS = model.decoder(unit_latents(model, image_B3SS, options.decoder_only) + noise_B4hw)
        return {"loss": reconstruction_loss(found_B3SS.float(), image_B3SS)}

    run.run(loss_of_batch)
    run.use_average()
    if not options.decoder_only:
        some = seen[::max(1, len(seen) // _STATISTICS_PICTURES)]
        measure_statistics(model, to_float(data.images_NHWC[some]).to(device))
        run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, minutes=10)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--decoder-only", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
