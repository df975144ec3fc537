"""Training for a given time: rate by the clock, averaged weights, checkpoints, log. A run that was stopped goes on.

A run may be lengthened: called again with more minutes, it goes on at the rate that the clock then gives. Processes of one
`torchrun` learn together, each from batches of its own: on two cores two see a third more pictures than one with two threads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from emma_core.errors import TrainingError

AVERAGE_DECAY = 0.999
WARMUP_STEPS, COOLING = 100, 0.25  # the rate stays at its height and falls in the last quarter of the time
LOG_EVERY, CHECKPOINT_SECONDS = 50, 180.0
_FAR = 1_000_003  # between the seeds of processes


def add_run_arguments(parser: argparse.ArgumentParser, minutes: float) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.miniature.dataset`")
    parser.add_argument("--state", type=Path, required=True, help="checkpoint, to go on from too; its log lies beside it")
    parser.add_argument("--minutes", type=float, default=minutes, help="of the whole run, all sittings together")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _most_of_processes(*numbers: float) -> list[float]:
    """The largest of each number among the processes: one clock for all, and what one was told holds for all."""
    if not dist.is_initialized():
        return list(numbers)
    most = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()


def _share_gradients(learning: Iterable[nn.Parameter]) -> None:
    """Every process gets the mean of all."""
    if not dist.is_initialized():
        return
    gradients = [tensor.grad for tensor in learning if tensor.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / dist.get_world_size()
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def begin(options: argparse.Namespace) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        dist.init_process_group("gloo")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.state.parent.mkdir(parents=True, exist_ok=True)


class Log:
    """One JSON line per report, to the screen and to a file."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, **values) -> None:
        line = json.dumps(values)
        print(line, flush=True)
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def rate_factor(step: int, share: float) -> float:
    """Warm-up by steps, a plateau, then down in a straight line to a twentieth."""
    return min(1.0, (step + 1) / WARMUP_STEPS, 0.05 + 0.95 * (1 - share) / COOLING)


def read_state(state: Path, device: str = "cpu") -> dict:
    """A checkpoint: model, average, optimizer, step, spent, about."""
    return torch.load(state, map_location=device, weights_only=True)


def adam(named: dict[str, nn.Parameter], rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(named.values(), lr=rate, weight_decay=weight_decay, fused=True)


class TimedRun:
    """Trains what requires gradients in ``model`` until ``options.minutes`` are spent.

    Args:
        model: on its device already.
        options: of `add_run_arguments`.
        rate: the highest.
        about: kept in the checkpoint: what is needed to build the model again.
    """

    def __init__(
        self, model: nn.Module, options: argparse.Namespace, rate: float, weight_decay: float = 0.01, about: dict | None = None,
        optimizer: Callable[..., Any] | None = None,
    ):
        self.model, self.options, self.rate = model, options, rate
        self.learning = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        self.optimizer = (optimizer or adam)(self.learning, rate, weight_decay)
        self.average = {name: tensor.detach().clone() for name, tensor in self.learning.items()}
        self.step, self.spent, self.stopped, self.about = 0, 0.0, False, about or {}
        self.log = Log(options.state.with_suffix(".jsonl"))
        if options.state.exists():
            self._resume(read_state(options.state, options.device))

    def _resume(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.step, self.spent = state["step"], state["spent"]
        self.average.update({name: tensor for name, tensor in state["average"].items() if name in self.average})
        with contextlib.suppress(ValueError, KeyError):  # made by another optimizer, or for another choice of what learns
            self.optimizer.load_state_dict(state["optimizer"])

    def run(self, loss_of_batch: Callable[[torch.Generator], dict[str, torch.Tensor]]) -> None:
        """``loss_of_batch`` draws a batch; its "loss" is what is made smaller, whatever else it gives is logged.

        Ends at the time, or after the update at work when the process is asked to end (SIGTERM, SIGINT); saves in both cases.

        Raises:
            TrainingError: the loss is not finite; the last checkpoint stays.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "stopped", True))
        generator = torch.Generator(self.options.device).manual_seed(self.options.seed + self.step + _FAR * _rank())
        seconds, started, saved = self.options.minutes * 60, time.monotonic() - self.spent, time.monotonic()
        found: dict[str, list[torch.Tensor]] = {}
        while self.spent < seconds and not self.stopped:
            self._update(loss_of_batch(generator), found)
            self.spent, self.stopped = _most_of_processes(time.monotonic() - started, self.stopped)
            if self.step % LOG_EVERY == 0:
                self._report(found)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    saved = time.monotonic()
                    self.save()
        if found:
            self._report(found)
        self.save()

    def _report(self, found: dict[str, list[torch.Tensor]]) -> None:
        means = {name: torch.stack(values).nanmean().item() for name, values in found.items()}  # a part may be empty
        if not math.isfinite(means["loss"]):
            raise TrainingError(f"the loss is {means['loss']} before update {self.step}: lower the rate and go on from the "
                                "last checkpoint.")
        if not _rank():
            self._write(means)
        found.clear()

    def _write(self, means: dict[str, float]) -> None:
        self.log.write(step=self.step, minutes=round(self.spent / 60, 2),
                       **{name: round(mean, 5) for name, mean in means.items()})

    def _update(self, losses: dict[str, torch.Tensor], found: dict[str, list[torch.Tensor]]) -> None:
        factor = rate_factor(self.step, self.spent / (self.options.minutes * 60))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        self.optimizer.zero_grad()
        losses["loss"].backward()
        _share_gradients(self.learning.values())
        torch.nn.utils.clip_grad_norm_(self.learning.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(AVERAGE_DECAY, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.learning.values()), 1 - decay)
        for name, value in losses.items():
            found.setdefault(name, []).append(value.detach())

    def save(self) -> None:
        """The checkpoint, whole or not at all."""
        if _rank():
            return
        temporary = self.options.state.with_suffix(".partial")
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average,
                    "step": self.step, "spent": self.spent, "about": self.about}, temporary)
        temporary.replace(self.options.state)

    @torch.no_grad()
    def use_average(self) -> None:
        """The model gets its averaged weights (the checkpoint has both)."""
        for name, tensor in self.learning.items():
            tensor.copy_(self.average[name])
        self.model.eval()


def save_slim(state: Path, out: Path) -> None:
    """The averaged model alone, in half precision: enough to use it, not to train it further."""
    saved = read_state(state)
    model = {name: tensor.half() if tensor.is_floating_point() else tensor
             for name, tensor in {**saved["model"], **saved["average"]}.items()}
    torch.save({**saved, "model": model, "average": {}, "optimizer": None}, out)


def load_averaged(model: nn.Module, state: Path, device: str = "cpu") -> nn.Module:
    """The model with the averaged weights of a checkpoint, frozen."""
    saved = read_state(state, device)
    model.load_state_dict({**saved["model"], **saved["average"]})
    return model.eval().requires_grad_(False)
