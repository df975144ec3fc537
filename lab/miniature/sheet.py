"""`python -m lab.miniature.sheet --clip STATE --unet STATE --out FILE`: what the base draws from words, to be looked at."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from emma_core.drawing.contact_sheet import SheetRow, draw_contact_sheet

from .drawing import GUIDANCE, draw, load_base

THINGS = ("cat", "dog", "cup of coffee", "house", "hamburger", "pizza", "red car", "rocket", "tree", "guitar",
          "woman cook", "man police officer", "santa", "doctor", "princess", "smiley", "thumbs up", "fish", "birthday cake",
          "book")
STYLES = ("", "noto", "twemoji", "3d", "flat", "stencil", "emojione", "silhouette", "blob")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--unet", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--things", nargs="+", default=THINGS)
    parser.add_argument("--styles", nargs="+", default=STYLES)
    parser.add_argument("--suffix", default="", help="words behind each prompt")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base(options.clip, options.unet, options.autoencoder, options.device)
    texts = [f"{thing}{options.suffix}" + (f", {style} style" if style else "")
             for thing in options.things for style in options.styles]
    seeds = [number for number, _ in enumerate(options.things) for _ in options.styles]
    pictures = (draw(base, texts, seeds, options.guidance).permute(0, 2, 3, 1) + 1) / 2
    columns = len(options.styles)
    rows = [SheetRow(f'"{thing}{options.suffix}"', list(pictures[index * columns:(index + 1) * columns]))
            for index, thing in enumerate(options.things)]
    titles = [style or "words alone" for style in options.styles]
    draw_contact_sheet(titles, rows, 0, f"guidance {options.guidance:g}").save(options.out)


if __name__ == "__main__":
    main()
