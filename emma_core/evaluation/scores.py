"""Scores on disk, one JSON line for each comparison and model, and computing those that are missing.

Shapes: B pictures, D width of an embedding, R references, P prompts, K draws.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import EmmaWarning, FileError
from ..files.json_file import entry_of, parse_json
from ..files.writing import explained, write_atomically
from .plan import Comparison
from .references import ReferencePicture
from .scorers import Scorer

Key = tuple[str, str, str, str]  # model (SHA-256), picture, digest of the reference, prompt


@dataclass(frozen=True)
class Model:
    """A scoring model that may not be loaded yet."""

    kind: str
    name: str
    sha256: str

    @property
    def mark(self) -> str:
        """Of the weights and what they are used as."""
        return f"{self.name} {self.sha256}"


class ScoreFile:
    """Lines of {model, picture, reference_sha256, prompt, ..., scores}; they are only added.

    A torn last line is dropped, a damaged one passed over: what they held is computed again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[Key, dict[str, float]] = {}
        if path.is_file():
            self._read()

    def add(self, lines: Sequence[Mapping]) -> None:
        """Written at once, and kept."""
        # what is no text in the name of a file is of no use here
        with explained(self.path), open(self.path, "a", encoding="utf-8", errors="replace") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        for line in lines:
            self.known[_key_of(line)] = dict(line["scores"])

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[:content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # the run ended while it wrote
            write_atomically(self.path, lambda temporary: temporary.write_bytes(whole))
        damaged = 0
        for text in whole.split(b"\n")[:-1]:
            try:
                line = parse_json(text.decode("utf-8"), "a line", FileError)
                self.known[_key_of(line)] = _scores_of(line)
            except (FileError, UnicodeDecodeError):
                damaged += 1
        if damaged:
            warnings.warn(f"{damaged} lines of {self.path.name} are damaged; what they held is computed again", EmmaWarning,
                          stacklevel=3)


def missing(compared: Iterable[Comparison], file: ScoreFile, model: Model, references: Sequence[ReferencePicture]
            ) -> dict[str, list[Comparison]]:
    """Comparisons without scores by this model, by picture."""
    todo: dict[str, list[Comparison]] = {}
    for one in compared:
        if _key(model, one, references) not in file.known:
            todo.setdefault(one.job.key, []).append(one)
    return todo


class Scoring:
    """Scores of one model; what is compared again and again is embedded once."""

    def __init__(self, model: Model, scorer: Scorer, references: Sequence[ReferencePicture]):
        self._model, self._scorer, self._references = model, scorer, references
        self._known_references: dict[int, torch.Tensor] = {}
        self._known_prompts: dict[str, torch.Tensor] = {}

    def lines(self, batch: Sequence[tuple[Path, Sequence[Comparison]]]) -> list[dict]:
        """Lines for the comparisons of some pictures."""
        embedded_BD = self._scorer.embed_pictures([_opened(path) for path, _ in batch])
        return [self._line(picture_D, one) for picture_D, (_, compared) in zip(embedded_BD, batch, strict=True)
                for one in compared]

    def _line(self, picture_D: torch.Tensor, one: Comparison) -> dict:
        scorer, reference = self._scorer, self._references[one.reference]
        scores = {scorer.reference_column: float(picture_D @ self._reference(one.reference))}
        if scorer.prompt_column:
            scores[scorer.prompt_column] = float(picture_D @ self._prompt(one.job.prompt))
        return {"model": self._model.mark, "picture": one.job.key, "row": one.job.row.name, "reference": reference.name,
                "reference_sha256": reference.digest, "prompt": one.job.prompt, "seed": one.job.seed, "scores": scores}

    def _reference(self, position: int) -> torch.Tensor:
        if position not in self._known_references:
            [self._known_references[position]] = self._scorer.embed_pictures([self._references[position].picture()])
        return self._known_references[position]

    def _prompt(self, prompt: str) -> torch.Tensor:
        if prompt not in self._known_prompts:
            [self._known_prompts[prompt]] = self._scorer.embed_prompts([prompt])
        return self._known_prompts[prompt]


def score_missing(
    todo: Mapping[str, Sequence[Comparison]], file: ScoreFile, scoring: Scoring, folder: Path, at_once: int,
    after_batch: Callable[[int], None],
) -> None:
    """Computes and keeps the scores of pictures in ``folder``, ``at_once`` at a time; ``after_batch`` is told how many."""
    keys = list(todo)
    for start in range(0, len(keys), at_once):
        chunk = keys[start:start + at_once]
        file.add(scoring.lines([(folder / f"{key}.png", todo[key]) for key in chunk]))
        after_batch(len(chunk))


def tables(
    compared: Sequence[Comparison], file: ScoreFile, models: Sequence[Model], references: Sequence[ReferencePicture],
    sizes: tuple[int, int, int],
) -> dict[str, dict[str, np.ndarray]]:
    """Row name -> column -> scores (R, P, K); ``sizes`` are R, P, K."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for one in compared:
        row = found.setdefault(one.job.row.name, {})
        for model in models:
            for column, value in file.known[_key(model, one, references)].items():
                row.setdefault(column, np.full(sizes, np.nan))[one.reference, one.prompt, one.draw] = value
    return found


def _key(model: Model, one: Comparison, references: Sequence[ReferencePicture]) -> Key:
    return model.mark, one.job.key, references[one.reference].digest, one.job.prompt


def _key_of(line: Mapping) -> Key:
    model, picture, reference, prompt = (entry_of(line, key, str, "a line", FileError) for key in
                                         ("model", "picture", "reference_sha256", "prompt"))
    return model, picture, reference, prompt


def _scores_of(line: Mapping) -> dict[str, float]:
    scores = entry_of(line, "scores", dict, "a line", FileError)
    found = {name: float(entry_of(scores, name, float, "scores", FileError)) for name in scores}
    if not found or not all(map(math.isfinite, found.values())):
        raise FileError("a line without finite scores. Compute it again.")
    return found


def _opened(path: Path) -> Image.Image:
    with Image.open(path, formats=("PNG",)) as opened:
        return opened.convert("RGB")
