"""The training loop of modules and connectors; the command line and the node both run it.

Shapes: B rows.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import EmmaWarning, TrainingError
from ..files.connector_file import save_connector
from ..files.module_file import save_module
from ..files.writing import make_folder
from ..model.connector import Connector
from ..model.gated_resampler import GatedResampler
from ..model.module_config import ModuleConfig
from .averaging import AveragedWeights, cosine_rate
from .checkpoints import checkpoints, load_checkpoint, save_checkpoint, write_or_explain
from .config import MUON, TrainConfig
from .draws import Batch, Draws, TrainingSet
from .held_out import Gain, Growth, HeldOut, chosen
from .identity import FILES, check_files_of_run, check_identity, check_same_place, run_identity
from .interrupts import Interrupts
from .losses import TimestepBuckets
from .muon import MuonAndAdamW, is_hidden_matrix
from .student import Student

if TYPE_CHECKING:
    from accelerate import Accelerator

_GLOBAL_GATES = ("attn_gate", "ffn_gate")


@dataclass(frozen=True)
class UpdateReport:
    """What is known after an update.

    ``loss`` is the mean over the batch without weights; ``buckets`` means by timestep since the last report; ``gain`` what was
    measured on held-out pictures after this update.
    """

    step: int
    loss: float
    rate: float
    seconds: float
    buckets: list[float | None] = field(default_factory=list)
    gates: Mapping[str, list[float]] = field(default_factory=dict)
    gain: Gain | None = None


def rate_factor(step: int, config: TrainConfig) -> float:
    """Factor on the rate of update ``step`` (from 0): linear from 10% to 100% (paper, section 4.2), then constant or a cosine
    to 1%.
    """
    settings = config.train
    if settings.schedule == "constant" and step >= settings.warmup:
        return 1.0
    return cosine_rate(step, settings.steps, settings.warmup)


def make_optimizer(student: Student, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (paper, section 4.2), or Muon beside it for the matrices of the blocks.

    The global gates A and F, which begin at 0, have their own rate and no decay.
    """
    settings = config.train
    named = list(student.parameters())
    gates = [value for name, value in named if name.endswith(_GLOBAL_GATES)]
    matrices = [value for name, value in named if settings.optimizer == MUON and is_hidden_matrix(name, value)]
    apart = {id(value) for value in (*gates, *matrices)}
    others = [value for _, value in named if id(value) not in apart]
    groups = [{"params": others, "base_rate": settings.rate, "weight_decay": settings.decay},
              {"params": gates, "base_rate": settings.rate * settings.gate_rate, "weight_decay": 0.0}]

    def adamw(some: list[dict]) -> torch.optim.AdamW:
        return torch.optim.AdamW(some, lr=settings.rate, betas=(0.9, 0.999), eps=1e-8)

    groups = [group for group in groups if group["params"]]
    if not matrices:
        return adamw(groups)
    return MuonAndAdamW([{"params": matrices, "base_rate": settings.rate}], groups, settings.decay, adamw)


class Trainer:
    """One run: `run` goes on until the last update, an interrupt, or an error.

    Args:
        config: of the run.
        student: what learns and what stays frozen.
        data: prepared pictures.
        accelerator: device, precision and processes.
        folder: of checkpoints and results; made if needed.
        files: marks of the files that the frozen parts come from: a run goes on with these alone.
    """

    def __init__(
        self, config: TrainConfig, student: Student, data: TrainingSet, accelerator: Accelerator, folder: Path,
        files: Mapping[str, str] = MappingProxyType({}),
    ):
        self._files = dict(files)
        self.config, self.student, self.data, self.accelerator, self.folder = config, student, data, accelerator, folder
        make_folder(folder)
        student.freeze()
        student.learning.to(accelerator.device)
        if isinstance(student.connector, nn.Module):
            student.connector.to(accelerator.device)
        self.optimizer = accelerator.prepare_optimizer(make_optimizer(student, config))
        self.average = AveragedWeights(student.learning, config.train.average) if config.train.average else None
        held_out = chosen(data, config)
        self.held_out = HeldOut(data, config, held_out) if held_out else None
        self.draws = Draws(data, config, lambda caption: data.text(caption).shape[1], accelerator.process_index,
                           accelerator.num_processes, held_out)
        self.step, self.seconds, self.growth = 0, 0.0, Growth()
        self._saved = 0  # the last step that was saved, or was tried to be
        self._torn = False  # inside the change of weights, moments and averages: not to be saved

    def run(self, after_step: Callable[[UpdateReport], None] | None = None) -> None:
        """Train; checkpoints are written on the way and at the end, whatever ends it.

        Args:
            after_step: called by the main process after every update; what it raises (an interrupt) ends the run.
        Raises:
            TrainingError: a loss or a gradient that is not finite; the weights are those before that update.
            KeyboardInterrupt: after the update that Ctrl-C or SIGTERM fell into, and after it was saved.
        """
        self._saved = self.step
        with Interrupts() as interrupts:
            try:
                self._learn(after_step, interrupts)
            finally:
                if self._saved != self.step and not self._torn and not interrupts.abandoned:
                    self.save()
            self.save_result()
            self._end_if(interrupts)

    def update(self, buckets: TimestepBuckets) -> float:
        """One update of the weights; returns the mean loss of this process. What ends it early leaves all as it was.

        Raises:
            TrainingError: a loss or a gradient that is not finite.
        """
        factor = rate_factor(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_rate"] * factor
        draws_before = self.draws.state
        try:
            total = sum(self._learn_from(self.draws.draw(), buckets) for _ in range(self.config.train.accumulate))
            self._reduce_gradients()
            learnt = self._has_gradients()
            if learnt:
                self._clip()
        except BaseException:
            self.optimizer.zero_grad()
            self.draws.state = draws_before
            raise
        self._torn = True
        if learnt:
            self.optimizer.step()  # which fp16's scaler refuses without gradients
        self.step += 1
        if self.average:
            self.average.update(self.student.learning, self.step)
        self._torn = False
        self.optimizer.zero_grad()
        return total

    def save(self) -> None:
        """A checkpoint, and the module as it is now.

        Raises:
            TrainingError: weights that are not finite, a full disk; what was saved before is still there.
        """
        self._saved = self.step
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
            "run": {**run_identity(self.config), FILES: self._files}, "growth": self.growth.state,
        }

    def resume(self) -> bool:
        """Go on from the newest checkpoint of the folder, if there is one.

        Raises:
            TrainingError: it belongs to a run with other settings or of other files, or is damaged.
        """
        found = checkpoints(self.folder)
        if not found:
            return False
        state = load_checkpoint(found[-1])
        check_identity(state["run"], self.config, found[-1])
        check_files_of_run(state["run"], self._files, found[-1])
        if self.draws.changed_since(state["draws"]):
            check_same_place(state["run"], self.config, found[-1])
        self.step, self.seconds = state["step"], state["seconds"]
        self.student.learning.load_state_dict(state["learning"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draws.state = state["draws"]
        self.growth = Growth.of_state(state.get("growth", {}))
        if self.average:
            self.average.load(state["average"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return True

    def _learn(self, after_step: Callable[[UpdateReport], None] | None, interrupts: Interrupts) -> None:
        started, before, buckets = time.monotonic(), self.seconds, TimestepBuckets()
        while self.step < self.config.train.steps and not self.ended_growing:
            loss = self._update_or_save(buckets)
            self.seconds = before + time.monotonic() - started
            gain = None
            if self.step % self.config.report.save_every == 0:
                gain = self._measured()
                self.save()
            if after_step and self.accelerator.is_main_process:
                reported = self.step % self.config.report.log_every == 0
                after_step(self._report(loss, buckets if reported else None, gain))
                buckets = TimestepBuckets() if reported else buckets
            self._end_if(interrupts)

    @property
    def ended_growing(self) -> bool:
        """Whether the gain on held-out pictures has stopped to grow."""
        return self.held_out is not None and self.growth.ended(self.config, self.step)

    def _measured(self) -> Gain | None:
        """The gain on held-out pictures, of the weights that would be saved; the same in all processes."""
        if self.held_out is None:
            return None
        with self.accelerator.autocast():
            gain = self.held_out.gain(self.student, self.averaged(), self.accelerator.device)
        share = gain.share
        if self.accelerator.num_processes > 1:  # which may round in different ways, and must end together
            share = self.accelerator.reduce(torch.tensor(share, device=self.accelerator.device), "mean").item()
        self.growth.gains.append((self.step, share))
        return gain

    def _end_if(self, interrupts: Interrupts) -> None:
        """All processes end after the same update, whichever of them was told to."""
        told = interrupts.count
        if self.accelerator.num_processes > 1:
            told = self.accelerator.reduce(torch.tensor(float(told), device=self.accelerator.device), "sum").item()
        if told:
            raise KeyboardInterrupt

    def _update_or_save(self, buckets: TimestepBuckets) -> float:
        """An update; where it fails, what was learnt before it is saved, and that this may fail too does not hide why."""
        try:
            return self.update(buckets)
        except Exception:
            try:
                if self._saved != self.step and not self._torn:
                    self.save()
            except Exception as found:
                warnings.warn(f"the state before the error could not be saved: {found}", EmmaWarning, stacklevel=2)
            raise

    def _learn_from(self, batch: Batch, buckets: TimestepBuckets) -> float:
        """Add a batch's part to the gradients; returns its part of the mean error."""
        with self.accelerator.autocast():
            error_B, weight_B = self._errors(batch)
        loss = (error_B * weight_B).mean() / self.config.train.accumulate
        self._check_loss(loss, error_B, weight_B, batch)
        if loss.requires_grad:  # a batch without any reference teaches a module nothing
            self.accelerator.backward(loss)
        buckets.add(batch.timestep_B, error_B)
        return error_B.detach().mean().item() / self.config.train.accumulate

    def _errors(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) errors and weights, of the reading while it teaches."""
        student, device = self.student, self.accelerator.device
        if student.reading is not None and student.reading.teaches(batch):
            error_B = student.reading.errors(student.connector, self.data, batch, device)
            return error_B, torch.ones_like(error_B)
        return student.errors(self.data, batch, device)

    def _check_loss(self, loss: torch.Tensor, error_B: torch.Tensor, weight_B: torch.Tensor, batch: Batch) -> None:
        bad = (~torch.isfinite(loss.detach())).float()
        if not (self.accelerator.reduce(bad, "sum") if self.accelerator.num_processes > 1 else bad):
            return
        broken = (~torch.isfinite(error_B * weight_B)).nonzero()[:, 0].tolist()
        named = "; ".join(f"picture {batch.rows[index].target}, timestep {batch.timestep_B[index]}, caption "
                          f"{batch.rows[index].caption!r}, error {error_B[index]:g}, weight {weight_B[index]:g}"
                          for index in broken[:3])
        where = named or ("the sum of its rows" if bad else "in another process")
        raise self._not_finite(f"the loss of batch {batch.number} is not finite ({where})")

    def _clip(self) -> None:
        """Bound the gradient's norm; fp16's scaler leaves out updates that overflow, as long as its scale can still fall."""
        learning = [value for _, value in self.student.parameters()]
        norm = self.accelerator.clip_grad_norm_(learning, self.config.train.clip or math.inf)
        scaler = self.accelerator.scaler
        if not torch.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            raise self._not_finite(f"the gradient of update {self.step + 1} is not finite (its norm is {norm:g})")

    def _not_finite(self, found: str) -> TrainingError:
        return TrainingError(f"{found}. Nothing was changed by it; the last state is saved in {self.folder}. Try a lower rate "
                             "(train.rate), or bf16 or fp32 (train.precision).")

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

    def _report(self, loss: float, buckets: TimestepBuckets | None, gain: Gain | None) -> UpdateReport:
        gates: dict[str, list[float]] = {}
        if buckets is not None and self.student.module is not None:
            gates = gates_of(self.student.module)
        return UpdateReport(self.step, loss, self.optimizer.param_groups[0]["lr"], self.seconds,
                            buckets.means() if buckets else [], gates, gain)


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
