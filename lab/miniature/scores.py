"""Shares of right verdicts with intervals, as lines of a table that grows: a run can be stopped and called again.

Shapes: B pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lab.playground.evaluate import Score, bootstrapped
from lab.playground.judge import Judge

from .dataset import Pictures
from .judge import LABELS, label_numbers, verdicts

ALL = "all three"


class Scorer:
    """A judge's verdicts against what was wanted of each picture, by the position of the real picture aimed at."""

    def __init__(self, judge: Judge, data: Pictures):
        self._judge, self._data, self._numbers = judge, data, label_numbers(data)

    def score(self, image_B3SS: torch.Tensor, targets: Sequence[int]) -> dict[str, Score]:
        """Of each kind of label and of all at once; intervals by concept, not by picture."""
        found = verdicts(self._judge, image_B3SS)
        hits = {label: (found[label] == self._numbers[label][list(targets)]).numpy() for label in LABELS}
        hits[ALL] = np.logical_and.reduce(list(hits.values()))
        concepts = [self._data.rows[target].concept for target in targets]
        return {label: bootstrapped(hit_B, concepts) for label, hit_B in hits.items()}


class Table:
    """Lines of scores in a JSON file; those of other settings are dropped. ``extra``: columns beside the judge's."""

    def __init__(self, path: Path, settings: dict, extra: Sequence[str] = ()):
        self._path, self._settings, self.lines = path, settings, {}
        self._columns = [*LABELS, ALL, *extra]
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] == settings:
                self.lines = {name: {label: Score(**one) for label, one in line.items()}
                              for name, line in found["lines"].items()}

    def __contains__(self, name: str) -> bool:
        return name in self.lines

    def add(self, name: str, scores: dict[str, Score]) -> None:
        self.lines[name] = scores
        lines = {line: {label: vars(one) for label, one in score.items()} for line, score in self.lines.items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"settings": self._settings, "lines": lines}, indent=1) + "\n", encoding="utf-8")
        print(self.markdown([name]).splitlines()[-1], flush=True)

    def markdown(self, names: Sequence[str] | None = None) -> str:
        rows = ["| | " + " | ".join(self._columns) + " |", "| --- |" + " --- |" * len(self._columns)]
        for name in names or self.lines:
            scores = [self.lines[name][label] for label in self._columns]
            cells = [f"{one.mean:.2f} ({one.low:.2f} to {one.high:.2f})" for one in scores]
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(rows)
