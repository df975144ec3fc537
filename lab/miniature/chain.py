"""`python -m lab.miniature.chain --packages NODE_MODULES --out DIR`: the whole second world, from drawings to scores.

Every stage is a command of its own and goes on from its state, so the chain can be stopped and called again. On a GPU, with
`--device cuda --jobs 5`, stages that do not wait for each other run at the same time, and the trainings that are timed take
`--minutes`; one at a time they take a third more. ELLA and the modules are trained by the pack's own trainer, for their steps.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lab.playground.train_base import CONNECTOR

from .pack import split
from .timed import save_slim

RECIPES = Path(__file__).parent / "recipes"
_KEPT = ("files/**/*", "runs/*/*.safetensors", "scores/*", "logs/*", "states/*.json*", "data/card.json")
MODULES, OWN_MODULES = ("style", "face", "object"), ("style", "face")
BATCHES_ON_GPU = {"text": 256, "clip": 512, "autoencoder": 64, "t5": 512, "judge": 256, "base": 512, "ip": 256}
SHARES = {"text": 0.2, "clip": 0.2, "autoencoder": 0.2, "t5": 0.1, "judge": 0.2, "base": 0.6, "ip": 0.2}  # of the minutes


@dataclass(frozen=True)
class Stage:
    """A command, and the file that says it is done, where the command itself does not know."""

    name: str
    arguments: tuple[str, ...]
    done: Path | None = None


class Chain:
    """Commands of the stages with their files, in waves."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, options.out
        self.data, self.states, self.lists, self.files = (options.out / name for name in ("data", "states", "lists", "files"))

    def waves(self) -> list[list[Stage]]:
        """Stages of one wave do not wait for each other."""
        latents, clip = self.states / "latents.safetensors", self.states / "clip.pt"
        noise = ("--latents", latents, "--clip", clip)
        base = self._timed("base", "train_base", *noise, *self._base_size())
        adapter = self._timed("ip", "train_ip_adapter", *noise, "--base", self.states / "base.pt",
                              "--out", self.files / "ip-adapter.safetensors")
        return [
            [self._lab("dataset", "--packages", self.options.packages, "--out", self.data, "--jobs", self.options.jobs * 4,
                       done=self.data / "card.json")],
            [self._timed("text", "train_clip", "--convolutions"), self._timed("autoencoder", "train_autoencoder"),
             self._timed("t5", "train_t5"), self._timed("judge", "judge"),
             self._lab("lists", "--data", self.data, "--out", self.lists, done=self.lists / "portrait-heldout.jsonl")],
            [self._timed("clip", "train_clip", "--text", self.states / "text.pt"),
             self._lab("latents", "--data", self.data, "--autoencoder", self.states / "autoencoder.pt", "--out", latents,
                       "--device", self.options.device, done=latents)],
            [base],
            [self._lab("export", "--states", self.states, "--out", self.files)],
            [adapter, self._ella(), *(self._own_module(name) for name in OWN_MODULES), self._words()],
            [*(self._module(name) for name in MODULES), self._distilled()],
            [self._lab("evaluate", "--data", self.data, "--files", self.files, "--runs", self.out / "runs", "--states",
                       self.states, "--out", self.out / "scores", "--device", self.options.device,
                       "--pictures", self.options.pictures)],
        ]

    def _base_size(self) -> tuple:
        start = ("--start", self.options.start) if self.options.start else ()
        return ("--widths", *self.options.widths, *start)

    def _lab(self, name: str, *arguments, done: Path | None = None) -> Stage:
        return Stage(name, ("-m", f"lab.miniature.{name}", *map(str, arguments)), done)

    def _timed(self, name: str, module: str, *arguments) -> Stage:
        minutes = self.options.minutes * SHARES[name]
        batch = ("--batch", BATCHES_ON_GPU[name]) if self.options.device == "cuda" else ()
        state = self.states / f"{name}.pt"
        return Stage(name, self._lab(module, "--data", self.data, "--state", state, "--minutes", f"{minutes:.2f}",
                                     "--device", self.options.device, *batch, *arguments).arguments)

    def _trained(self, name: str, words: Sequence[str], data: str, *arguments) -> Stage:
        """A run of the pack's own trainer, on the exported files."""
        folder = self.out / "runs" / name
        device = ("--device", "cpu") if self.options.device == "cpu" else ()
        steps = ("--train.steps", str(self.options.steps)) if self.options.steps else ()
        return Stage(name, ("-m", "emma_core", "train", *words, "--data.jsonl", str(self.lists / data), "--base.checkpoint",
                            str(self.files), "--output.folder", str(folder), "--data.cache", str(self.out / "cache"),
                            *device, *steps, *map(str, arguments)))

    def _ella(self) -> Stage:
        return self._trained("ella", ("ella", str(RECIPES / "ella.toml")), "ella.jsonl", *self._reading(
            self.files / "ella-start.safetensors"))

    def _reading(self, ella: Path) -> tuple:
        return "--ella.file", ella, "--ella.text_encoder", self.files / "t5.safetensors"

    def _on_ella(self) -> tuple:
        return (*self._reading(self.out / "runs" / "ella" / "ella.safetensors"), *self._seen())

    def _seen(self) -> tuple:
        return "--encoder.file", self.files / "clip_vision.safetensors"

    def _module(self, name: str) -> Stage:
        return self._trained(f"emma-{name}", (str(RECIPES / f"{name}.toml"),), f"{name}.jsonl", *self._on_ella())

    def _own_module(self, name: str) -> Stage:
        """The same recipe and size on the base's own tokens, without an ELLA."""
        size = "--module.inner", CONNECTOR.width, "--module.layers", CONNECTOR.layers
        return self._trained(f"emma-{name}-own", (str(RECIPES / f"{name}.toml"),), f"{name}.jsonl", *self._seen(), *size,
                             "--output.name", f"emma-{name}-own")

    def _distilled(self) -> Stage:
        return self._trained(
            "emma-distilled", (str(RECIPES / "distil-style.toml"),), "style.jsonl", *self._on_ella(),
            "--teacher.ip_adapter", self.files / "ip-adapter.safetensors",
            "--teacher.ip_image_encoder", self.files / "clip_vision.safetensors",
            "--teacher.prompts", self.lists / "prompts.txt")

    def _words(self) -> Stage:
        states = [part for name in ("clip", "base", "judge")
                  for part in (f"--{'unet' if name == 'base' else name}", self.states / f"{name}.pt")]
        return self._lab("words", "--data", self.data, *states, "--autoencoder", self.states / "autoencoder.pt",
                         "--out", self.out / "scores", "--device", self.options.device, "--pictures", self.options.pictures)


def collect(out: Path, parts: Path) -> None:
    """What is worth keeping, in parts that travel: files, modules, scores, logs, and the judge and CLIP to score with."""
    results = out / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir()
    for pattern in _KEPT:
        for path in filter(Path.is_file, out.glob(pattern)):
            kept = results / path.relative_to(out)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept)
    for name in ("clip", "judge"):
        if (out / "states" / f"{name}.pt").exists():
            (results / "states").mkdir(exist_ok=True)
            save_slim(out / "states" / f"{name}.pt", results / "states" / f"{name}.pt")
    shutil.rmtree(parts, ignore_errors=True)
    split(results, parts)


def run(stage: Stage, logs: Path) -> None:
    """The stage's command; its output goes to a log. A stage that fails ends the chain."""
    if stage.done is not None and stage.done.exists():
        return
    started = time.monotonic()
    with open(logs / f"{stage.name}.log", "a", encoding="utf-8") as log:
        code = subprocess.run([sys.executable, *stage.arguments], stdout=log, stderr=subprocess.STDOUT).returncode
    print(f"{stage.name}: {time.monotonic() - started:.0f} s{'' if code == 0 else f', failed ({code})'}", flush=True)
    if code:
        raise SystemExit(f"{stage.name} failed, see {logs / stage.name}.log")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="node_modules with the icon sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for data, states, files, runs and scores")
    parser.add_argument("--minutes", type=float, default=360)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="stages at the same time")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 192], help="of the levels of the base's UNet")
    parser.add_argument("--start", type=Path, help="UNet that the base begins with; default: from scratch")
    parser.add_argument("--pictures", type=int, default=96, help="of each line of scores")
    parser.add_argument("--steps", type=int, help="updates of ELLA and of each module; default: the recipes'")
    parser.add_argument("--parts", type=Path, help="folder for the results in parts of at most 15 MiB")
    parser.add_argument("--until", default="", help="the last stage to run")
    options = parser.parse_args()
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    for wave in Chain(options).waves():
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda stage: run(stage, options.out / "logs"), wave))
        if options.parts:
            collect(options.out, options.parts)  # after each wave: a lent machine may be gone before the last
        if options.until in {stage.name for stage in wave}:
            return


if __name__ == "__main__":
    main()
