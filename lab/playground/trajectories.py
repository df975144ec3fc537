"""`python -m lab.playground.trajectories --pictures PICTURES --data DIR --judge FILE --out OUT`: which latents to distil on.

A new style module learns what the shipped one predicts, its teacher, for equal updates on: noised pictures; noised samples of
the text alone, as `teacher.own_latents` draws them; noised samples that the teacher drew with the reference; and latents as
the teacher's sampling visits them. A judge looks at pictures of held-out prompts and styles, and each module is compared with
the teacher where the teacher's sampling goes. PICTURES is what `python -m lab.playground.training_data` wrote; a run can be
stopped and called again.

Shapes: B rows, K tokens of width W, S steps of sampling, latents 4 x h x w.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from emma_core.base.parts import UNET, Parts
from emma_core.base.pipeline import Sampling
from emma_core.base.schedule import TIMESTEPS
from emma_core.files.module_file import load_module, save_module
from emma_core.model.gated_resampler import GatedResampler
from emma_core.playground import PLAYGROUND_DIR
from emma_core.training.beginning import Frozen, begin
from emma_core.training.config import TrainConfig, resolve
from emma_core.training.draws import Batch, BatchRow, Draws
from emma_core.training.examples import read_examples
from emma_core.training.own_latents import OwnLatents, sample_latents
from emma_core.training.parts import load_parts
from emma_core.training.prepared import Prepared
from emma_core.training.runs import encoded
from emma_core.training.shards import Processes
from emma_core.training.student import Student, TeacherTarget

from ..emoji.dataset import load
from .evaluate import Generation, Line, bootstrapped, choose_trials, hits_of, save_sheet, table
from .judge import load_judge
from .train_encoder import LABELS, labels_of
from .world import load_world

BATCH, AT_ONCE = 16, 32
STEPS, GUIDANCE = 20, 4.0  # of sampling
SHOWS = 600  # from this timestep on a reference shows
COMPARED = 48  # held-out pairs whose sampling says how far a module is from its teacher
_CPU = torch.device("cpu")
_RESAMPLED = 2000


@dataclass(frozen=True)
class Samples:
    """What sampling drew.

    Args:
        rows: prompt and reference of each sample.
        latents: (4, h, w) of each.
        paths: (S, 4, h, w), what the model was shown on the way, from the most noise on.
    """

    rows: Sequence[BatchRow]
    latents: Sequence[torch.Tensor]
    paths: Sequence[torch.Tensor]


class OfTheirReferences(OwnLatents):
    """Samples that a teacher drew, each with the reference that it drew it with."""

    def __init__(self, samples: Samples, references: Prepared):
        texts = {caption: references.text(caption) for caption in {"", *(row.caption for row in samples.rows)}}
        super().__init__([row.caption for row in samples.rows], texts, samples.latents, references, references.bucket(0))
        self._rows = samples.rows

    def references(self, index: int) -> tuple[int, ...]:
        return (self._rows[index].reference,)


class OnPaths(Draws):
    """Draws whose noise makes of a sample the very latent that sampling visited, at the nearest timestep that it visited."""

    def __init__(self, *arguments, paths: Sequence[torch.Tensor], kept_T: torch.Tensor, **named):
        super().__init__(*arguments, **named)
        self._paths, self._kept_T, self._visited_S = paths, kept_T, visited(len(paths[0]))

    def draw(self) -> Batch:
        batch = super().draw()
        step_B = (batch.timestep_B[:, None] - self._visited_S).abs().argmin(1)
        timestep_B = self._visited_S[step_B]
        kept_B111 = self._kept_T[timestep_B][:, None, None, None]
        noised_B4hw = torch.stack([self._paths[row.target][step] for row, step in zip(batch.rows, step_B, strict=True)])
        clean_B4hw = torch.stack([self._data.latent(row.target) for row in batch.rows])
        noise_B4hw = (noised_B4hw - kept_B111.sqrt() * clean_B4hw) / (1 - kept_B111).sqrt()
        return replace(batch, timestep_B=timestep_B, noise_B4hw=noise_B4hw)


def visited(steps: int) -> torch.Tensor:
    """(S,) the timesteps of `sample_latents`."""
    found: list[torch.Tensor] = []
    sample_latents(lambda latent, timestep_B, _: found.append(timestep_B) or latent, torch.linspace(1, 0.01, TIMESTEPS),
                   torch.empty(0), torch.Generator(), steps, (1, 1, 1, 1))
    return torch.cat(found)


@dataclass(frozen=True, eq=False)
class Bench:
    """What all ways share: the frozen parts, the teacher, pictures that are learnt from and held-out ones."""

    config: TrainConfig
    parts: Parts
    encoder: dict
    seen: Prepared
    unseen: Prepared
    teacher: GatedResampler

    @classmethod
    def load(cls, pictures: Path, out: Path, updates: int) -> Bench:
        config, sets = _config(pictures / "style.jsonl", out, updates), []
        parts = load_parts(config, torch.float32, _CPU)
        for file in ("style.jsonl", "style-heldout.jsonl"):
            here = _config(pictures / file, out, updates)
            examples, _ = read_examples(here.data)
            sets.append(encoded(here, parts, examples, out, Processes(), lambda what, done, total: None)[0])
        description = parts.reference_encoder.description
        parts.place(UNET)
        parts.connector.requires_grad_(False)
        return cls(config, parts, description, *sets, load_module(PLAYGROUND_DIR / "emma-style.safetensors"))

    def student(self, module: GatedResampler) -> Student:
        return Student(self.parts.backbone, self.parts.connector, module, self.config.objective)

    def predicted(self, module: GatedResampler, data: Prepared, rows, noised_B4hw, timestep_B, shown: bool = True):
        """What a module makes of the rows' references, or what the text alone makes."""
        tokens_BKW = self.student(module).terms(data, Batch(0, tuple(rows), timestep_B, noised_B4hw), _CPU, shown).tokens_BKW
        return self.parts.backbone.predict_noise(noised_B4hw, timestep_B, tokens_BKW)

    def target(self, data: Prepared) -> TeacherTarget:
        """The teacher's prediction."""
        return TeacherTarget("module", lambda noised_B4hw, timestep_B, plain_BKW, rows:
                             self.predicted(self.teacher, data, rows, noised_B4hw, timestep_B))

    @torch.no_grad()
    def samples(self, data: Prepared, rows: Sequence[BatchRow], shown: bool) -> Samples:
        """Guided samples of the rows' prompts, with the teacher and their references or by the text alone."""
        latents, paths = [], []
        for start in range(0, len(rows), AT_ONCE):
            part, path = rows[start:start + AT_ONCE], []
            without = [replace(row, caption="", strength=0.0) for row in part]

            def predict(noised_B4hw, timestep_B, _, part=part, without=without, path=path):
                path.append(noised_B4hw)
                told = self.predicted(self.teacher, data, part, noised_B4hw, timestep_B, shown)
                plain = self.predicted(self.teacher, data, without, noised_B4hw, timestep_B, False)
                return plain + GUIDANCE * (told - plain)

            with torch.autocast("cpu", torch.bfloat16):
                found_B4hw = sample_latents(predict, self.parts.backbone.alphas_cumprod_T, torch.empty(0),
                                            torch.Generator().manual_seed(start + 7), STEPS,
                                            (len(part), *data.latent(0).shape))
            latents += list(found_B4hw.float())
            paths += list(torch.stack(path, 1).float())
        return Samples(rows, latents, paths)


def _config(jsonl: Path, out: Path, updates: int) -> TrainConfig:
    return resolve({}, "small-card", {
        "data.jsonl": str(jsonl), "data.cache": str(out / "cache"), "data.reference_crops": 0, "data.reference_flip": False,
        "data.workers": 0, "module.condition": "style", "train.batch": BATCH, "train.accumulate": 1, "train.steps": updates,
        "train.rate": 2e-3, "train.precision": "bf16", "train.gradient_checkpointing": False, "train.held_out": 0.0,
        "train.patience": 0, "objective.place_weight": False, "objective.drop_reference": 0.0, "objective.drop_both": 0.0,
        "objective.drop_text": 0.0, "output.folder": str(out), "output.calibrate": False, "report.save_every": 10_000})


def pairs(data: Prepared, count: int, seed: int) -> list[BatchRow]:
    """Prompts of pictures, each with a reference of that picture's style."""
    chance, rows = random.Random(seed), []
    for target in chance.choices(range(len(data)), k=count):
        caption, reference = chance.choice(data.captions(target)), chance.choice(data.references(target))
        rows.append(BatchRow(target, False, caption, reference, 0, 1.0))
    return rows


class Ways:
    """Each way to distil, by its name; samples are drawn when the first way needs them, and kept."""

    def __init__(self, bench: Bench, count: int, out: Path):
        self._bench, self._count, self._out = bench, count, out
        self.of: dict[str, Callable[[], GatedResampler]] = {
            "noised pictures": lambda: self._trained(bench.seen),
            "noised samples of the text": lambda: self._trained(self._of_text),
            "latents that the teacher's sampling visits": lambda: self._trained(self._of_teacher, self._taught.paths),
            "noised samples of the teacher": lambda: self._trained(self._of_teacher),
        }

    @cached_property
    def _told(self) -> Samples:
        return self._kept("text", False)

    @cached_property
    def _taught(self) -> Samples:
        return self._kept("teacher", True)

    @property
    def _of_text(self) -> OwnLatents:
        """Any reference goes with any of them."""
        bench, rows = self._bench, self._told.rows
        texts = {caption: bench.seen.text(caption) for caption in {"", *(row.caption for row in rows)}}
        return OwnLatents([row.caption for row in rows], texts, self._told.latents, bench.seen, bench.seen.bucket(0))

    @property
    def _of_teacher(self) -> OwnLatents:
        return OfTheirReferences(self._taught, self._bench.seen)

    def _kept(self, name: str, shown: bool) -> Samples:
        file = self._out / f"samples of the {name}.pt"
        rows = pairs(self._bench.seen, self._count, 1)
        if not file.exists():
            found = self._bench.samples(self._bench.seen, rows, shown)
            torch.save({"latents": torch.stack(list(found.latents)), "paths": torch.stack(list(found.paths))}, file)
        kept = torch.load(file)
        return Samples(rows, list(kept["latents"]), list(kept["paths"]))

    def _trained(self, data, paths: Sequence[torch.Tensor] = ()) -> GatedResampler:
        from accelerate import Accelerator

        bench = self._bench
        base = {"name": bench.parts.backbone.name, "sha256": bench.parts.backbone.sha256}
        frozen = Frozen(bench.parts.backbone, bench.parts.connector, base, bench.encoder, bench.target(bench.seen))
        trainer = begin(bench.config, frozen, data, Accelerator(mixed_precision="bf16", cpu=True), self._out / "run")
        if paths:
            trainer.draws = OnPaths(data, bench.config, lambda caption: data.text(caption).shape[1], paths=paths,
                                    kept_T=bench.parts.backbone.alphas_cumprod_T)
        trainer.run()
        return trainer.result()


@torch.no_grad()
def distances(bench: Bench, module: GatedResampler, sampled: Samples) -> np.ndarray:
    """(samples,) squared distance to the teacher on its sampling's path, as a share of the teacher's distance to the text,
    in each step; the mean over the steps where a reference shows.
    """
    shares = []
    for step, timestep in enumerate(visited(STEPS).tolist()):
        if timestep < SHOWS:
            break
        far, own = [], []
        for start in range(0, len(sampled.rows), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            rows = sampled.rows[part]
            seen = torch.stack([path[step] for path in sampled.paths[part]]), torch.full((len(rows),), timestep)
            with torch.autocast("cpu", torch.bfloat16):
                taught, found, plain = (bench.predicted(which, bench.unseen, rows, *seen, shown).float() for which, shown in
                                        ((bench.teacher, True), (module, True), (module, False)))
            far.append((found - taught).square().flatten(1).mean(1))
            own.append((taught - plain).square().flatten(1).mean(1))
        shares.append(torch.cat(far) / torch.cat(own).mean())
    return torch.stack(shares).mean(0).numpy()


def interval(of_N: np.ndarray) -> str:
    """Mean, and 95% of it with samples resampled."""
    picked = np.random.default_rng(0).integers(0, len(of_N), (_RESAMPLED, len(of_N)))
    low, high = np.quantile(of_N[picked].mean(1), (0.025, 0.975))
    return f"{of_N.mean():.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, told in {"--pictures": "what `training_data` wrote", "--data": "the data set", "--judge": "the judge's file",
                       "--out": "folder; what is there is not made again"}.items():
        parser.add_argument(name, type=Path, required=True, help=told)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--samples", type=int, default=192, help="that are learnt from, of the text and of the teacher")
    parser.add_argument("--judged", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench.load(options.pictures, out, options.updates)
    ways, world = Ways(bench, options.samples, out), load_world()
    data, judge = load(options.data), load_judge(options.judge)
    trials = choose_trials(data, options.judged, 5)
    targets = [trial.target for trial in trials]
    wanted = {label: labels_of(data)[0][label][targets] for label in LABELS}
    emoji = [data.rows[target].emoji for target in targets]
    held_out = bench.samples(bench.unseen, pairs(bench.unseen, COMPARED, 2), True)

    def judged(name: str, module: GatedResampler, strengths: dict[str, float]) -> None:
        if (out / f"{name}.json").exists():
            return
        drawn_by = replace(world, modules={**world.modules, "style": module})
        pictures = Generation(drawn_by, data, Sampling(STEPS, GUIDANCE)).pictures(trials, Line(name, strengths))
        save_sheet(pictures, out / f"{name}.png")
        hits = hits_of(judge, pictures, wanted)
        (out / f"{name}.json").write_text(json.dumps({label: hit.tolist() for label, hit in hits.items()}), encoding="utf-8")
        print(table({name: {label: bootstrapped(hit, emoji) for label, hit in hits.items()}}).splitlines()[-1], flush=True)

    for name, make in ways.of.items():
        file = out / f"{name}.safetensors"
        if not file.exists():
            save_module(make(), file)
        print(name, "distance to the teacher:", interval(distances(bench, load_module(file), held_out)), flush=True)
    for name in ways.of:
        judged(name, load_module(out / f"{name}.safetensors"), {"style": 1.0})
    judged("text only", bench.teacher, {})
    judged("the teacher", bench.teacher, {"style": 1.0})


if __name__ == "__main__":
    main()
