"""Damaged files, read in processes of their own, which are watched and replaced when they hang or die."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from mutations import mutated

_WORKER = Path(__file__).with_name("worker.py")
MOST_SECONDS = 5.0  # of computing, for one file
_MOST_WAITING = 300.0  # for one file that takes no computing: a machine that does other things may take long
_LONGEST_START = 600.0
_POLL = 0.05
_ODD_FILES = 0.01  # share of inputs that are no plain file
GOOD = ("loaded", "refused")


@dataclass(frozen=True)
class Outcome:
    """What came of one input: "loaded", "refused", or what must not be; the seconds it computed, where it is kept."""

    target: str
    number: int
    kind: str
    told: str
    seconds: float
    taken: int
    kept: Path | None = None

    def __str__(self) -> str:
        return f"{self.target} #{self.number}: {self.kind}: {self.told} ({self.seconds:.1f} s; {self.kept})"


class Worker:
    """A process that reads files; it is started again when it had to be ended."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._process: subprocess.Popen | None = None

    def ask(self, job: dict[str, Any], most_seconds: float = MOST_SECONDS) -> dict[str, Any]:
        """Its answer, or why there was none."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        begun, spent = time.monotonic(), self._spent()
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        while True:
            try:
                line = self._answers.get(timeout=_POLL)
            except queue.Empty:
                computed, waited = self._spent() - spent, time.monotonic() - begun
                if computed <= most_seconds and waited <= max(_MOST_WAITING, most_seconds):
                    continue
                self.end()
                told = f"{computed:.1f} s of computing, {waited:.1f} s in all"
                return {"kind": "hung", "told": told, "taken": 0, "seconds": computed}
            if line:
                return json.loads(line)
            return {"kind": "died", "told": f"exit status {self._process.wait()}", "taken": 0, "seconds": 0.0}

    def end(self) -> None:
        """Stop the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUTF8": "1"}
        with open(self._folder / "worker.log", "a") as log:
            self._process = subprocess.Popen([sys.executable, str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                             stderr=log, text=True, cwd=self._folder, env=environment)
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(self._process, self._answers), daemon=True).start()

    @staticmethod
    def _listen(process: subprocess.Popen, answers: queue.Queue[str]) -> None:
        for line in process.stdout:
            answers.put(line)
        answers.put("")

    def _spent(self) -> float:
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return times.user + times.system


class Fuzzer:
    """Makes inputs and has them read, one after the other; the same seed makes the same inputs.

    Args:
        folder: to work in; what must not be is kept there.
        seed: of everything random.
    """

    def __init__(self, folder: Path, seed: int):
        self._folder, self._seed, self._worker = folder, seed, Worker(folder)
        self._files: dict[str, tuple[str, ...]] = {}

    def __enter__(self) -> Fuzzer:
        return self

    def __exit__(self, *found) -> None:
        self._worker.end()

    def outcomes(self, target: str, count: int) -> Iterator[Outcome]:
        """Of so many inputs; the first is the valid file itself, which must be loaded."""
        whole = self._whole(target)
        first = self._read(target, 0, whole, watched=False)
        yield first if first.kind == "loaded" else self._as_fault(first, target)
        for number in range(1, count):
            folder = self._folder / "input"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            self._damage(target, number, folder)
            yield self._read(target, number, folder, watched=True)

    def _as_fault(self, first: Outcome, target: str) -> Outcome:
        return Outcome(target, 0, "valid file not loaded", f"{first.kind}: {first.told}", first.seconds, first.taken)

    def _whole(self, target: str) -> Path:
        whole = self._folder / "whole" / target.replace(" ", "-")
        if not whole.exists():
            whole.mkdir(parents=True)
            answer = self._worker.ask({"target": target, "folder": str(whole), "make": True}, _LONGEST_START)
            self._files[target] = tuple(answer["files"])
        return whole

    def _damage(self, target: str, number: int, folder: Path) -> None:
        chance = random.Random(f"{self._seed} {target} {number}")
        path = folder / chance.choice(self._files[target])
        if chance.random() < _ODD_FILES:
            _no_plain_file(path, chance)
            return
        path.write_bytes(mutated(path.read_bytes(), path.suffix, chance))

    def _read(self, target: str, number: int, folder: Path, watched: bool) -> Outcome:
        source = folder
        if not watched:  # what is read may be written to, too
            source = self._folder / "input"
            shutil.rmtree(source, ignore_errors=True)
            shutil.copytree(folder, source)
        limit = MOST_SECONDS if watched else _LONGEST_START
        answer = self._worker.ask({"target": target, "folder": str(source), "make": False, "watched": watched}, limit)
        kind = answer["kind"]
        if (self._folder / "ran_code").exists():
            kind = "ran code"
            (self._folder / "ran_code").unlink()
        kept = None if kind in GOOD else self._keep(target, number, source)
        return Outcome(target, number, kind, answer["told"], answer["seconds"], answer["taken"], kept)

    def _keep(self, target: str, number: int, source: Path) -> Path:
        name = hashlib.sha256(target.encode()).hexdigest()[:8]
        kept = self._folder / "kept" / f"{name}-{number}"
        shutil.copytree(source, kept, symlinks=True, dirs_exist_ok=True, ignore=_no_pipes)
        return kept


def _no_pipes(folder: str, names: list[str]) -> list[str]:
    paths = {name: os.path.join(folder, name) for name in names}
    return [name for name, path in paths.items() if not (os.path.isfile(path) or os.path.isdir(path))]


def _no_plain_file(path: Path, chance: random.Random) -> None:
    path.unlink()
    kind = chance.randrange(4 if hasattr(os, "mkfifo") else 2)
    if kind == 0:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(path.name)
