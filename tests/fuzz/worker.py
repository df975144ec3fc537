"""A process that reads damaged files as they are named to it, and says what came of each: one JSON line for one.

It tells on itself: code that a file has run, memory beyond what the file accounts for.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen",
              "builtins.input", "webbrowser.open")
TIMES, ROOM = 3, 200_000_000  # memory that a file may take: so many times its bytes, and so many bytes more


class RanCode(BaseException):
    """A file has started something; no loader catches it."""


def main() -> None:
    """Answer until there is nothing left to answer."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "core"), str(ROOT / "tests" / "lab")]
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr
    from targets import TARGETS

    watched = [False]
    sys.addaudithook(lambda event, _: _refuse(event) if watched[0] and event.startswith(_FORBIDDEN) else None)
    for line in sys.stdin:
        job = json.loads(line)
        target, folder = TARGETS[job["target"]], Path(job["folder"])
        if job["make"]:
            target.make(folder)
            answer = {"files": target.files}
        else:
            watched[0] = job["watched"]
            answer = _read(target.load, folder)
            watched[0] = False
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _refuse(event: str) -> None:
    raise RanCode(event)


def _read(load, folder: Path) -> dict[str, object]:
    from emma_core.errors import EmmaError

    allowed = ROOM + TIMES * sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    before, begun = _forget_peak(), time.process_time()
    try:
        load(folder)
        kind, told = "loaded", ""
    except EmmaError as found:
        kind, told = "refused", str(found)
    except RanCode as found:
        kind, told = "ran code", str(found)
    except BaseException as found:
        where = traceback.extract_tb(found.__traceback__)[-1]
        kind, told = "foreign exception", f"{type(found).__name__}: {str(found)[:300]} ({where.filename}:{where.lineno})"
    taken = _peak() - before
    if taken > allowed:
        kind, told = "memory", f"{taken // 1_000_000} MB where {allowed // 1_000_000} are allowed"
    return {"kind": kind, "told": told, "taken": taken, "seconds": time.process_time() - begun}


def _forget_peak() -> int:
    """The memory in use, from which the peak counts from now on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # no Linux: the memory is not measured
        return 0
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:") if os.path.exists("/proc/self/clear_refs") else 0


def _status(name: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
