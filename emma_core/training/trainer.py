"""The training loop of modules and connectors; the command line and the node both run it.

Shapes: B rows.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import TrainingError
from ..files.connector_file import save_connector
from ..files.module_file import save_module
from ..model.connector import Connector
from ..model.gated_resampler import GatedResampler
from ..model.module_config import ModuleConfig
from .averaging import AveragedWeights, cosine_rate
from .checkpoints import checkpoints, load_checkpoint, save_checkpoint, write_or_explain
from .config import TrainConfig
from .draws import Batch, Draws, TrainingSet
from .losses import TimestepBuckets
from .student import Student

if TYPE_CHECKING:
    from accelerate import Accelerator

_GLOBAL_GATES = ("attn_gate", "ffn_gate")


@dataclass(frozen=True)
class Progress:
    """What is known after an update.

    ``loss`` is the mean over the batch without weights; ``buckets`` means by timestep since the last report.
    """

    step: int
    steps: int
    loss: float
    rate: float
    seconds: float
    buckets: list[float | None] = field(default_factory=list)
    gates: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        return self.seconds / max(1, self.step) * (self.steps - self.step)


def rate_factor(step: int, config: TrainConfig) -> float:
    """Factor on the rate of update ``step`` (from 0): linear from 10% to 100% (paper, section 4.2), then constant or a cosine
    to 1%.
    """
    settings = config.train
    if settings.schedule == "constant" and step >= settings.warmup:
        return 1.0
    return cosine_rate(step, settings.steps, settings.warmup)


def make_optimizer(student: Student, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (paper, section 4.2); the global gates A and F, which begin at 0, have their own rate and no decay."""
    settings = config.train
    gates = [value for name, value in student.parameters() if name.endswith(_GLOBAL_GATES)]
    others = [value for name, value in student.parameters() if not name.endswith(_GLOBAL_GATES)]
    groups = [{"params": others, "base_rate": settings.rate, "weight_decay": settings.decay},
              {"params": gates, "base_rate": settings.rate * settings.gate_rate, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.rate, betas=(0.9, 0.999), eps=1e-8)


class Trainer:
    """One run: `run` goes on until the last update, an interrupt, or an error.

    Args:
        config: of the run.
        student: what learns and what stays frozen.
        data: prepared pictures.
        accelerator: device, precision and processes.
        folder: of checkpoints and results; made if needed.
    """

    def __init__(
        self, config: TrainConfig, student: Student, data: TrainingSet, accelerator: Accelerator, folder: Path
    ):
        self.config, self.student, self.data, self.accelerator, self.folder = config, student, data, accelerator, folder
        folder.mkdir(parents=True, exist_ok=True)
        student.freeze()
        student.learning.to(accelerator.device)
        student.connector.to(accelerator.device)
        self.optimizer = accelerator.prepare_optimizer(make_optimizer(student, config))
        self.average = AveragedWeights(student.learning, config.train.average) if config.train.average else None
        self.draws = Draws(data, config, lambda caption: data.text(caption).shape[1], accelerator.process_index,
                           accelerator.num_processes)
        self.step, self.seconds = 0, 0.0

    def run(self, after_step: Callable[[Progress], None] | None = None) -> None:
        """Train; checkpoints are written on the way and at the end, whatever ends it.

        Args:
            after_step: called by the main process after every update; what it raises (an interrupt) ends the run.
        Raises:
            TrainingError: a loss that is not finite; the weights are those before that update.
        """
        started, before, buckets = time.monotonic(), self.seconds, TimestepBuckets()
        saved = self.step
        try:
            while self.step < self.config.train.steps:
                loss = self.update(buckets)
                self.seconds = before + time.monotonic() - started
                if self.step % self.config.report.save_every == 0:
                    self.save()
                    saved = self.step
                if after_step and self.accelerator.is_main_process:
                    reported = self.step % self.config.report.log_every == 0
                    after_step(self._progress(loss, buckets if reported else None))
                    buckets = TimestepBuckets() if reported else buckets
        finally:
            if saved != self.step:
                self.save()
        self.save_result()

    def update(self, buckets: TimestepBuckets) -> float:
        """One update of the weights; returns the mean loss of this process.

        Raises:
            TrainingError: a loss that is not finite, before anything is changed.
        """
        settings = self.config.train
        draws_before = self.draws.state
        factor = rate_factor(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_rate"] * factor
        total = 0.0
        for _ in range(settings.accumulate):
            batch = self.draws.draw()
            with self.accelerator.autocast():
                error_B, weight_B = self.student.errors(self.data, batch, self.accelerator.device)
            loss = (error_B * weight_B).mean() / settings.accumulate
            self._check_finite(error_B, batch, draws_before)
            if loss.requires_grad:  # a batch without any reference teaches a module nothing
                self.accelerator.backward(loss)
            buckets.add(batch.timestep_B, error_B)
            total += error_B.detach().mean().item() / settings.accumulate
        self._reduce_gradients()
        if self._has_gradients():
            self.accelerator.clip_grad_norm_([value for _, value in self.student.parameters()], settings.clip or math.inf)
            self.optimizer.step()  # which fp16's scaler refuses without gradients
            self.optimizer.zero_grad()
        self.step += 1
        if self.average:
            self.average.update(self.student.learning, self.step)
        return total

    def save(self) -> None:
        """A checkpoint, and the module as it is now."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            save_checkpoint(self.folder, self.step, self.state(), self.config.report.keep)
            self.save_result()

    def save_result(self) -> Path:
        """The averaged (or the current) weights as a file that loads in the graph."""
        path = self.folder / f"{self.config.output.name}.safetensors"
        if self.accelerator.is_main_process:
            result = self.result()
            if isinstance(result, GatedResampler):
                write_or_explain(path, lambda temporary: save_module(result, temporary, torch.float16))
            else:
                write_or_explain(path, lambda temporary: save_connector(result, temporary))
        return path

    def result(self) -> GatedResampler | Connector:
        """A copy of what learns, with the averaged weights if there are any, and its metadata."""
        learning = self.averaged()
        if isinstance(learning, GatedResampler):
            learning.config = self.with_steps(learning.config)
        return learning

    def averaged(self) -> nn.Module:
        """A frozen copy of what learns, with the averaged weights if there are any."""
        learning = copy.deepcopy(self.student.learning).eval().requires_grad_(False)
        if self.average:
            self.average.copy_to(learning)
        return learning

    def with_steps(self, config: ModuleConfig) -> ModuleConfig:
        """A module's metadata, with how long it has been trained."""
        return config.replace(training={**config.training, "steps": self.step, "seconds": round(self.seconds)})

    def state(self) -> dict[str, Any]:
        """Everything that resuming bit for bit needs."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step, "seconds": self.seconds, "learning": self.student.learning.state_dict(),
            "optimizer": self.optimizer.state_dict(), "draws": self.draws.state,
            "average": self.average.values if self.average else {}, "scaler": scaler.state_dict() if scaler else {},
            "run": run_identity(self.config),
        }

    def resume(self) -> bool:
        """Go on from the newest checkpoint of the folder, if there is one.

        Raises:
            TrainingError: it belongs to a run with other settings, or is damaged.
        """
        found = checkpoints(self.folder)
        if not found:
            return False
        state = load_checkpoint(found[-1])
        known = {**run_identity(TrainConfig()), **state["run"]}  # settings that are newer than the checkpoint had their default
        differing = sorted(key for key, value in run_identity(self.config).items() if known.get(key) != value)
        if differing:
            raise TrainingError(f"{found[-1]} belongs to a run with other settings: {', '.join(differing)}. Give this run a "
                                "folder of its own, or restore these settings.")
        self.step, self.seconds = state["step"], state["seconds"]
        self.student.learning.load_state_dict(state["learning"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draws.state = state["draws"]
        if self.average:
            self.average.load(state["average"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return True

    def _check_finite(self, error_B: torch.Tensor, batch: Batch, draws_before: dict[str, Any]) -> None:
        bad = (~torch.isfinite(error_B.detach())).float()
        worst = self.accelerator.reduce(bad.sum(), "sum") if self.accelerator.num_processes > 1 else bad.sum()
        if not worst:
            return
        self.optimizer.zero_grad()
        self.draws.state = draws_before
        rows = [batch.rows[index] for index in bad.nonzero()[:, 0].tolist()]
        named = "; ".join(f"picture {row.target}, timestep {batch.timestep_B[batch.rows.index(row)]}, caption {row.caption!r}"
                          for row in rows[:3])
        raise TrainingError(
            f"the loss of batch {batch.number} is not finite ({named or 'in another process'}). Nothing was changed by it; the "
            f"last state is saved in {self.folder}. Try a lower rate (train.rate), or bf16 or fp32 (train.precision)."
        )

    def _has_gradients(self) -> bool:
        return any(value.grad is not None for _, value in self.student.parameters())

    def _reduce_gradients(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        learnt = torch.tensor(float(self._has_gradients()), device=self.accelerator.device)
        if not self.accelerator.reduce(learnt, "sum"):
            return  # no process had a reference: as in one process, the optimizer has nothing to do
        for _, value in self.student.parameters():
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            value.grad = self.accelerator.reduce(gradient, "mean")

    def _progress(self, loss: float, buckets: TimestepBuckets | None) -> Progress:
        gates: dict[str, list[float]] = {}
        if buckets is not None and self.student.module is not None:
            gates = gates_of(self.student.module)
        return Progress(self.step, self.config.train.steps, loss, self.optimizer.param_groups[0]["lr"], self.seconds,
                        buckets.means() if buckets else [], gates)


def run_identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that a checkpoint belongs to; what may change between sittings is left out."""
    flat = {f"{section}.{key}": list(value) if isinstance(value, tuple) else value
            for section, table in config.to_dict().items() if isinstance(table, dict) for key, value in table.items()}
    free = ("report.", "output.", "train.steps", "data.workers", "data.cache")
    return {"what": config.what, **{key: value for key, value in flat.items() if not key.startswith(free)}}


def gates_of(module: GatedResampler) -> dict[str, list[float]]:
    """The global gates A and F of each block."""
    return {"A": [block.attn_gate.item() for block in module.blocks], "F": [block.ffn_gate.item() for block in module.blocks]}


@torch.no_grad()
def gain_of_reference(trainer: Trainer, batches: int = 4) -> dict[str, list[float | None]]:
    """Losses by timestep with and without the reference on the same noise; the run's randomness stays as it was."""
    state = trainer.draws.state
    found = {"with reference": TimestepBuckets(), "text only": TimestepBuckets()}
    with trainer.accelerator.autocast() if trainer.accelerator else nullcontext():
        for _ in range(batches):
            batch = trainer.draws.draw()
            batch = dataclasses.replace(batch, rows=tuple(dataclasses.replace(row, strength=1.0) for row in batch.rows))
            for (_, buckets), shown in zip(found.items(), (True, False), strict=True):
                error_B, _ = trainer.student.errors(trainer.data, batch, trainer.accelerator.device, shown)
                buckets.add(batch.timestep_B, error_B)
    trainer.draws.state = state
    return {name: buckets.means() for name, buckets in found.items()}
