"""`python -m lab.playground.token_sizes --pictures PICTURES --out SIZES`: how large modules on a model's own tokens should be.

The playground's UNet grew up on its connector's tokens, so these stand for the text of a model without ELLA: the module's
blocks follow one another behind the connector's last. Every trial learns for the same processor time, by the preset
`small-card`, the tokens that the shipped style (or face) module makes between the connector's blocks: without the noise of
pictures' targets, sizes differ long before they do on pictures. It is judged by held-out references: how far its tokens are
from the shipped module's, and what it takes from the UNet's error on held-out pictures. PICTURES is what
`python -m lab.playground.training_data` wrote.

Shapes: B rows of a batch, N evaluated rows, K tokens of width W, E channels of the time embedding.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from emma_core.base.parts import UNET, Parts
from emma_core.base.schedule import TIMESTEPS
from emma_core.files.module_file import load_module
from emma_core.model.connector import Connector
from emma_core.model.gated_resampler import GatedResampler
from emma_core.model.own_tokens import OwnTokens
from emma_core.model.source_spec import SourceSpec, TimeSpec
from emma_core.playground import PLAYGROUND_DIR
from emma_core.training.beginning import encoder_metadata
from emma_core.training.config import TrainConfig, resolve
from emma_core.training.draws import Batch, BatchRow, TrainingSet
from emma_core.training.examples import read_examples
from emma_core.training.losses import TimestepBuckets
from emma_core.training.parts import load_parts
from emma_core.training.places import place_weights
from emma_core.training.prepared import Prepared
from emma_core.training.runs import encoded
from emma_core.training.shards import Processes
from emma_core.training.starts import begin_module, size_of_tokens
from emma_core.training.student import Student
from emma_core.training.trainer import Trainer

BATCH = 16
RANGES = ((600, 800), (800, TIMESTEPS))  # where a reference shows
DRAWS = 2  # of noise and timestep for each held-out picture, in each range
_TIMED = 6  # updates that say how long one takes, after as many that warm up
_SMALL_DEVIATION = 0.02
_LEAST_CHANGE = 1e-6  # of tokens; a batch may have no reference at all
_RESAMPLED = 2000


@dataclass(frozen=True)
class Trial:
    """A size and a way to train it.

    Args:
        layers: blocks.
        inner: width inside them; the tokens have 128.
        rate: of AdamW.
        start: how new matrices are drawn: "size" is `begin_module`'s, each keeps the size of what it reads; or "small".
        seed: of weights and draws.
    """

    layers: int = 4
    inner: int = 128
    rate: float = 2e-3
    start: str = "size"
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.layers} x {self.inner}, rate {self.rate:g}, {self.start}, seed {self.seed}"


USUAL = Trial()
TRIALS = (USUAL, replace(USUAL, layers=2), replace(USUAL, inner=256), replace(USUAL, start="small"), replace(USUAL, layers=6),
          replace(USUAL, inner=64), replace(USUAL, rate=4e-3), replace(USUAL, rate=1e-3), replace(USUAL, seed=1))


@dataclass(frozen=True, eq=False, kw_only=True)
class BehindConnector(OwnTokens):
    """A connector's tokens as the text that a model reads anyway."""

    connector: Connector

    def project_text(self, text_BND: torch.Tensor) -> torch.Tensor:
        return self.connector.project_text(text_BND)

    def activated_time_embedding(self, timestep_B: torch.Tensor) -> torch.Tensor:
        return self.connector.activated_time_embedding(timestep_B)

    def start(self, text_BNW: torch.Tensor, activated_temb_BE: torch.Tensor) -> torch.Tensor:
        latents_BKW = self.connector.start(text_BNW, activated_temb_BE)
        for index in range(self.connector.layers):
            latents_BKW = self.connector.block(index, latents_BKW, text_BNW, activated_temb_BE)
        return latents_BKW


@dataclass(frozen=True, eq=False)
class TokenStudent(Student):
    """Learns the tokens that another module makes between the connector's blocks; the UNet takes no part.

    Args:
        taught: that module.
    """

    taught: GatedResampler | None = None

    def _errors(self, data: TrainingSet, batch: Batch, device: torch.device, with_reference: bool = True):
        """(B,) squared distance of the tokens, as a share of what the other module changes in them."""
        shown = Student(self.denoiser, self.connector.connector, self.taught, self.objective)
        with torch.no_grad():
            wanted_BKW = shown.terms(data, batch, device).tokens_BKW
            change = (wanted_BKW - shown.terms(data, batch, device, with_reference=False).tokens_BKW).square().mean()
        found_BKW = self.terms(data, batch, device, with_reference).tokens_BKW
        error_B = (found_BKW - wanted_BKW).square().flatten(1).mean(1) / change.clamp(min=_LEAST_CHANGE)
        return error_B, torch.ones_like(error_B)


@dataclass(frozen=True, eq=False)
class Bench:
    """What all trials of a condition share."""

    config: TrainConfig
    parts: Parts
    seen: Prepared
    unseen: Prepared
    stream: BehindConnector
    out: Path

    @classmethod
    def load(cls, condition: str, pictures: Path, out: Path) -> Bench:
        config = _config(condition, pictures / f"{condition}.jsonl", out)
        parts = load_parts(config, torch.float32, torch.device("cpu"))
        sets = []
        for file in (f"{condition}.jsonl", f"{condition}-heldout.jsonl"):
            here = _config(condition, pictures / file, out)
            examples, _ = read_examples(here.data)
            sets.append(encoded(here, parts, examples, out, Processes(), _untold)[0])
        parts.place(UNET)
        spec = SourceSpec("playground", parts.connector.width)
        stream = BehindConnector(source=spec, time=TimeSpec("ddpm"), connector=parts.connector.requires_grad_(False))
        return cls(config, parts, *sets, stream, out)

    @property
    def shipped(self) -> GatedResampler:
        """The module that is learnt from."""
        return load_module(PLAYGROUND_DIR / f"emma-{self.config.module.condition}.safetensors")

    def trainer(self, trial: Trial, steps: int, folder: Path) -> Trainer:
        """At the first update of a trial."""
        from accelerate import Accelerator

        config = replace(self.config, module=replace(self.config.module, layers=trial.layers, inner=trial.inner),
                         train=replace(self.config.train, rate=trial.rate, seed=trial.seed, steps=steps))
        generator = torch.Generator().manual_seed(trial.seed)
        features = self.seen.features(self.seen.references(0)[0], 0)
        size = size_of_tokens(self.stream.tokens(self.seen.text(self.seen.captions(0)[0]), 500.0).detach())
        module = begin_module(config, self.stream, {name: one.shape[-1] for name, one in features.items()},
                              encoder_metadata(config, self.parts.reference_encoder.description, tuple(features)), generator,
                              size)
        if trial.start == "small":
            _draw_small(module, generator)
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        return Trainer(config, self.copier(module), self.seen, accelerator, folder)

    def copier(self, module: GatedResampler) -> TokenStudent:
        return TokenStudent(**vars(self.student(module, self.seen)), taught=self.shipped)

    def student(self, module: GatedResampler, data: Prepared) -> Student:
        return Student(self.parts.backbone, self.stream, module, self.config.objective, places=place_weights(data).get)


def _untold(what: str, done: int, total: int) -> None:
    """Encoding is not shown."""


def _config(condition: str, jsonl: Path, out: Path) -> TrainConfig:
    return resolve({}, "small-card", {
        "data.jsonl": str(jsonl), "data.cache": str(out / "cache"), "data.reference_crops": 0, "data.reference_flip": False,
        "data.workers": 0, "module.condition": condition, "train.batch": BATCH, "train.accumulate": 1,
        "train.precision": "bf16", "train.gradient_checkpointing": False, "output.folder": str(out),
        "report.save_every": 10_000})


@torch.no_grad()
def _draw_small(module: GatedResampler, generator: torch.Generator) -> None:
    """As new blocks on an ELLA begin: every matrix of the same small deviation."""
    for name, weight in module.named_parameters():
        if name.startswith(("blocks.", "time_embedding.")) and weight.ndim > 1 and not name.endswith("gate.weight") and \
                ".linear." not in name:
            weight.normal_(0, _SMALL_DEVIATION, generator=generator)


def updates_within(seconds: float, bench: Bench, trial: Trial) -> int:
    """How many updates fit into so much processor time."""
    trainer = bench.trainer(trial, 2 * _TIMED, bench.out / "timed")
    taken = []
    for _ in range(2 * _TIMED):
        started = time.process_time()
        trainer.update(TimestepBuckets())
        taken.append(time.process_time() - started)
    return max(1, round(seconds / float(np.median(taken[_TIMED:]))))


def held_out_batches(data: Prepared) -> Iterator[tuple[int, Batch]]:
    """(index of a range of timesteps, batch) over all held-out pictures, the same for every trial."""
    generator = torch.Generator().manual_seed(11)
    shape = data.latent(0).shape
    for place, (first, end) in enumerate(RANGES):
        for number in range(DRAWS):
            for start in range(0, len(data), BATCH):
                targets = range(start, min(start + BATCH, len(data)))
                rows = tuple(BatchRow(target, False, data.captions(target)[0], data.references(target)[number], 0, 1.0)
                             for target in targets)
                timestep_B = torch.randint(first, end, (len(rows),), generator=generator)
                yield place, Batch(0, rows, timestep_B, torch.randn((len(rows), *shape), generator=generator))


@torch.no_grad()
def errors(student: Student, data: Prepared, shown: bool) -> np.ndarray:
    """(ranges, draws, pictures) errors on held-out pictures, with the reference or by the text alone."""
    found: list[list[torch.Tensor]] = [[] for _ in RANGES]
    with torch.autocast("cpu", torch.bfloat16):
        for place, batch in held_out_batches(data):
            found[place].append(student.errors(data, batch, torch.device("cpu"), shown)[0].float())
    return torch.stack([torch.cat(one).reshape(DRAWS, len(data)) for one in found]).numpy()


def run_trial(bench: Bench, condition: str, trial: Trial, seconds: float) -> None:
    """Train it and keep its errors; one that is there already is not trained again."""
    kept = bench.out / f"{condition} {trial.name}.npz"
    if kept.exists():
        return
    steps = updates_within(seconds, bench, trial)
    folder = bench.out / "runs" / kept.stem
    trainer = bench.trainer(trial, steps, folder)
    trainer.resume()
    trainer.run()
    module = trainer.result()
    found = errors(bench.student(module, bench.unseen), bench.unseen, True)
    tokens = errors(bench.copier(module), bench.unseen, True)
    parameters = sum(value.numel() for value in module.parameters())
    np.savez(kept, errors=found, tokens=tokens, steps=steps, parameters=parameters, seconds=trainer.seconds)
    print(condition, trial.name, steps, "updates", f"{parameters:,}", "parameters", flush=True)


def plain_errors(bench: Bench, condition: str) -> np.ndarray:
    """Of the text alone: the same for all trials."""
    kept = bench.out / f"{condition} text only.npz"
    if not kept.exists():
        module = bench.trainer(USUAL, 1, bench.out / "timed").result()
        np.savez(kept, errors=errors(bench.student(module, bench.unseen), bench.unseen, False))
    return np.load(kept)["errors"]


def table(out: Path, condition: str, trials: Sequence[Trial]) -> str:
    """Markdown: how far the tokens are, what the reference takes from the UNet's error, and the difference of the former to the
    usual trial with its interval.
    """
    plain = np.load(out / f"{condition} text only.npz")["errors"]
    usual = np.load(out / f"{condition} {USUAL.name}.npz")["tokens"]
    lines = [f"| {condition} | parameters | updates | distance of tokens | against the first | error at 600-799 | at 800-999 |",
             "| --- |" + " --- |" * 6]
    for trial in trials:
        file = out / f"{condition} {trial.name}.npz"
        if not file.exists():
            continue
        kept = np.load(file)
        taken = [f"{100 * (one.sum() / text.sum() - 1):+.1f}%" for one, text in zip(kept["errors"], plain, strict=True)]
        low, high = _interval(kept["tokens"] - usual)
        lines.append(f"| {trial.name} | {int(kept['parameters']):,} | {int(kept['steps'])} | {kept['tokens'].mean():.3f} | "
                     f"{low:+.3f} to {high:+.3f} | {taken[0]} | {taken[1]} |")
    return "\n".join(lines)


def _interval(difference: np.ndarray) -> tuple[float, float]:
    """95% of the mean difference, pictures resampled."""
    difference_N = difference.mean((0, 1))
    picked = np.random.default_rng(0).integers(0, len(difference_N), (_RESAMPLED, len(difference_N)))
    low, high = np.quantile(difference_N[picked].mean(1), (0.025, 0.975))
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="what `training_data` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of trials; those that are there are not run again")
    parser.add_argument("--conditions", nargs="+", default=["style", "face"])
    parser.add_argument("--seconds", type=float, default=150, help="of processor time for the updates of each trial")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for condition in options.conditions:
        bench = Bench.load(condition, options.pictures, options.out)
        plain_errors(bench, condition)
        for trial in TRIALS:
            run_trial(bench, condition, trial, options.seconds)
        print(table(options.out, condition, TRIALS), flush=True)


if __name__ == "__main__":
    main()
