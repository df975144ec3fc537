"""`python -m lab.playground.adding_up --data DIR --judge FILE --out DIR`: where and when modules are added up, and its cost.

The ways of `adding_ways`, on the trials of `evaluate`, by the same judge, with the evaluations of the UNet counted: guidance
alone takes two a step. The UNet runs in bfloat16 in every line. `--split train` has pictures to choose settings on.

Shapes: B pictures, T timesteps, K tokens of width W, latents 4 x h x w.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from emma_core.base.pipeline import Sampling, initial_noise
from emma_core.base.schedule import Ddim
from emma_core.model.addition import BLOCKS, TOKENS, Addition
from emma_core.model.assembly import Assembly, tokens_over_schedule
from emma_core.playground import PLAYGROUND_DIR

from ..emoji.dataset import SPLITS, load
from .adding_ways import (
    BALANCED,
    TEXT,
    Shown,
    Way,
    above,
    alternating,
    at_steps,
    in_predictions,
    keeping_corrections,
    keeping_differences,
    mean_of,
    projected,
    taking_turns,
    together,
)
from .assembling import strongest_balanced
from .evaluate import ALL, SEED, TRIPLES, Generation, Trial, bootstrapped, choose_trials, file_stem, hits_of, table
from .judge import load_judge
from .train_encoder import LABELS, labels_of
from .world import load_world

PICTURES_AT_ONCE = 48


class Sampler:
    """DDIM as `emma_core.base.pipeline` does it, asking a way what the positive predicts.

    Args:
        generation: has the world, the references and the settings.
        told: the prompt names who is shown; else it names the category only.
    """

    def __init__(self, generation: Generation, told: bool):
        self.generation, self._told = generation, told
        self._pipeline, self._sampling = generation.world.pipeline, generation.sampling
        spec = self._pipeline.spec
        self._scheduler = Ddim(spec.alphas_cumprod_T, spec.prediction, self._sampling.steps)
        self.timesteps = self._scheduler.timesteps.tolist()
        self.evaluations = 0  # of the UNet for one picture of the last batch

    @torch.no_grad()
    def latents(self, trials: Sequence[Trial], way: Way) -> torch.Tensor:
        """(B, 4, h, w), of unit deviation."""
        spec, steps_T = self._pipeline.spec, self._scheduler.timesteps
        known = {None: torch.stack([self._tokens("", Assembly())] * len(trials), dim=1)}
        noise_B4hw = torch.cat([initial_noise(trial.seed, self._sampling, spec) for trial in trials])
        latent_B4hw = self._scheduler.begin(noise_B4hw)
        self.evaluations = 0

        def tokens(shown: Shown | tuple[Shown, ...]) -> torch.Tensor:
            if isinstance(shown, tuple):
                return torch.cat([tokens(one) for one in shown], dim=2)
            if shown not in known:
                known[shown] = torch.stack([self.tokens_of(trial, shown) for trial in trials], dim=1)
            return known[shown]

        for step, timestep in enumerate(steps_T):
            def ask(*each: Shown | tuple[Shown, ...], step=step, latent_B4hw=latent_B4hw) -> list[torch.Tensor]:
                self.evaluations += len(each)
                return [self._predict(latent_B4hw, steps_T[step], tokens(one)[step]) for one in each]

            without_B4hw = self._predict(latent_B4hw, timestep, known[None][step])
            with_text_B4hw = way(step, int(timestep), ask)
            guided_B4hw = without_B4hw + self._sampling.guidance * (with_text_B4hw - without_B4hw)
            latent_B4hw = self._scheduler.step(guided_B4hw, int(timestep), latent_B4hw)
        self.evaluations += len(steps_T)
        return latent_B4hw

    def pictures(self, trials: Sequence[Trial], way: Way) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1]."""
        return torch.cat([self._pipeline.decode(latent_14hw) for latent_14hw in self.latents(trials, way).split(1)])

    def tokens_of(self, trial: Trial, shown: Shown) -> torch.Tensor:
        """(T, K, W)."""
        addition = Addition(BLOCKS if shown.way == BALANCED else shown.way)
        assembly = self.generation.assembly(trial, dict(shown.strengths), addition)
        tokens_of = strongest_balanced if shown.way == BALANCED else tokens_over_schedule
        return self._tokens(self.generation.prompt(trial, self._told), assembly, tokens_of)

    def _tokens(self, prompt: str, assembly: Assembly, tokens_of=tokens_over_schedule) -> torch.Tensor:
        text_1ND = self._pipeline.encode_text([prompt])[0]
        return tokens_of(self._pipeline.connector, text_1ND, self._scheduler.timesteps, assembly)[:, 0]

    def _predict(self, latent_B4hw: torch.Tensor, timestep: torch.Tensor, context_BKW: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self._pipeline.predict_noise(latent_B4hw, timestep.expand(len(latent_B4hw)), context_BKW).float()


STYLE_1, STYLE, STYLE_15, STYLE_2 = (Shown((("style", strength),)) for strength in (1.0, 1.25, 1.5, 2.0))
FACE, FACE_125, FACE_2 = (Shown((("face", strength),)) for strength in (1.0, 1.25, 2.0))
OBJECT_1, OBJECT, OBJECT_15 = (Shown((("object", strength),)) for strength in (1.0, 1.25, 1.5))
BOTH, EACH, EACH_AT_1 = STYLE + FACE, (STYLE, FACE), (STYLE_1, FACE)
EARLY_STYLE, LATE_FACE = (STYLE_15, FACE), STYLE_1 + FACE_125
BOTH_TOKENS = replace(BOTH, way=TOKENS)
EACH_OF_THREE = (OBJECT_1, STYLE, FACE)


@dataclass(frozen=True)
class Line:
    """One line: how it begins anew for a batch, and whether the prompt names who is shown or the category only."""

    begin: Callable[[], Way]
    told: bool = True


def _early(limit: int, way: Callable[[], Way], then: Shown = BOTH, told: bool = True) -> Line:
    return Line(lambda: above(limit, way(), together(then)), told)


def _one(shown: Shown | tuple[Shown, ...], told: bool = True) -> Line:
    return Line(lambda: together(shown), told)


# style is at 1.25 and object at 1 where the name does not say otherwise
LINES: dict[str, Line] = {
    "text only": _one(TEXT),
    "style alone": _one(STYLE),
    "style alone, at 1": _one(STYLE_1),
    "face alone": _one(FACE),
    "blocks, style at 1": _one(STYLE_1 + FACE),
    "blocks": _one(BOTH),
    "blocks, style at 1.5": _one(STYLE_15 + FACE),
    "tokens": _one(BOTH_TOKENS),
    "predictions, style at 1": Line(lambda: in_predictions(EACH_AT_1)),
    "predictions": Line(lambda: in_predictions(EACH)),
    **{f"predictions above {limit}": _early(limit, lambda: in_predictions(EACH)) for limit in (950, 900, 850, 800, 700)},
    "predictions above 800, both at 1": _early(800, lambda: in_predictions(EACH_AT_1), STYLE_1 + FACE),
    "predictions above 800, early style, late face": _early(800, lambda: in_predictions(EARLY_STYLE), LATE_FACE),
    "predictions above 800, then tokens": _early(800, lambda: in_predictions(EACH), BOTH_TOKENS),
    "predictions in steps 1, 3, 5": Line(lambda: at_steps({0, 2, 4}, in_predictions(EACH), together(BOTH))),
    "taking turns above 700": _early(700, lambda: taking_turns(EACH)),
    "differences kept until 600": _early(600, lambda: keeping_differences(EACH, {0, 1, 3, 5})),
    "blocks, corrected until 700": _early(700, lambda: keeping_corrections(EACH, {0, 2, 4}, BOTH)),
    "blocks, corrected to the end": Line(lambda: keeping_corrections(EACH, {0, 3}, BOTH)),
    "mean of each at 2 above 800": _early(800, lambda: mean_of((STYLE_2, FACE_2))),
    "one in turn, at 2": Line(lambda: alternating((STYLE_2, FACE_2))),
    "tokens side by side": _one((STYLE, FACE)),
    "face early": _early(700, lambda: together(BOTH), STYLE),
    "balanced strongest gate": _one(replace(STYLE_1 + FACE, way=BALANCED)),
    "style alone above 800, then blocks": _early(800, lambda: together(STYLE), STYLE + FACE_125),
    "predictions above 800, projected": _early(800, lambda: projected(EACH, 1.0)),
    "predictions, projected": Line(lambda: projected(EACH, 1.0)),
    "predictions, shared once": Line(lambda: projected(EACH, 0.5)),
    "person: text only": _one(TEXT, told=False),
    "person: object alone": _one(OBJECT_1, told=False),
    "person: blocks, all at 1": _one(OBJECT_1 + STYLE_1 + FACE, told=False),
    "person: blocks": _one(OBJECT_1 + STYLE + FACE, told=False),
    "person: tokens against the object": _one(replace(OBJECT_1 + BOTH, way=TOKENS), told=False),
    "person: against the text above 850": _early(850, lambda: in_predictions(EACH_OF_THREE), OBJECT_1 + BOTH, told=False),
    "person: against the object, all at 1": Line(lambda: in_predictions(EACH_AT_1, OBJECT_1), told=False),
    "person: against the object": Line(lambda: in_predictions(EACH, OBJECT_1), told=False),
    "person: against the object above 800": _early(800, lambda: in_predictions(EACH, OBJECT_1), OBJECT_1 + BOTH, told=False),
    "person: early style and object, late face": _early(
        800, lambda: in_predictions(EARLY_STYLE, OBJECT_15), OBJECT + LATE_FACE, told=False),
    "person: so, object at 1.25": _early(800, lambda: in_predictions(EACH, OBJECT), OBJECT + BOTH, told=False),
}


class Scoring:
    """Trials, what they are aimed at, and the judge; what is found is kept in a folder."""

    def __init__(self, options: argparse.Namespace):
        self.data, self._judge, self._out = load(options.data), load_judge(options.judge), options.out
        self._numbers, _ = labels_of(self.data)
        self._split, self._seed = options.split, options.seed
        self._trials = choose_trials(self.data, options.pictures, options.seed, options.split)
        self._out.mkdir(parents=True, exist_ok=True)

    def row(self, name: str, begin: Callable[[], Way], sampler: Sampler) -> str:
        """A line of the table, in Markdown; what the folder has already of it is believed."""
        hits, evaluations = {}, 0
        for start in range(0, len(self._trials), PICTURES_AT_ONCE):
            part = self._trials[start:start + PICTURES_AT_ONCE]
            path = self._out / f"{file_stem(name)}-{self._split}-{self._seed}-{start}-{len(part)}.npz"
            if not path.exists():
                wanted = {label: self._numbers[label][[trial.target for trial in part]] for label in LABELS}
                found = hits_of(self._judge, sampler.pictures(part, begin()), wanted)
                np.savez(path, evaluations=sampler.evaluations, **found)
            with np.load(path) as known:
                hits = {label: np.concatenate([hits.get(label, known[label][:0]), known[label]]) for label in (*LABELS, ALL)}
                evaluations = int(known["evaluations"])
        emoji = [self.data.rows[trial.target].emoji for trial in self._trials]
        scores = {label: bootstrapped(hit_B, emoji) for label, hit_B in hits.items()}
        return table({f"{name} ({evaluations})": scores}).splitlines()[-1]


def measure(options: argparse.Namespace) -> None:
    """Prints every line."""
    scoring = Scoring(options)
    generation = Generation(load_world(options.playground), scoring.data, Sampling())
    for name in options.lines or LINES:
        print(scoring.row(name, LINES[name].begin, Sampler(generation, LINES[name].told)), flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `Scoring` reads."""
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.emoji build`")
    parser.add_argument("--judge", type=Path, required=True, help="file of `python -m lab.playground.judge`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the hits; a run that was stopped goes on with it")
    parser.add_argument("--playground", type=Path, default=PLAYGROUND_DIR)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--split", choices=[SPLITS[0], TRIPLES], default=TRIPLES, help="train: to choose settings on")
    parser.add_argument("--seed", type=int, default=SEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--lines", nargs="+", choices=LINES, help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure(options)


if __name__ == "__main__":
    main()
