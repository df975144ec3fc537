"""Results: means with intervals, the table, the settings and models they belong to, and a sheet of the first pairs.

Shapes: R references, P prompts, K draws, N resamples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..drawing.contact_sheet import SheetRow, draw_contact_sheet
from ..files.writing import write_text
from .config import ResultRow
from .plan import Comparison
from .playground_scorers import FACE, LOOK
from .references import ReferencePicture
from .scorers import CLIP_I, CLIP_T, DINO

RESAMPLES, CONFIDENCE = 2000, 0.95
COLUMNS = (CLIP_T, CLIP_I, DINO, LOOK, FACE)
# what the paper's tables show of each protocol
HEADLINE = {"style": (CLIP_T, CLIP_I), "portrait": (CLIP_T, DINO), "object": (CLIP_T, DINO)}
_SHEET_ROWS, _LONGEST_LABEL = 8, 90
_NOTE = ("Scores are plain cosines. The literature's CLIP score is 100 max(cos, 0) or 2.5 max(cos, 0): compare numbers only "
         "where the scale, the scoring model, the prompts and the references are the same.")


@dataclass(frozen=True)
class Interval:
    """A mean, and the bounds of its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


def crossed_interval(score_RPK: np.ndarray, groups: Sequence[str], seed: int = 0) -> Interval:
    """A two-way bootstrap: groups of references and prompts are both drawn anew, with replacement, independently.

    Every reference is crossed with every prompt, so pictures that share a reference, or a prompt, succeed and fail together:
    resampling pictures would claim too narrow an interval. A resample draws as many groups as there are, with all references
    of each (a group is a subject, a style, or a COCO picture), and as many prompts as there are; its mean is over all their
    pictures, each as often as its group and its prompt were drawn together. The noise of a prompt comes with the prompt. (The
    "pigeonhole" bootstrap for crossed random effects, Owen 2007.)

    Args:
        score_RPK: every reference with every prompt.
        groups: of the references.
        seed: of the draws.
    """
    names = sorted(set(groups))
    position_R = np.array([names.index(group) for group in groups])
    score_RP = score_RPK.mean(2)
    chance = np.random.default_rng(seed)
    group_NG = _times_drawn(chance.integers(len(names), size=(RESAMPLES, len(names))), len(names))
    prompt_NP = _times_drawn(chance.integers(score_RP.shape[1], size=(RESAMPLES, score_RP.shape[1])), score_RP.shape[1])
    reference_NR = group_NG[:, position_R]
    sums_N = ((reference_NR @ score_RP) * prompt_NP).sum(1)
    means_N = sums_N / (reference_NR.sum(1) * prompt_NP.sum(1))
    low, high = np.quantile(means_N, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(score_RP.mean()), float(low), float(high))


def results(
    found: Mapping[str, Mapping[str, np.ndarray]], compared: Sequence[Comparison], references: Sequence[ReferencePicture],
) -> dict[str, dict[str, Any]]:
    """Row name -> {pictures, scores}: n counts pictures, which text only compares with every reference."""
    groups = [reference.group for reference in references]
    pictures: dict[str, set[str]] = {}
    for one in compared:
        pictures.setdefault(one.job.row.name, set()).add(one.job.key)
    return {row: {"pictures": len(pictures[row]),
                  "scores": {column: vars(crossed_interval(of_row[column], groups)) for column in COLUMNS if column in of_row}}
            for row, of_row in found.items()}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown; a column for each score that was computed."""
    columns = [column for column in COLUMNS if any(column in row["scores"] for row in rows.values())]
    lines = ["| | " + " | ".join(columns) + " | n |", "| --- |" + " --- |" * len(columns) + " --- |"]
    for name, row in rows.items():
        cells = [_cell(row["scores"][column]) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['pictures']} |")
    return "\n".join(lines)


def write_results(folder: Path, report: Mapping[str, Any], settings: str) -> str:
    """results.json, and results.md with the settings as text; returns the table."""
    write_text(folder / "results.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    shown = table(report["rows"])
    plan, counts = report["settings"]["plan"], report["counts"]
    in_paper = " and ".join(HEADLINE[plan["protocol"]])
    paragraphs = [
        f"# Evaluation: {plan['protocol']}", shown,
        f"{counts['references']} references in {counts['groups']} groups, {counts['prompts']} prompts, pictures of each pair: "
        f"{plan['per_pair']}; n counts pictures. The paper's table of this protocol shows {in_paper}.",
        f"In brackets: {CONFIDENCE:.0%} bootstrap intervals over groups of references and prompts, crossed. Few groups or few "
        "prompts make them too narrow.", _NOTE, *report["notes"], "## Models",
        "\n".join(["| | | SHA-256 |", "| --- | --- | --- |",
                   *(f"| {one['role']} | {one['name']} | {one['sha256']} |" for one in report["models"])]),
        "## Settings", f"```toml\n{settings.strip()}\n```",
    ]
    write_text(folder / "results.md", "\n\n".join(paragraphs) + "\n")
    return shown


def draw_sheet(
    compared: Sequence[Comparison], references: Sequence[ReferencePicture], rows: Sequence[ResultRow], folder: Path,
    footer: str,
) -> Image.Image:
    """The first pairs: the reference, and its first picture in each row."""
    first = {(one.reference, one.prompt, one.job.row.name): one.job for one in compared if one.draw == 0}
    prompts = 1 + max(one.prompt for one in compared)
    pairs = [(reference, (reference + shift) % prompts) for shift in range(prompts) for reference in range(len(references))]
    sheet_rows = []
    for reference, prompt in pairs[:_SHEET_ROWS]:
        jobs = [first[reference, prompt, row.name] for row in rows]
        pictures = [references[reference].picture(), *(Image.open(folder / f"{job.key}.png", formats=("PNG",)) for job in jobs)]
        label = f'{references[reference].name}: "{jobs[-1].prompt}"'
        sheet_rows.append(SheetRow(label[:_LONGEST_LABEL], [_square(picture) for picture in pictures]))
    return draw_contact_sheet(["reference", *(row.title for row in rows)], sheet_rows, 1, footer)


def _times_drawn(drawn_NX: np.ndarray, kinds: int) -> np.ndarray:
    """(N, kinds): how often each was drawn."""
    times = np.zeros((len(drawn_NX), kinds))
    np.add.at(times, (np.arange(len(drawn_NX))[:, None], drawn_NX), 1)
    return times


def _cell(score: Mapping[str, float]) -> str:
    return f"{score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f})"


def _square(picture: Image.Image) -> torch.Tensor:
    """(S, S, 3) in [0, 1], padded white."""
    side = max(picture.size)
    padded = ImageOps.pad(picture.convert("RGB"), (side, side), color="white")
    return torch.from_numpy(np.array(padded, dtype=np.float32) / 255)
