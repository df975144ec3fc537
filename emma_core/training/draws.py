"""Which rows make a batch, and everything random about them; its state is all there is to a run's randomness.

Every process draws the whole batch of all processes and keeps its own part, so that the number of processes does not
change what is learnt.

Shapes: B rows of this process, G rows of all processes.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..base.schedule import TIMESTEPS
from ..errors import EmmaWarning
from .config import TrainConfig


class TrainingSet(Protocol):
    """Prepared pictures: latents, captions and the references of each (see `prepare`)."""

    def __len__(self) -> int: ...
    def bucket(self, index: int) -> tuple[int, int]: ...
    def group(self, index: int) -> str: ...
    def captions(self, index: int) -> tuple[str, ...]: ...
    def references(self, index: int) -> tuple[int, ...]: ...
    def variants(self, reference: int) -> int: ...
    def latent(self, index: int, flipped: bool = False) -> torch.Tensor: ...
    def text(self, caption: str) -> torch.Tensor: ...
    def features(self, reference: int, variant: int) -> dict[str, torch.Tensor]: ...
    def mark(self) -> str: ...  # of what is in the pictures
    def summary(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class BatchRow:
    """One target with its caption and reference; strength 0 drops the reference."""

    target: int
    flipped: bool
    caption: str
    reference: int
    variant: int
    strength: float


@dataclass(frozen=True)
class Batch:
    """Rows of this process, their timesteps and their noise, on the CPU."""

    number: int
    rows: tuple[BatchRow, ...]
    timestep_B: torch.Tensor
    noise_B4hw: torch.Tensor

    def part(self, indices: Sequence[int]) -> Batch:
        """Some of the rows."""
        return Batch(self.number, tuple(self.rows[index] for index in indices), self.timestep_B[indices],
                     self.noise_B4hw[indices])


class Draws:
    """Draws batches of one bucket each; every epoch shows every target once, in a new order.

    Args:
        data: what is drawn from.
        config: batch size, drops, timesteps, seed.
        length_of: number of text tokens of a caption: of several captions of a row those are taken that make few lengths.
        rank, processes: this process among all.
        without: targets that are never drawn.
    """

    def __init__(
        self, data: TrainingSet, config: TrainConfig, length_of: Callable[[str], int], rank: int = 0, processes: int = 1,
        without: frozenset[int] = frozenset(),
    ):
        self._data, self._config, self._length_of, self._without = data, config, length_of, without
        self._rank, self._processes = rank, processes
        self._chance = random.Random(config.train.seed)
        self._generator = torch.Generator().manual_seed(config.train.seed)
        self._batches: list[list[int]] = []  # of this epoch, never changed, so that `state` needs no copy of it
        self._drawn = 0  # of these
        self._targets = _described(data)
        self.number = 0

    def draw(self) -> Batch:
        """The next batch."""
        targets = self._next_targets()
        drops = [self._chance.random() for _ in targets]
        captions = self._captions(targets, drops)
        rows = tuple(self._row(*parts) for parts in zip(targets, captions, drops, strict=True))
        power = self._config.objective.timestep_power
        timestep_G = ((TIMESTEPS - 1) * torch.rand(len(rows), generator=self._generator) ** power).round().long()
        noise_G4hw = self._noise((len(rows), *self._data.latent(targets[0]).shape))
        part = slice(self._rank, None, self._processes)
        self.number += 1
        return Batch(self.number, rows[part], timestep_G[part], noise_G4hw[part])

    @property
    def state(self) -> dict[str, Any]:
        """Everything that decides what is drawn next, in plain values and tensors."""
        return {"chance": self._chance.getstate(), "generator": self._generator.get_state(), "number": self.number,
                "batches": self._batches, "drawn": self._drawn, "targets": self._targets}

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        version, words, gauss = value["chance"]
        self._chance.setstate((version, tuple(words), gauss))
        self._generator.set_state(value["generator"])
        self._batches, self._drawn, self.number = value["batches"], value["drawn"], value["number"]
        changed = self.changed_since(value)
        if changed:
            self._batches, self._drawn = [], 0
            warnings.warn(f"the training data are not those of the sitting before: {changed}. The run goes on with what is "
                          "there now and begins an epoch anew; it is no longer the run that it would have been.",
                          EmmaWarning, stacklevel=3)

    def changed_since(self, value: dict[str, Any]) -> str:
        """What differs between the data of now and those that a state drew from; "" if nothing does."""
        before, now = value.get("targets"), self._targets
        if before is None:  # of before data were described
            last = max((index for batch in value["batches"] for index in batch), default=-1)
            return f"{last + 1} pictures or more then, {now['count']} now" if last >= now["count"] else ""
        if before["count"] != now["count"]:
            return f"{before['count']} pictures then, {now['count']} now"
        names = [name for name in ("sizes", "groups", "captions", "pictures") if before.get(name, now[name]) != now[name]]
        return f"{now['count']} pictures as before, but with other {' and '.join(names)}, or in another order" if names else ""

    def _next_targets(self) -> list[int]:
        if self._drawn == len(self._batches):
            self._batches, self._drawn = self._epoch(), 0
        self._drawn += 1
        return self._batches[-self._drawn]

    def _epoch(self) -> list[list[int]]:
        """All targets in batches of one bucket; an incomplete batch is filled with others of its bucket."""
        size = self._config.train.batch * self._processes
        of_bucket: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index in range(len(self._data)):
            if index not in self._without:
                of_bucket[self._data.bucket(index)].append(index)
        batches = []
        for _, members in sorted(of_bucket.items()):
            order = self._chance.sample(members, len(members))
            order += self._chance.choices(members, k=-len(order) % size)
            batches += [order[start:start + size] for start in range(0, len(order), size)]
        self._chance.shuffle(batches)
        return batches

    def _captions(self, targets: Sequence[int], drops: Sequence[float]) -> list[str]:
        objective = self._config.objective
        without_text = objective.drop_text + objective.drop_both
        choices = [("",) if drop < without_text else self._data.captions(target) or ("",)
                   for target, drop in zip(targets, drops, strict=True)]
        return captions_of_few_lengths(choices, self._length_of, self._chance)

    def _row(self, target: int, caption: str, drop: float) -> BatchRow:
        objective = self._config.objective
        first, last = objective.drop_text, objective.drop_text + objective.drop_both + objective.drop_reference
        flipped = self._config.data.flip and self._chance.random() < 0.5
        if self._config.what == "ella":
            return BatchRow(target, flipped, caption, target, 0, 0.0)
        reference = self._chance.choice(self._data.references(target))
        variant = self._chance.randrange(self._data.variants(reference))
        return BatchRow(target, flipped, caption, reference, variant, float(not first <= drop < last))

    def _noise(self, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=self._generator)
        offset = self._config.objective.noise_offset
        return noise + offset * torch.randn((*shape[:2], 1, 1), generator=self._generator) if offset else noise


def _described(data: TrainingSet) -> dict[str, Any]:
    """How many targets there are, and digests of what decides how they are drawn."""
    parts = {"sizes": data.bucket, "groups": data.group, "captions": data.captions}
    digests = {name: hashlib.sha256() for name in parts}
    for index in range(len(data)):
        for name, of in parts.items():
            digests[name].update(repr(of(index)).encode("utf-8", "surrogatepass"))
    return {"count": len(data), "pictures": data.mark(), **{name: digest.hexdigest() for name, digest in digests.items()}}


def captions_of_few_lengths(
    choices: Sequence[Sequence[str]], length_of: Callable[[str], int], chance: random.Random
) -> list[str]:
    """One caption for each row, chosen so that few token counts occur: each count is a pass through the connector."""
    lengths = [{length_of(text) for text in texts} for texts in choices]
    captions = [""] * len(choices)
    open_rows = set(range(len(choices)))
    while open_rows:
        counts = Counter(length for row in open_rows for length in lengths[row])
        commonest = max(counts, key=lambda length: (counts[length], -length))
        for row in sorted(row for row in open_rows if commonest in lengths[row]):
            captions[row] = chance.choice([text for text in choices[row] if length_of(text) == commonest])
            open_rows.remove(row)
    return captions
