"""What a run tells while it goes on: progress, a log of JSON lines, a drawn loss curve, TensorBoard, sample sheets."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..errors import EmmaWarning
from ..files.writing import explained, make_folder, write_picture
from .config import TrainConfig
from .log import Log
from .losses import BUCKETS
from .progress import Bar, Lines
from .samples import Sampler, Sheet
from .trainer import Trainer, UpdateReport
from .words import bucket_name

SAMPLES = "samples"  # folder of the sheets
_CURVE_PX = (760, 420)
_MARGIN_LEFT, _MARGIN_TOP, _MARGIN_RIGHT, _MARGIN_BOTTOM = 64, 34, 190, 44
_MOST_STEPS = 10**12  # of a line that is not damaged
_INK, _GRID, _PAPER = (40, 40, 40), (225, 225, 225), (255, 255, 255)
_COLOURS = ((33, 102, 172), (103, 169, 207), (120, 120, 120), (239, 138, 98), (178, 24, 43))


def sheet_name(step: int) -> str:
    """Of the file of the sheet that was drawn after an update."""
    return f"{step:08d}.png"


class Reporter:
    """Called after every update.

    Args:
        config: of the run.
        trainer: the run.
        sampler: draws sample sheets, or None.
        progress: shows each update, or None.
        ends: what ends the run where drawing raises it; all else ends the drawing of sheets alone.
    """

    def __init__(self, config: TrainConfig, trainer: Trainer, sampler: Sampler | None = None,
                 progress: Bar | Lines | None = None, ends: tuple[type[Exception], ...] = ()):
        self._ends = ends
        self._config, self._trainer, self._sampler, self._progress = config, trainer, sampler, progress
        self._drawn: Sheet | None = None
        self._sheets, self.sheet_seconds = 0, 0.0
        self.log = Log(trainer.folder / "log.jsonl")
        self._events = _tensorboard(trainer.folder) if config.report.tensorboard else None

    def __call__(self, progress: UpdateReport) -> None:
        if self._progress is not None:
            self._progress.update(1, f"loss {progress.loss:.4f}, rate {progress.rate:.2g}")
        if progress.buckets:
            self.log.write(step=progress.step, loss=round(progress.loss, 6), rate=progress.rate,
                           seconds=round(progress.seconds, 2), buckets=_rounded(progress.buckets), gates=progress.gates)
            write_picture(self._trainer.folder / "loss.png", draw_loss_curve(self.log.read()))
            self._tell_tensorboard(progress)
        if progress.gain is not None:
            self.log.write(step=progress.step, held_out={
                "gain": round(progress.gain.share, 5), "with reference": _rounded(progress.gain.shown),
                "text only": _rounded(progress.gain.plain)})
        every, last = self._config.report.sample_every, self._config.train.steps
        if every and progress.step % every == 0 and progress.step < last and self._may_draw(progress.seconds):
            self.sample()

    def _may_draw(self, seconds: float) -> bool:
        """Whether one more sheet keeps to the share of the time that sheets may take; the first one is always drawn."""
        once = self.sheet_seconds / self._sheets if self._sheets else 0.0
        return not self._sheets or self.sheet_seconds + once <= self._config.report.sample_share * (seconds + once)

    def drawn_at(self, step: int) -> Sheet | None:
        """The sheet that was drawn after this update, if one was."""
        return self._drawn if self._drawn is not None and self._drawn.step == step else None

    def sample(self) -> Sheet | None:
        """The sample sheet of now, also in the folder `samples`; None without a sampler, or where drawing failed.

        That it failed (a card whose memory training fills) is told, and ends no run: no further sheets are drawn.
        """
        if self._sampler is None or (self._drawn is not None and self._drawn.step == self._trainer.step):
            return self._drawn
        if self._progress is not None:
            self._progress.note(f"drawing the sample sheet of update {self._trainer.step}")
        started = time.monotonic()
        try:
            self._drawn = self._sampler.sheet(self._trainer)
            make_folder(self._trainer.folder / SAMPLES)
            write_picture(self._trainer.folder / SAMPLES / sheet_name(self._trainer.step), self._drawn.image())
        except self._ends:
            raise
        except Exception as found:
            self._sampler = self._drawn = None
            warnings.warn(f"no more sample sheets are drawn, as one failed: {found}. Training goes on.", EmmaWarning,
                          stacklevel=2)
        self._sheets, self.sheet_seconds = self._sheets + 1, self.sheet_seconds + time.monotonic() - started
        return self._drawn

    def _tell_tensorboard(self, progress: UpdateReport) -> None:
        if self._events is None:
            return
        with explained(self._trainer.folder / "tensorboard"):
            self._events.add_scalar("loss", progress.loss, progress.step)
            self._events.add_scalar("rate", progress.rate, progress.step)
            for index, value in enumerate(progress.buckets):
                if value is not None:
                    self._events.add_scalar(f"loss by timestep/{bucket_name(index)}", value, progress.step)
            self._events.flush()


def draw_loss_curve(lines: Sequence[dict[str, Any]]) -> Image.Image:
    """Loss over updates, one curve for each fifth of the timesteps, on a logarithmic axis."""
    known = [(line["step"], line["buckets"]) for line in lines if _is_report(line)]
    curves = [[(step, means[index]) for step, means in known if means[index]] for index in range(BUCKETS)]
    sheet = Image.new("RGB", _CURVE_PX, _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    right, bottom = _CURVE_PX[0] - _MARGIN_RIGHT, _CURVE_PX[1] - _MARGIN_BOTTOM
    points = [point for curve in curves for point in curve]
    draw.text((_MARGIN_LEFT, 10), "mean squared error by timestep", fill=_INK, font=font)
    if not points:
        return sheet
    last = max(step for step, _ in points)
    low, high = (math.log10(edge) for edge in (min(value for _, value in points), max(value for _, value in points)))
    high = high if high > low else low + 1

    def place(step: float, value: float) -> tuple[float, float]:
        share = (math.log10(value) - low) / (high - low)
        return _MARGIN_LEFT + (right - _MARGIN_LEFT) * step / last, bottom - (bottom - _MARGIN_TOP) * share

    for share in (0, 0.25, 0.5, 0.75, 1):
        value = 10 ** (low + (high - low) * share)
        height = place(0, value)[1]
        draw.line((_MARGIN_LEFT, height, right, height), fill=_GRID)
        draw.text((_MARGIN_LEFT - 6, height), f"{value:.2g}", fill=_INK, font=font, anchor="rm")
    for step in (0, last):
        draw.text((place(step, 10 ** low)[0], bottom + 6), str(step), fill=_INK, font=font, anchor="ma")
    draw.text(((_MARGIN_LEFT + right) / 2, bottom + 22), "updates", fill=_INK, font=font, anchor="ma")
    for index, curve in enumerate(curves):
        if len(curve) > 1:
            draw.line([place(*point) for point in curve], fill=_COLOURS[index], width=2)
        draw.text((right + 12, _MARGIN_TOP + 20 * index), f"timesteps {bucket_name(index)}", fill=_COLOURS[index], font=font)
    return sheet


def _is_report(line: dict[str, Any]) -> bool:
    """Whether a line of a log, which may be damaged, tells means by timestep."""
    step, means = line.get("step"), line.get("buckets")
    return (type(step) is int and 0 < step <= _MOST_STEPS and isinstance(means, list) and len(means) == BUCKETS
            and all(mean is None or (type(mean) is float and 0 <= mean < math.inf) for mean in means))


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 6) for value in values]


def _tensorboard(folder: Path):
    from torch.utils.tensorboard import SummaryWriter

    path = folder / "tensorboard"
    with explained(path):
        return SummaryWriter(str(path))
