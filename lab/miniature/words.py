"""`python -m lab.miniature.words --data DIR --clip STATE --unet STATE --judge STATE --out DIR`: what words alone reach.

On held-out (concept, style, tone) triples: prompts that name the thing only, also the tone, also the style, and all of it.
The last line is the ceiling of any module on this frozen base. Real pictures and reconstructions are the judge's own ceilings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from lab.playground.evaluate import save_sheet
from lab.playground.training import to_float

from .captions import full_caption
from .dataset import PAIR, TRAIN, TRIPLE, Row, load
from .drawing import GUIDANCE, STEPS, draw, load_base
from .judge import load_judge
from .scores import Scorer, Table
from .timed import read_state
from .trials import choose_targets


def _tone(row: Row) -> str:
    return f", {row.tone.replace('-', ' ')} skin" if row.tone else ""


PROMPTS: dict[str, Callable[[Row], str]] = {
    "the thing": lambda row: row.names[0],
    "and its tone": lambda row: row.names[0] + _tone(row),
    "and its style": lambda row: f"{row.names[0]}, {row.style} style",
    "and both": full_caption,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    for part in ("clip", "unet", "judge"):
        parser.add_argument(f"--{part}", type=Path, required=True, help="state of its training")
    parser.add_argument("--autoencoder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for words.json and the sheets")
    parser.add_argument("--split", default=TRIPLE, choices=[TRAIN, TRIPLE, PAIR])
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load(options.data)
    base = load_base(options.clip, options.unet, options.autoencoder, options.device)
    scorer = Scorer(load_judge(options.judge, data, options.device), data)
    targets = choose_targets(data, options.split, options.pictures, options.seed)
    rows = [data.rows[target] for target in targets]
    settings = {"split": options.split, "pictures": options.pictures, "guidance": options.guidance, "steps": STEPS,
                "seed": options.seed, "unet": read_state(options.unet)["step"]}
    table = Table(options.out / f"words-{options.split}.json", settings)
    real = to_float(data.images_NHWC[targets])
    with torch.no_grad():
        back = base.autoencoder.decode(base.autoencoder.encode(real.to(options.device))).cpu()
    table.add("real pictures", scorer.score(real, targets))
    table.add("autoencoder", scorer.score(back, targets))
    for name, prompt in PROMPTS.items():
        if name not in table:
            pictures = draw(base, [prompt(row) for row in rows], range(len(rows)), options.guidance)
            save_sheet(pictures, options.out / f"words-{name.replace(' ', '-')}.png")
            table.add(name, scorer.score(pictures, targets))
    print(table.markdown())


if __name__ == "__main__":
    main()
