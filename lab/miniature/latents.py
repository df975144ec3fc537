"""`python -m lab.miniature.latents --data DIR --out FILE`: every picture's latent, once, and how well pictures come back.

Shapes: N pictures, latents 4 x h x w of deviation 1.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from emma_core.playground.autoencoder import Autoencoder
from lab.playground.train_autoencoder import psnr_db
from lab.playground.training import to_float

from .dataset import Pictures, load
from .train_autoencoder import load_trained

_CHUNK = 32


@torch.no_grad()
def encode_all(autoencoder: Autoencoder, data: Pictures, device: str) -> torch.Tensor:
    """(N, 4, h, w) float16."""
    chunks = (to_float(data.images_NHWC[start:start + _CHUNK]).to(device) for start in range(0, len(data.rows), _CHUNK))
    latents = [autoencoder.encode(chunk).half().cpu() for chunk in chunks]
    return torch.cat(latents).contiguous()


@torch.no_grad()
def psnr_of_styles(
    autoencoder: Autoencoder, data: Pictures, latents_N4hw: torch.Tensor, every: int, device: str
) -> dict[str, float]:
    """Mean PSNR in dB by style, over every so-manieth picture."""
    by_style: dict[str, list[int]] = defaultdict(list)
    for position in range(0, len(data.rows), every):
        by_style[data.rows[position].style].append(position)
    found = {}
    for style, positions in by_style.items():
        chunks = [positions[start:start + _CHUNK] for start in range(0, len(positions), _CHUNK)]
        decibels = [psnr_db(autoencoder.decode(latents_N4hw[chunk].float().to(device)),
                            to_float(data.images_NHWC[chunk]).to(device)) for chunk in chunks]
        found[style] = round(torch.cat(decibels).mean().item(), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, help="state of `train_autoencoder`; default: the shipped one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--every", type=int, default=40, help="of how many pictures one is decoded for the PSNR")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, autoencoder = load(options.data), load_trained(options.autoencoder, options.device)
    latents_N4hw = encode_all(autoencoder, data, options.device)
    save_file({"latents": latents_N4hw}, options.out)
    print(json.dumps({"deviation": latents_N4hw.float().std(dim=(0, 2, 3)).tolist(),
                      "psnr_db": psnr_of_styles(autoencoder, data, latents_N4hw, options.every, options.device)}))


if __name__ == "__main__":
    main()
