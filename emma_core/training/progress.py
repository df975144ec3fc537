"""How far a run is: bars in a terminal, lines now and then where output goes into a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS_BETWEEN = 15.0
_LEAST_SECONDS = 1.0


class Lines:
    """Progress of one piece of work in lines, the first and the last among them.

    Args:
        what: is done.
        total, done: how many there are, and were done before.
        say: told each line.
        clock: seconds.
    """

    def __init__(self, what: str, total: int, done: int, say: Callable[[str], None], clock=time.monotonic):
        self._what, self._total, self._say, self._clock = what, total, say, clock
        self._before = self.n = done
        self._began = self._told = clock()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *found) -> None:
        pass

    def update(self, count: int, note: str = "") -> None:
        """``count`` more are done."""
        self.n += count
        now = self._clock()
        if self.n >= self._total or self.n == self._before + 1 or now - self._told >= SECONDS_BETWEEN:
            self._told = now
            self._say(f"{self._what} {self.n} of {self._total}{f', {note}' if note else ''}{self._pace(now - self._began)}")

    def note(self, text: str) -> None:
        """What takes its time beside."""
        self._say(text)

    def _pace(self, seconds: float) -> str:
        """Seconds for each, and what is left; nothing while that would be a guess."""
        if seconds < _LEAST_SECONDS:
            return ""
        each = seconds / (self.n - self._before)
        return f", {each:.2g} s each" + (f", {duration(each * (self._total - self.n))} left" if self.n < self._total else "")

    def close(self) -> None:
        """Nothing stays open."""


class Bar:
    """The same as a bar of tqdm."""

    def __init__(self, what: str, total: int, done: int):
        from tqdm import tqdm

        self._bar = tqdm(total=total, initial=done, desc=what, unit="", dynamic_ncols=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *found) -> None:
        self.close()

    @property
    def n(self) -> int:
        return self._bar.n

    def update(self, count: int, note: str = "") -> None:
        """``count`` more are done."""
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)

    def note(self, text: str) -> None:
        """Above the bar: what takes its time beside."""
        self._bar.write(text)

    def close(self) -> None:
        self._bar.close()


def progress_of(what: str, total: int, done: int, say: Callable[[str], None], bars: bool) -> Bar | Lines:
    """A bar, or lines told to ``say``."""
    return Bar(what, total, done) if bars else Lines(what, total, done, say)


def encoding_progress(say: Callable[[str], None], bars: bool) -> Callable[[str, int, int], None]:
    """For `prepare`: called with what is encoded, how many are done, how many there are."""
    shown: dict[str, Bar | Lines] = {}

    def tell(what: str, done: int, total: int) -> None:
        if total and what not in shown:
            shown[what] = progress_of(f"encoding {what}", total, 0, say, bars)
        if what in shown and done > shown[what].n:
            shown[what].update(done - shown[what].n)
            if done >= total:
                shown.pop(what).close()

    return tell


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
