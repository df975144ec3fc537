"""`python -m emma_core.playground.evaluate --data DIR --judge FILE --out DIR`: do the modules do what they claim?

On held-out (role, vendor, tone) triples: the prompt names the role, the style reference is another emoji of the wanted
vendor, the face reference another person of the wanted tone by another vendor. A judge says which vendor, tone and
caption the picture has; real pictures and autoencoder reconstructions are the ceilings.

Shapes: B pictures of H x W pixels.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..assembly import Assembly, Reference
from ..emoji.dataset import EmojiPeople, Row, load
from ..generate import Request, Sampling, generate
from . import PLAYGROUND_DIR, load_autoencoder
from .judge import Judge, load_judge, verdicts
from .pairs import ReferencePicker
from .train_encoder import LABELS, labels_of
from .training import to_float
from .world import World, load_world

ALL = "all three"
RESAMPLES, CONFIDENCE = 2000, 0.95
STRENGTHS = (1.0, 1.25, 1.5)
SHEET_COLUMNS, SHEET_PICTURES = 16, 32


@dataclass(frozen=True)
class Trial:
    """One held-out picture to aim at, by position in the data, and its two references."""

    target: int
    style: int
    face: int


def choose_trials(data: EmojiPeople, count: int, seed: int) -> list[Trial]:
    """Held-out pictures, vendors in turn; references come from the train split."""
    chance = random.Random(seed)
    picker = ReferencePicker(data.rows, data.positions("train"))
    heldout = data.positions("heldout-pair") + data.positions("heldout-triple")
    chance.shuffle(heldout)
    queues = [[position for position in heldout if data.rows[position].vendor == vendor] for vendor in picker.vendors]
    most = max(map(len, queues))
    targets = [queue[turn] for turn in range(most) for queue in queues if turn < len(queue)][:count]
    return [Trial(target, picker.style(data.rows[target], chance), picker.face(data.rows[target], chance, True))
            for target in targets]


def shuffled_trials(trials: Sequence[Trial], rows: Sequence[Row], seed: int) -> list[Trial]:
    """The same references, given to other targets: each at random to one of another vendor, or of another tone."""
    chance = random.Random(seed)
    shuffled = []
    for trial in trials:
        target = rows[trial.target]
        styles = [other.style for other in trials if rows[other.style].vendor != target.vendor]
        faces = [other.face for other in trials if rows[other.face].tone != target.tone]
        shuffled.append(replace(trial, style=chance.choice(styles), face=chance.choice(faces)))
    return shuffled


class Generation:
    """Pictures of trials with chosen conditions and strengths; the noise of a trial is the same in every row."""

    def __init__(self, world: World, data: EmojiPeople, sampling: Sampling):
        self._world, self._data, self._sampling = world, data, sampling
        self._known: dict[tuple[str, int], Reference] = {}

    def _reference(self, condition: str, position: int) -> Reference:
        key = (condition, position)
        if key not in self._known:
            image_1HW3 = torch.from_numpy(self._data.images_NHWC[position].copy())[None].float() / 255
            self._known[key] = self._world.encode_reference(condition, image_1HW3)
        return self._known[key]

    def pictures(self, trials: Sequence[Trial], strengths: dict[str, float]) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1]; `strengths` by condition, a condition left out has no reference."""
        requests = []
        for seed, trial in enumerate(trials):
            references = [replace(self._reference(condition, getattr(trial, condition)), strength=strength)
                          for condition, strength in strengths.items()]
            requests.append(Request(self._data.rows[trial.target].caption, Assembly(references), seed=seed))
        return generate(self._world.pipeline, requests, self._sampling).permute(0, 3, 1, 2) * 2 - 1


@dataclass(frozen=True)
class Score:
    """Share of right verdicts, with a bootstrap interval over base emoji."""

    mean: float
    low: float
    high: float


def hits_of(judge: Judge, image_B3HW: torch.Tensor, wanted: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Right verdicts (B,) per kind of label, and for all kinds at once."""
    found = verdicts(judge, image_B3HW)
    hits = {label: (found[label] == wanted[label]).numpy() for label in LABELS}
    return {**hits, ALL: np.logical_and.reduce(list(hits.values()))}


def bootstrapped(hit_B: np.ndarray, emoji: Sequence[str], seed: int = 0) -> Score:
    """Resamples base emoji, not pictures: pictures of one emoji succeed and fail together."""
    names = sorted(set(emoji))
    groups = [hit_B[[index for index, one in enumerate(emoji) if one == name]] for name in names]
    sums, counts = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    picked = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    means = sums[picked].sum(1) / counts[picked].sum(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Score(float(hit_B.mean()), float(low), float(high))


def rows_to_generate(strengths: Sequence[float]) -> dict[str, dict[str, float]]:
    """Name of a row -> strength of each condition."""
    alone = {"text only": {}, "+ style": {"style": 1.0}, "+ face": {"face": 1.0}}
    assembled = {f"assembled, strength {strength:g}": {"style": strength, "face": strength} for strength in strengths}
    return {**alone, **assembled}


def table(scores: dict[str, dict[str, Score]]) -> str:
    """Markdown."""
    columns = [*LABELS, ALL]
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for row, score in scores.items():
        cells = [f"{score[name].mean:.2f} ({score[name].low:.2f} to {score[name].high:.2f})" for name in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save_sheet(image_B3HW: torch.Tensor, path: Path) -> None:
    """The first pictures of a row, side by side."""
    shown = ((image_B3HW[:SHEET_PICTURES] + 1) * 127.5).clamp(0, 255).round().byte()
    lines = [torch.cat(list(line), dim=2) for line in shown.split(SHEET_COLUMNS) if len(line) == SHEET_COLUMNS]
    Image.fromarray(torch.cat(lines, dim=1).permute(1, 2, 0).numpy()).save(path)


@torch.no_grad()
def evaluate(options: argparse.Namespace) -> dict[str, dict[str, Score]]:
    data, judge = load(options.data), load_judge(options.judge)
    generation = Generation(load_world(options.playground), data,
                            Sampling(steps=options.steps, guidance=options.guidance))
    autoencoder = load_autoencoder(options.playground / "autoencoder.safetensors")
    trials = choose_trials(data, options.pictures, options.seed)
    targets = [trial.target for trial in trials]
    numbers, classes = labels_of(data)
    wanted = {label: numbers[label][targets] for label in LABELS}
    emoji = [data.rows[target].emoji for target in targets]
    real_B3HW = to_float(data.images_NHWC[targets])
    jobs = {"real pictures": lambda: real_B3HW, "autoencoder": lambda: autoencoder.decode(autoencoder.encode(real_B3HW))}
    for name, strengths in rows_to_generate(options.strengths).items():
        jobs[name] = lambda strengths=strengths: generation.pictures(trials, strengths)
    misled = shuffled_trials(trials, data.rows, options.seed)
    jobs["assembled, references shuffled"] = lambda: generation.pictures(misled, {"style": 1.0, "face": 1.0})
    scores = {}
    options.out.mkdir(parents=True, exist_ok=True)
    for row, make in jobs.items():
        if options.rows and row not in options.rows:
            continue
        image_B3HW = make()
        scores[row] = {name: bootstrapped(hit_B, emoji) for name, hit_B in hits_of(judge, image_B3HW, wanted).items()}
        save_sheet(image_B3HW, options.out / f"{row.replace(',', '').replace(' ', '-')}.png")
        print(table({row: scores[row]}).splitlines()[-1], flush=True)
    chance = {label: 1 / count for label, count in classes.items()}
    report = {"pictures": len(trials), "base_emoji": len(set(emoji)), "guidance": options.guidance, "steps": options.steps,
              "chance": chance, "scores": {row: {name: vars(one) for name, one in score.items()}
                                           for row, score in scores.items()}}
    (options.out / "scores.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m emma_core.emoji build`")
    parser.add_argument("--judge", type=Path, required=True, help="file of `python -m emma_core.playground.judge`")
    parser.add_argument("--out", type=Path, required=True, help="folder for scores.json and the sheets")
    parser.add_argument("--playground", type=Path, default=PLAYGROUND_DIR)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--rows", nargs="+", help="only these rows, by name")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(table(evaluate(options)))


if __name__ == "__main__":
    main()
