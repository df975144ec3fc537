"""Ctrl-C and SIGTERM during training: taken between updates, so that what is saved is what an update left."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TOLD = {1: "stopping: this update is finished and saved first",
         2: "still finishing and saving; once more leaves without, and what was learnt since the last checkpoint is lost"}
_PATIENCE = len(_TOLD)


class Interrupts:
    """Inside, signals to end are noted and not raised; the third one is raised at once.

    In another thread than the main one, as in ComfyUI, nothing is changed: signals are not this run's there.
    """

    def __init__(self):
        self.count = 0
        self._before: dict[signal.Signals, object] = {}

    @property
    def abandoned(self) -> bool:
        """Whether the third one left what was going on half done."""
        return self.count > _PATIENCE

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in _SIGNALS
                            if signal.getsignal(number) not in (None, signal.SIG_IGN)}
        return self

    def __exit__(self, kind: type[BaseException] | None, found: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.abandoned:
            raise KeyboardInterrupt
        print(_TOLD[self.count], file=sys.stderr, flush=True)
