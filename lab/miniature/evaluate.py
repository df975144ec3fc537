"""`python -m lab.miniature.evaluate --data DIR --files DIR --runs DIR --states DIR --out DIR`: what do the modules do?

On held-out (concept, style, tone) triples or whole (role, style) pairs, and on pictures of the sets that nothing has learnt
from. A judge says style, tone and concept. In the world's own CLIP, CLIP-I is the likeness to the wanted style's pictures above
what it is to all styles' on average, CLIP-T that to the wanted name above what it is to all targets' names. Every line has the
same noise. A run can be stopped and called again.

Shapes: B pictures of H x W pixels, P width of CLIP's projection.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F

from emma_core.base.pipeline import Sampling
from emma_core.model.addition import BLOCKS, PREDICTIONS, WAYS, Addition
from lab.playground.evaluate import ASSEMBLING, Score, Trial, bootstrapped, save_sheet, shuffled_trials, with_gates
from lab.playground.training import to_float

from .captions import category_of, full_caption
from .clip import TinyCLIP, token_ids
from .dataset import UNSEEN_SPLIT, Pictures, load
from .judge import load_judge
from .scores import Scorer, Table
from .train_clip import load_clip
from .trials import SPLITS, TELLS, choose_trials
from .world import World, load_world

CLIP_I, CLIP_T = "clip-i", "clip-t"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CHUNK = 128


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        name: as the table shows it.
        shown: condition -> name of the module that takes its reference, at strength 1 or the one given.
        prompt: "name", "all" (name, tone and style: what words reach through ELLA), or "category".
        unseen: targets and style references are of sets that nothing has learnt from.
        misled: the references are of other targets.
        gates: factor on the global gates A and F.
        assemble: name of a way to assemble inside the blocks, of ASSEMBLING.
        added: where the references are added up, of WAYS.
        toned: targets are people in a tone, not what has none.
        own: on the base's own tokens, not on ELLA's.
        adapter: the style reference is shown to the IP-Adapter itself.
    """

    name: str
    shown: Mapping[str, str | tuple[str, float]]
    prompt: str = "name"
    unseen: bool = False
    misled: bool = False
    gates: float = 1.0
    assemble: str = "sum"
    added: str = BLOCKS
    toned: bool = True
    own: bool = False
    adapter: bool = False

    @property
    def references(self) -> dict[str, tuple[str, float]]:
        """Condition -> name of the module and its strength."""
        return {condition: (given, 1.0) if isinstance(given, str) else given for condition, given in self.shown.items()}


BOTH = {"style": "style", "face": "face"}
OWN_BOTH = {"style": "style-own", "face": "face-own"}
LINES = (
    Line("text only", {}),
    Line("words for all, through ELLA", {}, prompt="all"),
    Line("+ style", {"style": "style"}),
    Line("+ style, shuffled references", {"style": "style"}, misled=True),
    Line("+ style, by the IP-Adapter itself", {}, adapter=True),
    Line("+ style, distilled from the IP-Adapter", {"style": "distilled"}),
    Line("+ face", {"face": "face"}),
    *(Line(f"assembled, {way}", BOTH, assemble=way) for way in ASSEMBLING),
    *(Line(f"assembled, added up in the {way}", BOTH, added=way) for way in WAYS if way != BLOCKS),
    Line("assembled, added up in the predictions, style at 1.25", {**BOTH, "style": ("style", 1.25)}, added=PREDICTIONS),
    Line("assembled, shuffled references", BOTH, misled=True),
    Line("assembled, gates zero", BOTH, gates=0.0),
    Line("category only", {}, prompt="category"),
    Line("category only + object", {"object": "object"}, prompt="category"),
    Line("category only + object + style + face", {**BOTH, "object": "object"}, prompt="category"),
    Line("own tokens: text only", {}, own=True),
    Line("own tokens: words for all", {}, prompt="all", own=True),
    Line("own tokens: + style", {"style": "style-own"}, own=True),
    Line("own tokens: + face", {"face": "face-own"}, own=True),
    *(Line(f"own tokens: assembled, added up in the {way}", OWN_BOTH, added=way, own=True) for way in WAYS),
    Line("own tokens: assembled, shuffled references", OWN_BOTH, misled=True, own=True),
    Line("unseen style: text only", {}, unseen=True),
    Line("unseen style: + style", {"style": "style"}, unseen=True),
    Line("unseen style: + style, shuffled references", {"style": "style"}, unseen=True, misled=True),
    Line("unseen style: + style, distilled", {"style": "distilled"}, unseen=True),
    Line("two unseen styles, no tone: text only", {}, unseen=True, toned=False),
    Line("two unseen styles, no tone: + style", {"style": "style"}, unseen=True, toned=False),
    Line("two unseen styles, no tone: + style, shuffled", {"style": "style"}, unseen=True, misled=True, toned=False),
    Line("two unseen styles, no tone: + style, distilled", {"style": "distilled"}, unseen=True, toned=False),
)
PROMPTS = {"name": lambda row: row.names[0], "all": full_caption, "category": category_of}


class Likeness:
    """CLIP-I of pictures to the set of a style, CLIP-T to words."""

    def __init__(self, clip: TinyCLIP, tokenizer, data: Pictures, device: str):
        self._clip, self._tokenizer, self._device = clip, tokenizer, device
        self._styles = sorted({row.style for row in data.rows})
        means = []
        for style in self._styles:
            positions = [position for position, row in enumerate(data.rows) if row.style == style][::4]
            means.append(F.normalize(self._features(to_float(data.images_NHWC[positions])).mean(0), dim=0))
        self._mean_KP = torch.stack(means)

    @torch.no_grad()
    def of(self, image_B3SS: torch.Tensor, styles: Sequence[str], words: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) and (B,): to each picture's wanted style above the mean of all styles, to its words above that of all words."""
        image_BP = self._features(image_B3SS)
        wanted_B = torch.tensor([self._styles.index(style) for style in styles], device=self._device)
        known = sorted(set(words))
        text_KP = torch.cat([self._clip.text_features(chunk) for chunk in self._ids(known).split(_CHUNK)])
        said_B = torch.tensor([known.index(text) for text in words], device=self._device)
        return _above_mean(image_BP @ self._mean_KP.T, wanted_B), _above_mean(image_BP @ text_KP.T, said_B)

    def _ids(self, texts: Sequence[str]) -> torch.Tensor:
        return token_ids(self._tokenizer, texts).to(self._device)

    @torch.no_grad()
    def _features(self, image_B3SS: torch.Tensor) -> torch.Tensor:
        small = (F.avg_pool2d(part.to(self._device), 2) for part in image_B3SS.split(_CHUNK))
        return torch.cat([self._clip.image_features(part) for part in small])


def _above_mean(likeness_BK: torch.Tensor, wanted_B: torch.Tensor) -> torch.Tensor:
    """(B,) of the wanted column."""
    return (likeness_BK.gather(1, wanted_B[:, None])[:, 0] - likeness_BK.mean(1)).cpu()


class Evaluation:
    """Draws and scores lines.

    Args:
        learnt: trials whose style references are of sets that are learnt from; they mislead those of an unseen style.
    """

    def __init__(
        self, world: World, scorer: Scorer, likeness: Likeness, sampling: Sampling, learnt: Sequence[Trial]
    ):
        self.world, self.scorer, self.likeness, self.sampling, self.learnt = world, scorer, likeness, sampling, learnt

    def pictures(self, line: Line, trials: Sequence[Trial]) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1]."""
        rows, shown = self.world.data.rows, {}
        for condition, (name, strength) in line.references.items():
            module = self.world.modules[name]
            shown[condition] = (module if line.gates == 1.0 else with_gates(module, line.gates), strength)
        references = self._misled(line, trials) if line.misled else trials
        prompts = [PROMPTS[line.prompt](rows[trial.target]) for trial in trials]
        if line.adapter:
            return self.world.draw_by_adapter(prompts, references, self.sampling)
        pipeline = self.world.own if line.own else replace(self.world.pipeline, assemble=ASSEMBLING[line.assemble])
        return self.world.draw(prompts, references, shown, pipeline, Addition(line.added), self.sampling)

    def _misled(self, line: Line, trials: Sequence[Trial]) -> list[Trial]:
        """With other targets' references. People in tones of unseen styles are all of one set: these get the learnt ones'."""
        if line.unseen:
            return [replace(trial, style=other.style) for trial, other in zip(trials, cycle(self.learnt), strict=False)]
        return shuffled_trials(trials, self.world.data.rows, seed=1, tells=TELLS)

    def score(self, image_B3SS: torch.Tensor, trials: Sequence[Trial]) -> dict[str, Score]:
        """The judge's verdicts, CLIP-I and CLIP-T."""
        targets = [trial.target for trial in trials]
        rows = [self.world.data.rows[target] for target in targets]
        likeness = self.likeness.of(image_B3SS, [row.style for row in rows], [row.names[0] for row in rows])
        concepts = [row.concept for row in rows]
        return {**self.scorer.score(image_B3SS, targets),
                **{name: bootstrapped(one_B.numpy(), concepts) for name, one_B in zip((CLIP_I, CLIP_T), likeness, strict=True)}}


def wanted_lines(modules: Sequence[str], adapter: bool) -> list[Line]:
    """The lines whose modules are there, and those of the IP-Adapter if it is."""
    return [line for line in LINES if all(name in modules for name, _ in line.references.values())
            and (adapter or not line.adapter)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--files", type=Path, required=True, help="folder of `python -m lab.miniature.export`")
    parser.add_argument("--runs", type=Path, required=True, help="folder with ella/ and emma-<name>/, runs of the trainer")
    parser.add_argument("--states", type=Path, required=True, help="folder with clip.pt and judge.pt")
    parser.add_argument("--out", type=Path, required=True, help="folder for the scores and sheets")
    parser.add_argument("--modules", nargs="*", default=["style", "face", "object", "distilled", "style-own", "face-own"])
    parser.add_argument("--lines", default="", help="only those whose names have this regular expression")
    parser.add_argument("--split", choices=SPLITS, default=SPLITS[0])
    parser.add_argument("--pictures", type=int, default=96, help="of each line, or all there are if these are fewer")
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of the UNet")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, sampling = load(options.data), Sampling(guidance=options.guidance)
    world = load_world(options.files, options.runs, options.modules, data, options.device, PRECISIONS[options.precision])
    clip, tokenizer = load_clip(options.states / "clip.pt", options.device)
    aims = {"": (options.split, True), " of unseen styles": (UNSEEN_SPLIT, True),
            " of unseen styles, no tone": (UNSEEN_SPLIT, False)}
    trials = {aim: choose_trials(data, options.pictures, options.seed, *aim) for aim in aims.values()}
    settings = {"split": options.split, **{f"pictures{of}": len(trials[aim]) for of, aim in aims.items()},
                "guidance": sampling.guidance, "steps": sampling.steps, "seed": options.seed, "precision": options.precision}
    table = Table(options.out / f"scores-{options.split}.json", settings, extra=(CLIP_I, CLIP_T))
    evaluation = Evaluation(world, Scorer(load_judge(options.states / "judge.pt", data, options.device), data),
                            Likeness(clip, tokenizer, data, options.device), sampling, trials[options.split, True])
    for of, aim in aims.items():
        if trials[aim]:
            targets = [trial.target for trial in trials[aim]]
            table.add(f"real pictures{of}", evaluation.score(to_float(data.images_NHWC[targets]), trials[aim]))
    for line in wanted_lines(options.modules, world.adapter is not None):
        aimed = trials[UNSEEN_SPLIT if line.unseen else options.split, line.toned]
        if aimed and line.name not in table and re.search(options.lines, line.name):
            pictures = evaluation.pictures(line, aimed)
            save_sheet(pictures, options.out / f"{re.sub('[^a-z0-9.+]+', '-', line.name.lower())}.png")
            table.add(line.name, evaluation.score(pictures, aimed))
    print(table.markdown())


if __name__ == "__main__":
    main()
