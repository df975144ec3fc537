"""What is drawn and compared: prompts x references x noise for every row, and the names of the pictures.

A picture is named by everything it depends on, so that a changed setting never takes an old picture for its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.plain_file import visible
from ..files.tensor_file import sha256_of_file
from ..model.addition import BLOCKS
from .config import SUBJECT, EvalConfig, ResultRow
from .references import ReferencePicture

_FORMAT = 1  # of the keys: to be raised when the same settings come to draw other pictures
_WEIGHTS = (".safetensors", ".sft", ".bin", ".ckpt", ".pt", ".pth", ".json")
_KEY_DIGITS = 32


@dataclass(frozen=True)
class DrawingJob:
    """One picture to draw: in words, and its key, which is its file's name. Text only has no reference."""

    row: ResultRow
    prompt: str
    reference: ReferencePicture | None
    seed: int
    key: str


@dataclass(frozen=True)
class Comparison:
    """A picture with the reference and the prompt that it is compared with, by their positions, and the draw of its noise."""

    job: DrawingJob
    reference: int
    prompt: int
    draw: int


@dataclass(frozen=True)
class Files:
    """SHA-256 of all files that take part in drawing: section -> file name -> digest; `modules` are in the rows' order."""

    base: Mapping[str, str]
    modules: Mapping[str, str]
    encoders: Mapping[str, str]


def comparisons(
    config: EvalConfig, files: Files, precision: str, rows: Sequence[ResultRow], references: Sequence[ReferencePicture],
    prompts: Sequence[str],
) -> Iterator[Comparison]:
    """Every row, reference, prompt and draw, references outermost.

    Text-only pictures depend on no reference: the same ones are compared with all. The noise of a prompt is the same in every
    row and for every reference, and another for every prompt, so that resampling the prompts resamples the noise too.

    Args:
        config: of the evaluation.
        files: what the pictures depend on.
        precision: the one that the device has.
        rows, references, prompts: to be crossed.
    """
    sampling = config.sampling
    common = {"format": _FORMAT, "files": files.base, "prediction": config.base.prediction, "precision": precision,
              "steps": sampling.steps, "guidance": sampling.guidance, "size_px": config.size_px, "negative": sampling.negative}
    of_row = {row: _row_settings(config, files, row) for row in rows}
    for position, reference in enumerate(references):
        for row in rows:
            shown = reference if row.strengths else None
            for number, template in enumerate(prompts):
                prompt = template.replace(SUBJECT, reference.subject)
                for draw in range(config.plan.per_pair):
                    seed = config.plan.seed + _seed(template) + draw
                    depends = {**common, **of_row[row], "prompt": prompt, "reference": shown and shown.digest, "seed": seed}
                    yield Comparison(DrawingJob(row, prompt, shown, seed, key_of(depends)), position, number, draw)


def key_of(settings: Mapping[str, Any]) -> str:
    """A short name for everything in ``settings``."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]


def sha256_of(path: str | Path) -> str:
    """Of a file; of a folder, over the names and digests of the weights and configurations in it."""
    path = Path(path)
    if not path.is_dir():
        return sha256_of_file(path)
    inside = [f"{file.relative_to(path).as_posix()} {sha256_of_file(file)}" for file in visible(path.rglob("*"))
              if file.suffix.lower() in _WEIGHTS and file.is_file()]
    return hashlib.sha256("\n".join(inside).encode()).hexdigest()


def _row_settings(config: EvalConfig, files: Files, row: ResultRow) -> dict[str, Any]:
    if not row.strengths:
        return {}
    modules = [[digest, strength] for digest, strength in zip(files.modules.values(), row.strengths, strict=True) if strength]
    # pictures from before there was a choice keep their names; one module is the same in all ways
    adding = {} if config.modules.adding == BLOCKS or len(modules) < 2 else {"adding": config.modules.adding}
    return {**adding, "modules": modules, "encoders": sorted(files.encoders.values()), "mask": config.references.mask,
            "open_clip_model": config.encoder.open_clip_model}


def _seed(prompt: str) -> int:
    return int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
