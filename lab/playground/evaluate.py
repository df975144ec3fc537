"""`python -m lab.playground.evaluate --data DIR --judge FILE --out DIR`: do the modules do what they claim?

On held-out (role, vendor, tone) triples, or (role, vendor) pairs: the prompt names the role, the style reference is another
emoji of the wanted vendor, the face reference another person of the wanted tone by another vendor. Where the prompt names the
category only, the object reference is the same emoji by another vendor. A judge says which vendor, tone and caption the picture
has; real pictures and autoencoder reconstructions are the ceilings. Data built with --unseen, and a judge of these, add lines
with references of a style that nothing has learnt from. A run can be stopped and called again.

Shapes: B pictures of H x W pixels.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from emma_core.base.pipeline import Request, Sampling, generate
from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.files.connector_file import load_connector
from emma_core.files.module_file import load_module
from emma_core.model.addition import Addition, TokenTerms
from emma_core.model.assembly import Assembly, Reference, terms_over_schedule
from emma_core.model.gated_resampler import GatedResampler
from emma_core.playground import PLAYGROUND_DIR, load_autoencoder
from emma_core.playground.autoencoder import Autoencoder

from ..emoji.dataset import UNSEEN_SPLIT, EmojiPeople, load
from .assembling import averaged, sequential, strongest, strongest_balanced
from .judge import Judge, load_judge, verdicts
from .pairs import GROUPS, ReferencePicker
from .text import CATEGORY
from .train_encoder import LABELS, labels_of
from .training import to_float
from .world import World, load_world

ALL = "all three"
RESAMPLES, CONFIDENCE = 2000, 0.95
STRENGTHS = (0.5, 1.0, 1.25, 1.5, 2.0)
SEED = 5
REPORT, TRIPLES = "scores.json", "heldout-triple"
ASSEMBLING = {"sum": terms_over_schedule, **{
    name: lambda *arguments, tokens_of=tokens_of: [TokenTerms(tokens_BKW) for tokens_BKW in tokens_of(*arguments)]
    for name, tokens_of in {"average": averaged, "one after the other": sequential, "strongest gate": strongest,
                            "strongest gate, balanced": strongest_balanced}.items()}}
SUM = Addition()
SHEET_COLUMNS, SHEET_PICTURES = 16, 32


@dataclass(frozen=True)
class Trial:
    """One held-out picture to aim at, by position in the data, a reference for each condition, and the seed of its noise."""

    target: int
    style: int
    face: int
    object: int
    seed: int


def choose_trials(data: EmojiPeople, count: int, seed: int, split: str = TRIPLES) -> list[Trial]:
    """Pictures of a split, vendors in turn, again and again with other references; references come from the train split.

    Of the vendor that nothing has learnt from (UNSEEN_SPLIT), the style references are its own.
    """
    chance = random.Random(seed)
    picker = ReferencePicker(data.rows, data.positions("train"))
    targets = data.positions(split)
    styles = ReferencePicker(data.rows, targets) if split == UNSEEN_SPLIT else picker
    trials: list[Trial] = []
    while len(trials) < count:
        chance.shuffle(targets)
        queues = [[position for position in targets if data.rows[position].vendor == vendor] for vendor in styles.vendors]
        most = max(map(len, queues))
        for target in [queue[turn] for turn in range(most) for queue in queues if turn < len(queue)]:
            row = data.rows[target]
            trials.append(Trial(target, styles.style(row, chance), picker.face(row, chance, True), picker.object(row, chance),
                                len(trials)))
    return trials[:count]


def shuffled_trials(trials: Sequence[Trial], rows: Sequence[Any], seed: int, tells: Mapping[str, str] = GROUPS) -> list[Trial]:
    """Trials whose references were given to other targets: each at random to one of which another thing is wanted.

    Args:
        rows: what is known of each picture.
        tells: condition -> the attribute of a row that its reference tells.
    """
    chance = random.Random(seed)
    shuffled = []
    for trial in trials:
        others = {}
        for condition, label in tells.items():
            wrong = [getattr(other, condition) for other in trials
                     if getattr(rows[getattr(other, condition)], label) != getattr(rows[trial.target], label)]
            others[condition] = chance.choice(wrong)
        shuffled.append(replace(trial, **others))
    return shuffled


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        name: as the table shows it.
        strengths: of each condition; one left out has no reference.
        told: the prompt names who is shown; else it names the category only.
        shuffled: the references are of other targets.
        gates: factor on all global gates A and F.
        assemble: name of a way to assemble, of ASSEMBLING.
        addition: where the modules are added up.
        folder: modules, and an ELLA if there is one, that take the place of the playground's.
        unseen: targets and style references are of the vendor that nothing has learnt from.
    """

    name: str
    strengths: Mapping[str, float]
    told: bool = True
    shuffled: bool = False
    gates: float = 1.0
    assemble: str = "sum"
    addition: Addition = SUM
    folder: Path | None = None
    unseen: bool = False


BOTH = {"style": 1.0, "face": 1.0}
CONTROLS = (
    Line("assembled, shuffled references", BOTH, shuffled=True),
    Line("assembled, gates zero", BOTH, gates=0.0),
)
WAYS = tuple(Line(f"assembled, {way}", BOTH, assemble=way) for way in ASSEMBLING if way != "sum")
OBJECT = (
    Line("category only", {}, told=False),
    Line("category only + object", {"object": 1.0}, told=False),
    Line("category only + object, shuffled references", {"object": 1.0}, told=False, shuffled=True),
    Line("category only + object + style + face", {**BOTH, "object": 1.0}, told=False),
)
UNSEEN_STYLE = (
    Line("text only, targets of an unseen style", {}, unseen=True),
    Line("+ style, unseen", {"style": 1.0}, unseen=True),
    Line("assembled, unseen style", BOTH, unseen=True),
)


def lines_to_generate(strengths: Sequence[float], variants: Mapping[str, Path], unseen: bool = False) -> list[Line]:
    """Each condition alone and together, then controls, other ways of assembling, the object module, and the variants."""
    alone = [Line("text only", {}), Line("+ style", {"style": 1.0}), Line("+ face", {"face": 1.0})]
    swept = [Line(f"assembled, strength {strength:g}", {"style": strength, "face": strength}) for strength in strengths]
    others = []
    for name, folder in variants.items():
        has = [condition for condition in BOTH if (folder / f"emma-{condition}.safetensors").is_file()]
        others += [Line(f"{name}: + {condition}", {condition: 1.0}, folder=folder) for condition in has]
        others += [Line(f"{name}: assembled", BOTH, folder=folder)] if len(has) == 2 else []
    return [*alone, *swept, *CONTROLS, *WAYS, *OBJECT, *(UNSEEN_STYLE if unseen else ()), *others]


class Generation:
    """Pictures of trials, a line of the table at a time; the noise of a trial is the same in every line."""

    def __init__(self, world: World, data: EmojiPeople, sampling: Sampling):
        self.world, self.data, self.sampling = world, data, sampling
        self._known: dict[tuple[GatedResampler, int], Reference] = {}

    def pictures(self, trials: Sequence[Trial], line: Line) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1]."""
        world = replaced(self.world, line)
        requests = [Request(self.prompt(trial, line.told), self.assembly(trial, line.strengths, line.addition, world),
                            seed=trial.seed) for trial in trials]
        return rearrange(generate(world.pipeline, requests, self.sampling), "b h w c -> b c h w") * 2 - 1

    def prompt(self, trial: Trial, told: bool) -> str:
        """Who is shown, or the category only."""
        return self.data.rows[trial.target].caption if told else CATEGORY

    def assembly(
        self, trial: Trial, strengths: Mapping[str, float], addition: Addition = SUM, world: World | None = None
    ) -> Assembly:
        """A trial's references of some conditions; for the modules of another world, if one is given."""
        references = [replace(self._reference(world or self.world, condition, getattr(trial, condition)), strength=strength)
                      for condition, strength in strengths.items()]
        return Assembly(references, addition)

    def _reference(self, world: World, condition: str, position: int) -> Reference:
        key = (world.modules[condition], position)
        if key not in self._known:
            image_1HW3 = torch.from_numpy(self.data.images_NHWC[position].copy())[None].float() / 255
            self._known[key] = world.encode_reference(condition, image_1HW3)
        return self._known[key]


def replaced(world: World, line: Line) -> World:
    """The world with what a line exchanges in it."""
    modules, connector = dict(world.modules), world.pipeline.connector
    if line.folder is not None:
        modules = {condition: load_module(path) for condition in modules
                   if (path := line.folder / f"emma-{condition}.safetensors").is_file()}
        if (line.folder / "ella.safetensors").is_file():
            connector = load_connector(line.folder / "ella.safetensors")
    if line.gates != 1.0:
        modules = {condition: with_gates(module, line.gates) for condition, module in modules.items()}
    pipeline = replace(world.pipeline, connector=connector, assemble=ASSEMBLING[line.assemble])
    return replace(world, pipeline=pipeline, modules=modules)


@torch.no_grad()
def with_gates(module: GatedResampler, factor: float) -> GatedResampler:
    """A copy whose global gates A and F are multiplied."""
    module = copy.deepcopy(module)
    for block in module.blocks:
        block.attn_gate *= factor
        block.ffn_gate *= factor
    return module


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


def table(scores: dict[str, dict[str, Score]]) -> str:
    """Markdown."""
    columns = [*LABELS, ALL]
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for row, score in scores.items():
        cells = [f"{score[name].mean:.2f} ({score[name].low:.2f} to {score[name].high:.2f})" for name in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def file_stem(line: str) -> str:
    """A line's name, for its files."""
    return re.sub("[^a-z0-9.+]+", "-", line.lower())


def save_sheet(image_B3HW: torch.Tensor, path: Path) -> None:
    """The first pictures of a row, side by side."""
    shown = ((image_B3HW[:SHEET_PICTURES] + 1) * 127.5).clamp(0, 255).round().byte()
    empty = shown.new_full((-len(shown) % SHEET_COLUMNS, *shown.shape[1:]), 255)
    lines = [torch.cat(list(line), dim=2) for line in torch.cat([shown, empty]).split(SHEET_COLUMNS)]
    Image.fromarray(rearrange(torch.cat(lines, dim=1), "c h w -> h w c").numpy()).save(path)


@dataclass(frozen=True)
class TableLine:
    """One line of the table: what its pictures are aimed at, and how they are made."""

    trials: Sequence[Trial]
    make: Callable[[], torch.Tensor]


def lines_of(
    data: EmojiPeople, generation: Generation, autoencoder: Autoencoder, options: argparse.Namespace
) -> dict[str, TableLine]:
    """Every line by its name, the ceilings first."""
    trials = choose_trials(data, options.pictures, options.seed, options.split)
    misled = shuffled_trials(trials, data.rows, options.seed)
    has_unseen = bool(data.positions(UNSEEN_SPLIT))
    strange = choose_trials(data, options.pictures, options.seed, UNSEEN_SPLIT) if has_unseen else []

    def real(aimed: Sequence[Trial]) -> torch.Tensor:
        return to_float(data.images_NHWC[[trial.target for trial in aimed]])

    lines = {"real pictures": TableLine(trials, lambda: real(trials)),
             "autoencoder": TableLine(trials, lambda: _through(autoencoder, real(trials)))}
    if has_unseen:
        lines["real pictures of an unseen style"] = TableLine(strange, lambda: real(strange))
    for line in lines_to_generate(options.strengths, dict(options.variant), has_unseen):
        aimed = strange if line.unseen else trials
        shown = misled if line.shuffled else aimed
        lines[line.name] = TableLine(aimed, lambda line=line, shown=shown: generation.pictures(shown, line))
    return lines


@torch.no_grad()
def evaluate(options: argparse.Namespace) -> dict[str, dict[str, Score]]:
    """Scores by line; lines that `scores.json` in the folder has already are kept, if they are of the same trials."""
    data, judge = load(options.data), load_judge(options.judge)
    numbers, classes = labels_of(data)
    generation = Generation(load_world(options.playground), data, Sampling(steps=options.steps, guidance=options.guidance))
    autoencoder = load_autoencoder(PLAYGROUND_SPEC.latent_scale, options.playground / "autoencoder.safetensors")
    lines = lines_of(data, generation, autoencoder, options)
    report = {"pictures": options.pictures, "guidance": options.guidance, "steps": options.steps, "seed": options.seed,
              "split": options.split,
              "chance": {label: 1 / count for label, count in classes.items()}}
    options.out.mkdir(parents=True, exist_ok=True)
    scores = scores_so_far(options.out / REPORT, report)
    for name, line in lines.items():
        if name in scores or (options.rows and name not in options.rows):
            continue
        image_B3HW = line.make()
        targets = [trial.target for trial in line.trials]
        hits = hits_of(judge, image_B3HW, {label: numbers[label][targets] for label in LABELS})
        emoji = [data.rows[target].emoji for target in targets]
        scores[name] = {label: bootstrapped(hit_B, emoji) for label, hit_B in hits.items()}
        save_sheet(image_B3HW, options.out / f"{file_stem(name)}.png")
        print(table({name: scores[name]}).splitlines()[-1], flush=True)
        values = {row: {label: vars(one) for label, one in score.items()} for row, score in scores.items()}
        (options.out / REPORT).write_text(json.dumps({**report, "scores": values}, indent=1) + "\n", encoding="utf-8")
    return {name: scores[name] for name in lines if name in scores}


def _through(autoencoder: Autoencoder, image_B3HW: torch.Tensor) -> torch.Tensor:
    return torch.cat([autoencoder.decode(autoencoder.encode(part)) for part in image_B3HW.split(64)])


def scores_so_far(path: Path, report: dict) -> dict[str, dict[str, Score]]:
    """What an earlier run with the same settings found."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if {key: found.get(key) for key in report} != report:
        return {}
    return {row: {label: Score(**one) for label, one in score.items()} for row, score in found["scores"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.emoji build`")
    parser.add_argument("--judge", type=Path, required=True, help="file of `python -m lab.playground.judge`")
    parser.add_argument("--out", type=Path, required=True, help="folder for scores.json and the sheets")
    parser.add_argument("--playground", type=Path, default=PLAYGROUND_DIR)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--split", choices=[TRIPLES, "heldout-pair"], default=TRIPLES,
                        help="targets whose vendor, tone and caption no training saw together, or whose vendor and caption")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--rows", nargs="+", help="only these lines of the table, by name")
    parser.add_argument("--variant", nargs=2, action="append", default=[], metavar=("NAME", "FOLDER"),
                        type=str, help="further lines with the modules, and the ELLA, of this folder; may be given again")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    options.variant = [(name, Path(folder)) for name, folder in options.variant]
    torch.set_num_threads(1)
    print(table(evaluate(options)))


if __name__ == "__main__":
    main()
