"""Pictures that a run never learns from, what the reference gains on them, and when that has stopped to grow.

Shapes: B rows.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..base.schedule import TIMESTEPS
from .config import TrainConfig
from .draws import Batch, BatchRow, TrainingSet
from .losses import TimestepBuckets
from .student import Student

FEWEST = 4  # pictures whose gain tells anything
ROWS = 32  # or one for each picture
LEAST_GROWTH = 0.001  # of the error: less is no growth
EARLIEST = 0.5  # of the updates: a run that begins slowly is not ended before


def chosen(data: TrainingSet, config: TrainConfig) -> frozenset[int]:
    """Indices of targets that are held out: `train.held_out` of all, none if these are fewer than FEWEST.

    Of a group with several pictures one at least is learnt from.
    """
    wanted = round(config.train.held_out * len(data)) if config.what == "module" else 0
    if wanted < FEWEST:
        return frozenset()
    left = Counter(data.group(index) for index in range(len(data)))
    alone = {group for group, count in left.items() if count == 1}
    found: list[int] = []
    for index in random.Random(f"held out {config.train.seed}").sample(range(len(data)), len(data)):
        group = data.group(index)
        if len(found) < wanted and (left[group] > 1 or group in alone):
            found.append(index)
            left[group] -= 1
    return frozenset(found) if FEWEST <= len(found) < len(data) else frozenset()


@dataclass(frozen=True)
class Gain:
    """Errors on held-out pictures with and without the reference, on the same noise.

    Args:
        share: how much of the error (weighted as in training) the reference takes away.
        shown, plain: mean errors by timestep, with the reference and without.
    """

    share: float
    shown: list[float | None]
    plain: list[float | None]


class HeldOut:
    """Measures always on the same rows, timesteps and noise, so that two measurements differ by the module alone.

    Args:
        data: the training set.
        config: of the run.
        indices: see `chosen`.
    """

    def __init__(self, data: TrainingSet, config: TrainConfig, indices: frozenset[int]):
        self._data, self.indices = data, indices
        self._batches = _batches(data, config, sorted(indices))
        self._plain: list[torch.Tensor] = []  # errors without the reference, which never change

    @torch.no_grad()
    def gain(self, student: Student, module: torch.nn.Module, device: torch.device) -> Gain:
        """Of a module in the student's place.

        Args:
            student: everything around it.
            module: on ``device``.
        """
        student = dataclasses.replace(student, module=module)
        if not self._plain:
            self._plain = [student.errors(self._data, batch, device, with_reference=False)[0].cpu() for batch in self._batches]
        shown, plain = TimestepBuckets(), TimestepBuckets()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, plain_B in zip(self._batches, self._plain, strict=True):
            shown_B, weight_B = (one.cpu() for one in student.errors(self._data, batch, device))
            shown.add(batch.timestep_B, shown_B)
            plain.add(batch.timestep_B, plain_B)
            sums += torch.stack([(weight_B * error_B).double().sum() for error_B in (shown_B, plain_B)])
        return Gain(1 - (sums[0] / sums[1]).item() if sums[1] else 0.0, shown.means(), plain.means())


@dataclass
class Growth:
    """The gains of a run so far, as its checkpoints keep them.

    Args:
        gains: (update, share) of each measurement.
    """

    gains: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Growth:
        """What a checkpoint kept; nothing in one of before gains were measured."""
        return cls([(int(step), float(share)) for step, share in state.get("gains", ())])

    @property
    def state(self) -> dict[str, Any]:
        return {"gains": [list(one) for one in self.gains]}

    @property
    def best(self) -> tuple[int, float]:
        """The last measurement that was LEAST_GROWTH above all before it; (0, 0.0) at the beginning."""
        found = (0, 0.0)
        for step, share in self.gains:
            if share > found[1] + LEAST_GROWTH:
                found = (step, share)
        return found

    def ended(self, config: TrainConfig, step: int) -> bool:
        """Whether the gain has not grown for `train.patience` updates."""
        train = config.train
        return bool(train.patience and self.gains and step >= EARLIEST * train.steps and step - self.best[0] >= train.patience)


def _batches(data: TrainingSet, config: TrainConfig, indices: list[int]) -> list[Batch]:
    """Rows of one size together, each with a noise of its own; timesteps are spread as training draws them."""
    chance = random.Random(f"held-out rows {config.train.seed}")
    generator = torch.Generator().manual_seed(config.train.seed)
    count = max(ROWS, len(indices)) if indices else 0
    places = chance.sample(range(count), count)
    of_bucket: dict[tuple[int, int], list[tuple[BatchRow, int, torch.Tensor]]] = defaultdict(list)
    for row, place in enumerate(places):
        index = indices[row % len(indices)]
        timestep = round((TIMESTEPS - 1) * ((place + 0.5) / count) ** config.objective.timestep_power)
        noise = torch.randn(data.latent(index).shape, generator=generator)
        caption, reference = chance.choice(data.captions(index) or ("",)), chance.choice(data.references(index))
        of_bucket[data.bucket(index)].append((BatchRow(index, False, caption, reference, 0, 1.0), timestep, noise))
    size = config.train.batch
    return [_batch(found[start:start + size]) for _, found in sorted(of_bucket.items()) for start in range(0, len(found), size)]


def _batch(rows: list[tuple[BatchRow, int, torch.Tensor]]) -> Batch:
    return Batch(0, tuple(row for row, _, _ in rows), torch.tensor([timestep for _, timestep, _ in rows]),
                 torch.stack([noise for _, _, noise in rows]))
