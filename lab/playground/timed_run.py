"""Training the playground's larger parts for a given time: weights and draws of timesteps, checkpoints, log.

Shapes: B rows, T timesteps, latents 4 x h x w.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from emma_core.base.schedule import TIMESTEPS, add_noise
from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.training.losses import TimestepBuckets, squared_errors

from .training import AveragedWeights, TimedLog, cosine_rate, load_state, save_state, set_rate

BATCH, WARMUP, AVERAGE_DECAY = 32, 0.03, 0.998
# Unweighted, the error at noisy timesteps is so small that a UNet hardly learns to begin a picture, and how a picture
# begins decides its style.
TIMESTEP_POWER, LEAST_WEIGHT, MOST_WEIGHT = 0.7, 5.0, 50.0
LOG_EVERY, CHECKPOINT_SECONDS = 100, 240.0


@dataclass(frozen=True)
class Predicted:
    """A batch's predicted and true noise."""

    predicted_B4hw: torch.Tensor
    noise_B4hw: torch.Tensor
    timestep_B: torch.Tensor


def noised(unit_B4hw: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noised latents, their noise, their timesteps."""
    timestep_B = draw_timesteps(len(unit_B4hw), generator)
    noise_B4hw = torch.randn(unit_B4hw.shape, generator=generator)
    return add_noise(unit_B4hw, noise_B4hw, PLAYGROUND_SPEC.alphas_cumprod_T[timestep_B]), noise_B4hw, timestep_B


def draw_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """(B,) with more of the noisy ones, on the generator's device."""
    share_B = torch.rand(count, generator=generator, device=generator.device) ** TIMESTEP_POWER
    return (share_B * TIMESTEPS).long().clamp(max=TIMESTEPS - 1)


def weights_of_timesteps() -> torch.Tensor:
    """(T,) weights of the squared error: 1/SNR within bounds, 1 on average over what `draw_timesteps` gives."""
    kept_T = PLAYGROUND_SPEC.alphas_cumprod_T
    weight_T = ((1 - kept_T) / kept_T).clamp(LEAST_WEIGHT, MOST_WEIGHT)
    edge_T1 = (torch.arange(TIMESTEPS + 1) / TIMESTEPS) ** (1 / TIMESTEP_POWER)
    return weight_T / (weight_T * edge_T1.diff()).sum()


class TimedRun:
    """Trains a model for some minutes; a run that was stopped goes on from its checkpoint.

    The rate falls with the wall clock: the run ends in time, whatever else the machine does.

    Args:
        model: all its parameters learn.
        checkpoint: file of the model, the optimizer and the average; its log lies beside it.
        minutes: of the whole run, all sittings together.
        rate: the highest.
        seed: of the draws.
    """

    def __init__(self, model: nn.Module, checkpoint: Path, minutes: float, rate: float, seed: int):
        self.model, self.checkpoint, self.minutes, self.seed = model, checkpoint, minutes, seed
        self.optimizer = torch.optim.AdamW(
            [{"params": list(model.parameters()), "base_lr": rate}], lr=rate, weight_decay=0.01, fused=True
        )
        self.average = AveragedWeights(model, AVERAGE_DECAY)
        self.step, self.spent = 0, 0.0
        self.log = TimedLog(checkpoint.with_suffix(".jsonl"))
        if checkpoint.exists():
            state = load_state(checkpoint)
            model.load_state_dict(state["base"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.values, self.step, self.spent = state["average"], state["step"], state["spent"]

    def run(self, predict: Callable[[random.Random, torch.Generator], Predicted]) -> None:
        """Train until the time is up; ``predict`` draws a batch and runs the model on it."""
        chance = random.Random(self.seed + self.step)
        generator = torch.Generator().manual_seed(self.seed + self.step)
        weight_T, buckets = weights_of_timesteps(), TimestepBuckets()
        started, saved = time.monotonic() - self.spent, time.monotonic()
        while (spent := time.monotonic() - started) < self.minutes * 60:
            self.spent, share = spent, spent / (self.minutes * 60)
            set_rate(self.optimizer, cosine_rate(int(share * 1000), 1000, int(WARMUP * 1000)))
            batch = predict(chance, generator)
            loss_B = squared_errors(batch.predicted_B4hw, batch.noise_B4hw)
            self.optimizer.zero_grad()
            (loss_B * weight_T[batch.timestep_B]).mean().backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            self.average.update(self.model, self.step)
            buckets.add(batch.timestep_B, loss_B)
            if self.step % LOG_EVERY == 0:
                self.log.write(step=self.step, share=round(share, 3),
                               buckets=[mean and round(mean, 4) for mean in buckets.means()])
                buckets = TimestepBuckets()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                saved = time.monotonic()
                self.save()
        self.spent = spent
        self.save()
        self.log.write(step=self.step, done=True)

    def save(self) -> None:
        """The checkpoint."""
        save_state(self.checkpoint, base=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                        average=self.average.values, step=self.step, spent=self.spent)


def averaged(model: nn.Module, checkpoint: Path) -> nn.Module:
    """The model with the averaged weights of a checkpoint, frozen."""
    state = load_state(checkpoint)
    model.load_state_dict(state["base"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state["average"][name])
    return model.eval().requires_grad_(False)
