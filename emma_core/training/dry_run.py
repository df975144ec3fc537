"""`train --dry-run`: what would be trained on, everything that is wrong, and what the run will take."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import EmmaError
from .config import TrainConfig
from .examples import describe
from .foretold import problems_of
from .memory import in_words, resident_bytes
from .sizes import cache_bytes, checkpoint_bytes, learning_numbers
from .trial import Tried, tried


def dry_run(config: TrainConfig, say: Callable[[str], None], bars: bool = False, device: str = "") -> bool:
    """Tell what is found as soon as it is; whether the run can start.

    Args:
        config: resolved.
        say: told the report, in lines, and how far the trial is.
        bars, device: as `runs.run` takes them.
    """
    begun_bytes = resident_bytes()
    examples, problems = problems_of(config)
    say(describe(examples, problems, config.data))
    checkpoints = checkpoint_bytes(config, learning_numbers(config))
    say(f"disk: about {cache_bytes(config, examples) / 1e9:.2f} GB of cache, {checkpoints / 1e9:.2f} GB of checkpoints")
    stops = any(problem.fatal for problem in problems)
    if not stops:
        try:
            found = tried(config, examples, say, bars, device)
            for line in (*_time(config, found), *in_words(found.memory, begun_bytes)):
                say(line)
            say(f"memory of this process while data are encoded, measured in the trial: {found.encoding_bytes / 1e9:.1f} GB")
            if found.peak_bytes:
                say(f"memory on this card, measured in the trial: {found.peak_bytes / 1e9:.1f} GB")
        except EmmaError as fault:
            say(f"  stop  trial: {fault}")
            stops = True
    say("this run cannot start: see `stop` above" if stops else "this run can start")
    return not stops


def _time(config: TrainConfig, found: Tried) -> list[str]:
    steps, reading = config.train.steps, min(config.teacher.reading, config.train.steps)
    seconds = found.update_seconds * (steps - reading) + found.reading_seconds * reading + found.encoding_seconds
    each = f"{found.update_seconds:.2f} s an update in a trial on this machine"
    if reading:
        each = f"{found.reading_seconds:.2f} s an update of reading, {each}; {reading} of {steps} read"
    return [f"time: {each}; {steps} of them and encoding the data take about {seconds / 3600:.1f} hours"]
