"""What makes modules learn fast: one setting changed at a time, every run as many updates of as many rows, on the playground.

Each run begins anew on the frozen playground, with the trainer. Then, on held-out pictures: how much of the error with the
text alone the reference takes away, by timestep, on the same noise in every run; and how often a judge finds the reference's
vendor (style) or tone (face) in generated pictures.

    python -m lab.emoji build --out emoji
    python -m lab.playground.training_data --data emoji --out pictures
    python -m lab.playground.judge --data emoji --out judge.safetensors
    python benchmarks/module_learning.py --data emoji --pictures pictures --judge judge.safetensors --out learning
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402

from emma_core.base.parts import Parts  # noqa: E402
from emma_core.base.pipeline import Sampling  # noqa: E402
from emma_core.model.gated_resampler import GatedResampler  # noqa: E402
from emma_core.training.config import TrainConfig, resolve  # noqa: E402
from emma_core.training.draws import Draws  # noqa: E402
from emma_core.training.examples import read_examples  # noqa: E402
from emma_core.training.losses import TimestepBuckets  # noqa: E402
from emma_core.training.parts import encoders_of, load_parts, options_of  # noqa: E402
from emma_core.training.prepare import prepare  # noqa: E402
from emma_core.training.prepared import Prepared  # noqa: E402
from emma_core.training.runs import begin_run  # noqa: E402
from emma_core.training.student import Student  # noqa: E402
from emma_core.training.trainer import gates_of  # noqa: E402
from lab.emoji.dataset import load  # noqa: E402
from lab.playground.evaluate import Generation, Line, choose_trials, hits_of  # noqa: E402
from lab.playground.judge import load_judge  # noqa: E402
from lab.playground.train_encoder import LABELS, labels_of  # noqa: E402
from lab.playground.world import load_world  # noqa: E402

LABEL_OF = {"style": "vendor", "face": "tone"}
CENTRE = {
    "data.resolution_px": 128, "data.reference_crops": 0, "data.reference_flip": False, "train.accumulate": 1,
    "train.gradient_checkpointing": False, "train.warmup": 20, "train.rate": 2e-3, "train.gate_rate": 5.0,
    "objective.timestep_power": 0.4, "objective.inverse_snr": 60.0, "report.save_every": 1_000_000,
}
VARIANTS: dict[str, dict] = {
    "centre": {},
    "blocks at random": {"module.blocks": "random"},
    "rate 2e-4": {"train.rate": 2e-4},
    "rate 5e-4": {"train.rate": 5e-4},
    "rate 5e-3": {"train.rate": 5e-3},
    "gates' rate x1": {"train.gate_rate": 1.0},
    "gates' rate x20": {"train.gate_rate": 20.0},
    "gate bias 0": {"module.gate_bias": 0.0},
    "gate bias 2": {"module.gate_bias": 2.0},
    "no separable gates": {"module.separable_gates": False},
    "lambda 2": {"module.gate_scale": 2.0},
    "lambda 4": {"module.gate_scale": 4.0},
    "timesteps uniform, no weights": {"objective.timestep_power": 1.0, "objective.inverse_snr": 0.0},
    "timesteps uniform, 1/SNR": {"objective.timestep_power": 1.0},
    "timesteps 999 u^0.4, no weights": {"objective.inverse_snr": 0.0},
    "timesteps uniform, min-SNR 5": {"objective.timestep_power": 1.0, "objective.inverse_snr": 0.0, "objective.min_snr": 5.0},
    "weights by place": {"objective.place_weight": True},
    "the paper's recipe": {"objective.timestep_power": 1.0, "objective.inverse_snr": 0.0, "train.rate": 1e-4,
                           "train.gate_rate": 1.0, "train.schedule": "constant"},
}


class Learning:
    """Everything that the runs of a condition share."""

    def __init__(self, condition: str, options: argparse.Namespace):
        self.condition, self.options = condition, options
        self.accelerator = Accelerator(cpu=True, mixed_precision="no" if options.precision == "fp32" else options.precision)
        self.emoji, self.judge, self.world = load(options.data), load_judge(options.judge), load_world()
        self.trials = choose_trials(self.emoji, options.judged, 5)
        self.cache = options.out / "cache"
        self.train, self.heldout = (self._prepared(name) for name in (condition, f"{condition}-heldout"))

    def config(self, changes: dict, **more) -> TrainConfig:
        usual = {**CENTRE, "module.condition": self.condition, "train.steps": self.options.steps,
                 "train.batch": self.options.batch, "train.precision": self.options.precision, **more}
        return resolve({}, "small-card", {"train.held_out": 0.0, **usual, **changes})

    def parts(self, config: TrainConfig) -> Parts:
        return load_parts(config, torch.float32, torch.device("cpu"))

    def _prepared(self, name: str) -> Prepared:
        config = self.config({"data.jsonl": str(self.options.pictures / f"{name}.jsonl")})
        examples, _ = read_examples(config.data)
        encoders = encoders_of(self.parts(config), config)
        return prepare(examples, config.data, config.encoder, encoders, options_of(config), self.cache)

    def measure(self, name: str) -> dict:
        """Train one variant, then error and judge on held-out pictures."""
        config = self.config(VARIANTS[name])
        parts = self.parts(config)
        folder = self.options.out / self.condition / name.replace("/", " ")
        trainer = begin_run(config, parts, self.train, self.accelerator, folder)
        started, losses = (time.monotonic(), time.process_time()), TimestepBuckets()
        while trainer.step < config.train.steps:
            trainer.update(losses)
        seconds, cpu = time.monotonic() - started[0], time.process_time() - started[1]
        module = trainer.result()
        student = Student(parts.backbone, parts.connector, module, config.objective)
        return {"condition": self.condition, "variant": name, "gain": self._gain(student), "seconds": seconds, "cpu": cpu,
                **self._judged(module), "gates": gates_of(module)}

    def _judged(self, module: GatedResampler) -> dict[str, float | None]:
        if not self.trials:
            return {"judged": None, "caption": None}
        world = dataclasses.replace(self.world, modules={**self.world.modules, self.condition: module})
        pictures = Generation(world, self.emoji, Sampling()).pictures(self.trials, Line(self.condition, {self.condition: 1.0}))
        numbers, _ = labels_of(self.emoji)
        wanted = {label: numbers[label][[trial.target for trial in self.trials]] for label in LABELS}
        hits = hits_of(self.judge, pictures, wanted)
        return {"judged": float(hits[LABEL_OF[self.condition]].mean()), "caption": float(hits["caption"].mean())}

    @torch.no_grad()
    def _gain(self, student: Student) -> list[float]:
        """Relative change of the held-out error by the reference, for each fifth of the timesteps."""
        changes = {"objective.timestep_power": 1.0, "objective.drop_text": 0.0, "objective.drop_both": 0.0}
        config = self.config(changes, **{"train.batch": 32})
        draws = Draws(self.heldout, config, lambda caption: self.heldout.text(caption).shape[1])
        shown, plain = TimestepBuckets(), TimestepBuckets()
        for _ in range(self.options.batches):
            batch = draws.draw()
            batch = dataclasses.replace(batch, rows=tuple(dataclasses.replace(row, strength=1.0) for row in batch.rows))
            with self.accelerator.autocast():
                shown.add(batch.timestep_B, student.errors(self.heldout, batch, self.accelerator.device)[0])
                plain.add(batch.timestep_B, student.errors(self.heldout, batch, self.accelerator.device, False)[0])
        return [with_it / without - 1 for with_it, without in zip(shown.means(), plain.means(), strict=True)]


def shown(share: float | None) -> str:
    return "" if share is None else f"{share:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--conditions", nargs="+", default=list(LABEL_OF), choices=list(LABEL_OF))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=16, help="of 32 held-out rows, for the error")
    parser.add_argument("--judged", type=int, default=96, help="generated pictures; 0: none")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    print("| condition | changed | error 600-799 | error 800-999 | judged right | caption right | s | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for condition in options.conditions:
        learning = Learning(condition, options)
        for name in options.variants:
            found = learning.measure(name)
            with open(options.out / "learning.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps({**found, "steps": options.steps, "batch": options.batch}) + "\n")
            print(f"| {condition} | {name} | {100 * found['gain'][3]:+.1f}% | {100 * found['gain'][4]:+.1f}% | "
                  f"{shown(found['judged'])} | {shown(found['caption'])} | {found['seconds']:.0f} | {found['cpu']:.0f} |",
                  flush=True)


if __name__ == "__main__":
    main()
