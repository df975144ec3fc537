"""Runs the tests: core in `.venv`, then each ComfyUI in a process of its own; adds up what pytest reports."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .environment import ROOT, ensure_base_environment, say
from .hosts import Host, find_hosts, host_python
from .server import host_environment

CORE_TESTS = ROOT / "tests" / "core"
HOST_TESTS = ROOT / "tests" / "host"
HOST_TEST_NEEDS = ("torch", "aiohttp", "einops", "comfyui_frontend_package", "pytest", "pytest_timeout")
NO_HOST_LINE = "HOST TESTS SKIPPED: NO COMFYUI FOUND (set COMFYUI_PATH to a ComfyUI folder, or pass --comfyui DIR)"
PYTEST_NO_TESTS = 5


@dataclass(frozen=True)
class SuiteResult:
    """What one pytest process reported."""

    label: str
    passed: int
    failed: int
    skipped: int
    exit_status: int
    duration_s: float = 0.0

    @property
    def counts(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def run_tests(named_hosts: Sequence[str], pytest_arguments: Sequence[str], slow: bool = False) -> int:
    """All tests, or those that `pytest_arguments` choose, then the slow core tests if `slow`.

    Prints a summary and returns the exit status.
    """
    hosts = find_hosts(named_hosts)
    choice = split_arguments(pytest_arguments)
    python = ensure_base_environment()
    results, wants_host = [], choice.host_paths or not choice.core_paths
    if choice.core_paths or not choice.host_paths:
        results.append(run_core(python, choice))
    for host in hosts if wants_host else ():
        results.append(run_host(host, choice))
    if slow:
        results.append(run_core(python, choice, slow=True))
    say("\n" + "=" * 100)
    for result in results:
        say(f"{result.label}: {result.counts} ({result.duration_s:.0f} s)")
    for complaint in complaints(results, chosen=bool(pytest_arguments)):
        say(complaint)
    if wants_host and not hosts:
        say(NO_HOST_LINE)
    say(total_line(results))
    return 1 if complaints(results, chosen=bool(pytest_arguments)) else 0


@dataclass(frozen=True)
class Choice:
    """pytest's arguments, the paths among them sorted by suite."""

    core_paths: tuple[str, ...]
    host_paths: tuple[str, ...]
    options: tuple[str, ...]


def split_arguments(arguments: Sequence[str]) -> Choice:
    """Sort out the arguments that name tests of one suite; `path::test` counts as its path, made absolute."""
    core, host, options = [], [], []
    for argument in arguments:
        path, separator, test = argument.partition("::")
        absolute = Path(os.path.abspath(path))
        if absolute.exists() and absolute.is_relative_to(CORE_TESTS):
            core.append(f"{absolute}{separator}{test}")
        elif absolute.exists() and absolute.is_relative_to(HOST_TESTS):
            host.append(f"{absolute}{separator}{test}")
        else:
            options.append(argument)
    return Choice(tuple(core), tuple(host), tuple(options))


def run_core(python: Path, choice: Choice, slow: bool = False) -> SuiteResult:
    """The tests that need no ComfyUI: those that pyproject.toml does not leave out, or the slow ones alone."""
    # Last, as the last -m counts.
    arguments = [*(choice.core_paths or (str(CORE_TESTS),)), *choice.options, *(("-m", "slow") if slow else ())]
    environment = {"OMP_WAIT_POLICY": "passive", "PYTHONUTF8": "1", **os.environ}
    return run_pytest("core, slow" if slow else "core", python, arguments, ROOT, environment)


def run_host(host: Host, choice: Choice) -> SuiteResult:
    """The host tests in one ComfyUI."""
    python = host_python(host, HOST_TEST_NEEDS)
    arguments = [*(choice.host_paths or (str(HOST_TESTS),)), *choice.options]
    environment = {"OMP_NUM_THREADS": "1", **host_environment(), "EMMA_TEST_HOST": str(host.path)}
    return run_pytest(host.label, python, arguments, HOST_TESTS, environment)


def run_pytest(
    label: str, python: Path, arguments: Sequence[str], folder: Path, environment: dict[str, str]
) -> SuiteResult:
    """One pytest process, its output shown as it comes."""
    say(f"\n===== {label}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="emma-test-") as report_folder:
        report = Path(report_folder) / "report.xml"
        command = [str(python), "-m", "pytest", f"--junitxml={report}", *arguments]
        exit_status = subprocess.run(command, cwd=folder, env=environment).returncode
        return read_report(label, report, exit_status, time.monotonic() - started)


def read_report(label: str, report: Path, exit_status: int, duration_s: float) -> SuiteResult:
    """The counts in pytest's JUnit file; a process that left none counts as one failure."""
    if not report.is_file():
        return SuiteResult(label, 0, 1, 0, exit_status or 1, duration_s)
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for key in totals:
            totals[key] += int(suite.get(key, 0))
    failed = totals["failures"] + totals["errors"]
    passed = max(totals["tests"] - failed - totals["skipped"], 0)
    return SuiteResult(label, passed, failed, totals["skipped"], exit_status, duration_s)


def complaints(results: Sequence[SuiteResult], chosen: bool) -> list[str]:
    """Why the run failed, a line each. `chosen`: the user picked tests, so that a suite may be empty."""
    lines = []
    for result in results:
        if result.failed or result.exit_status not in (0, PYTEST_NO_TESTS):
            lines.append(f"FAILED: {result.label} (pytest exit status {result.exit_status})")
        elif not result.passed and not chosen:
            lines.append(f"FAILED: {result.label}: none of its tests ran to the end ({result.counts})")
    if chosen and not any(result.passed or result.failed for result in results):
        lines.append("FAILED: no test ran; no test matches the arguments (those marked slow need --slow)")
    return lines


def total_line(results: Sequence[SuiteResult]) -> str:
    """The plain closing line."""
    passed, failed, skipped = (sum(getattr(r, key) for r in results) for key in ("passed", "failed", "skipped"))
    return f"{passed} passed, {failed} failed, {skipped} skipped"
