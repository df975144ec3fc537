"""A run's first updates, done to see that they work and how long they take: on few of its pictures, in a folder that goes."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files.loading_words import loading_in_words
from .acceleration import new_accelerator, new_device
from .config import TrainConfig
from .examples import Example
from .losses import TimestepBuckets
from .memory import Needed, needed, resident_bytes
from .own_latents import prompts_of
from .parts import load_parts, loaded_files, prepare_precision
from .progress import encoding_progress, progress_of
from .runs import begin_run, encoded
from .shards import Processes

_UPDATES = 2  # the first one also fills caches of the device


@dataclass(frozen=True)
class Tried:
    """What was found.

    Args:
        update_seconds: of one update.
        reading_seconds: of one of the first updates, of a run that begins by reading; else 0.
        encoding_seconds: of all pictures and texts, before the first one.
        encoding_bytes: of this process when all is encoded, with every model loaded.
        memory: what updates need, by type of the frozen weights.
        peak_bytes: the most that was in use on a GPU; 0 on a CPU.
    """

    update_seconds: float
    reading_seconds: float
    encoding_seconds: float
    encoding_bytes: int
    memory: dict[str, Needed]
    peak_bytes: int


def tried(
    config: TrainConfig, examples: Sequence[Example], say: Callable[[str], None], bars: bool = False, device: str = "",
) -> Tried:
    """The run's own code on its first pictures, nothing of it kept.

    Args:
        say: told what is done, in lines, as with models of true sizes it takes minutes on a CPU.
        bars, device: as `runs.run` takes them.
    Raises:
        EmmaError: what would have stopped the run.
    """
    some = list(examples[:2 * config.train.batch])
    with tempfile.TemporaryDirectory() as folder:
        small = _small(config, Path(folder))
        small, dtype = prepare_precision(small, new_device(device == "cpu"))
        accelerator = new_accelerator(small.train.precision, device == "cpu")
        reading = min(small.teacher.reading, _UPDATES)
        count = reading + _UPDATES
        say(f"trial: {count} updates on {len(some)} pictures; "
            f"{loading_in_words(loaded_files(small)) or 'loading the models'}")
        parts = load_parts(small, dtype, accelerator.device)
        started = time.monotonic()
        data, *_ = encoded(small, parts, some, Path(folder), Processes(), encoding_progress(say, bars))
        encoding = (time.monotonic() - started) * len(examples) / len(some)
        loaded = resident_bytes()
        trainer = begin_run(small, parts, data, accelerator, Path(folder))
        kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
        memory = {name: needed(trainer, kind) for name, kind in kinds.items()}
        seconds = []
        with progress_of("trial update", count, 0, say, bars) as progress:
            for _ in range(count):
                started = time.monotonic()
                trainer.update(TimestepBuckets())
                seconds.append(time.monotonic() - started)
                progress.update(1)
        peak = torch.cuda.max_memory_allocated() if accelerator.device.type == "cuda" else 0
    return Tried(seconds[-1], seconds[reading - 1] if reading else 0.0, encoding, loaded, memory, peak)


def _small(config: TrainConfig, folder: Path) -> TrainConfig:
    """The same run with a few prompts, in another folder."""
    teacher = config.teacher
    if teacher.own_latents:
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(prompts_of(teacher)[:2]), encoding="utf-8")
        teacher = dataclasses.replace(teacher, prompts=str(prompts), samples=1)
    teacher = dataclasses.replace(teacher, reading=min(teacher.reading, _UPDATES))  # both kinds of updates are tried
    return dataclasses.replace(config, teacher=teacher, output=dataclasses.replace(config.output, folder=str(folder)),
                               data=dataclasses.replace(config.data, cache=""))
