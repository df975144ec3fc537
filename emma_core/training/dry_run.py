"""`train --dry-run`: what would be trained on, everything that is wrong, and what the run will take."""

from __future__ import annotations

from ..errors import EmmaError
from .config import TrainConfig
from .examples import Problem, describe
from .foretold import problems_of
from .memory import in_words
from .sizes import cache_bytes, checkpoint_bytes, learning_numbers
from .trial import Tried, tried


def dry_run(config: TrainConfig, device: str = "") -> tuple[str, bool]:
    """A report, and whether the run can start.

    Args:
        config: resolved.
        device: as `runs.run` takes it.
    """
    process_bytes = _process_bytes()
    examples, problems = problems_of(config)
    stops = any(problem.fatal for problem in problems)
    checkpoints = checkpoint_bytes(config, learning_numbers(config))
    lines = [f"disk: about {cache_bytes(config, examples) / 1e9:.2f} GB of cache, {checkpoints / 1e9:.2f} GB of checkpoints"]
    if not stops:
        try:
            found = tried(config, examples, device)
            lines += [*_time(config, found), *in_words(found.memory, process_bytes)]
            if found.peak_bytes:
                lines.append(f"memory on this card, measured in the trial: {found.peak_bytes / 1e9:.1f} GB")
        except EmmaError as fault:
            problems, stops = [*problems, Problem("trial", str(fault), True)], True
    lines.append("this run cannot start: see `stop` above" if stops else "this run can start")
    return "\n".join([describe(examples, problems, config.data), *lines]), not stops


def _time(config: TrainConfig, found: Tried) -> list[str]:
    hours = (found.update_seconds * config.train.steps + found.encoding_seconds) / 3600
    return [f"time: {found.update_seconds:.2f} s an update in a trial on this machine; {config.train.steps} of them and "
            f"encoding the data take about {hours:.1f} hours"]


def _process_bytes() -> int:
    """The memory of this process before it holds a model."""
    import psutil  # comes with accelerate

    return psutil.Process().memory_info().rss
