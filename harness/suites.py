"""Runs the tests, a process each for core, lab, fuzz, each ComfyUI, and each in a browser; adds up what pytest reports."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .browser import ensure_browser_environment, find_chromium
from .environment import ROOT, ensure_base_environment, say
from .hosts import Host, find_hosts, host_python
from .registry import ensure_registry_environment
from .server import SERVER_NEEDS, host_environment

CORE_TESTS = ROOT / "tests" / "core"
LAB_TESTS = ROOT / "tests" / "lab"
FUZZ_TESTS = ROOT / "tests" / "fuzz"
HOST_TESTS = ROOT / "tests" / "host"
BROWSER_TESTS = ROOT / "tests" / "browser"
HOST_TEST_NEEDS = (*SERVER_NEEDS, "pytest", "pytest_timeout")
NO_HOST_LINE = "HOST TESTS SKIPPED: NO COMFYUI FOUND (set COMFYUI_PATH to a ComfyUI folder, or pass --comfyui DIR)"
NO_HOST_FOR_BROWSER_LINE = "BROWSER TESTS SKIPPED: NO COMFYUI FOUND"
NO_CHROMIUM_LINE = (
    "BROWSER TESTS SKIPPED: NO CHROMIUM FOUND (install one, on Debian: sudo apt install chromium; or set CHROMIUM_PATH)"
)
PYTEST_NO_TESTS = 5


@dataclass(frozen=True)
class Suite:
    """One pytest process to run."""

    label: str
    python: Path
    arguments: tuple[str, ...]
    folder: Path
    environment: dict[str, str]


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


def run_tests(named_hosts: Sequence[str], pytest_arguments: Sequence[str], slow: bool = False, jobs: int = 1) -> int:
    """All tests, or those that `pytest_arguments` choose, then the slow core tests if `slow`; `jobs` suites at a time.

    Prints a summary and returns the exit status.
    """
    hosts, chromium = find_hosts(named_hosts), find_chromium()
    choice = split_arguments(pytest_arguments)
    # Environments first: what they lack is better known now than after the other suites.
    suites = chosen_suites(choice, hosts, browser=chromium is not None)
    results = run_suites(suites, jobs)
    if slow:  # alone: it needs the memory
        results += run_suites([core_suite(ensure_base_environment(), choice, slow=True)], 1)
    say("\n" + "=" * 100)
    for result in results:
        say(f"{result.label}: {result.counts} ({result.duration_s:.0f} s)")
    for complaint in complaints(results, chosen=bool(pytest_arguments)):
        say(complaint)
    for line in skipped_suites(choice, bool(hosts), bool(chromium)):
        say(line)
    say(total_line(results))
    return 1 if complaints(results, chosen=bool(pytest_arguments)) else 0


@dataclass(frozen=True)
class Choice:
    """pytest's arguments, the paths among them sorted by suite."""

    core_paths: tuple[str, ...]
    lab_paths: tuple[str, ...]
    fuzz_paths: tuple[str, ...]
    host_paths: tuple[str, ...]
    browser_paths: tuple[str, ...]
    options: tuple[str, ...]

    def wants(self, paths: tuple[str, ...]) -> bool:
        """Whether the suite with these paths is to run: one that paths name, or all of them where none does."""
        all_paths = self.core_paths + self.lab_paths + self.fuzz_paths + self.host_paths + self.browser_paths
        return bool(paths) or not all_paths


def split_arguments(arguments: Sequence[str]) -> Choice:
    """Sort out the arguments that name tests of one suite; `path::test` counts as its path, made absolute."""
    suites, options = {folder: [] for folder in (CORE_TESTS, LAB_TESTS, FUZZ_TESTS, HOST_TESTS, BROWSER_TESTS)}, []
    for argument in arguments:
        path, separator, test = argument.partition("::")
        absolute = Path(os.path.abspath(path))
        folder = next((folder for folder in suites if absolute.exists() and absolute.is_relative_to(folder)), None)
        if folder:
            suites[folder].append(f"{absolute}{separator}{test}")
        else:
            options.append(argument)
    return Choice(*map(tuple, suites.values()), tuple(options))


def skipped_suites(choice: Choice, has_host: bool, has_chromium: bool) -> list[str]:
    """What does not run although it is wanted, a line each."""
    lines = []
    if choice.wants(choice.host_paths) and not has_host:
        lines.append(NO_HOST_LINE)
    if choice.wants(choice.browser_paths) and not (has_host and has_chromium):
        lines.append(NO_HOST_FOR_BROWSER_LINE if has_chromium else NO_CHROMIUM_LINE)
    return lines


def chosen_suites(choice: Choice, hosts: Sequence[Host], browser: bool) -> list[Suite]:
    """The suites to run, each with its environment made, the longest first."""
    python = ensure_base_environment()
    if hosts and choice.wants(choice.host_paths):
        ensure_registry_environment()
    suites = [host_suite(host, choice) for host in hosts if choice.wants(choice.host_paths)]
    if choice.wants(choice.core_paths):
        suites.append(core_suite(python, choice))
    suites += [browser_suite(host, choice) for host in hosts if browser and choice.wants(choice.browser_paths)]
    if choice.wants(choice.lab_paths):
        suites.append(bare_suite("lab", python, [*(choice.lab_paths or (str(LAB_TESTS),)), *choice.options]))
    if choice.wants(choice.fuzz_paths):
        suites.append(bare_suite("fuzz", python, [*(choice.fuzz_paths or (str(FUZZ_TESTS),)), *choice.options]))
    return suites


def core_suite(python: Path, choice: Choice, slow: bool = False) -> Suite:
    """The tests that need no ComfyUI: those that pyproject.toml does not leave out, or the slow ones alone."""
    # Last, as the last -m counts.
    arguments = [*(choice.core_paths or (str(CORE_TESTS),)), *choice.options, *(("-m", "slow") if slow else ())]
    return bare_suite("core, slow" if slow else "core", python, arguments)


def bare_suite(label: str, python: Path, arguments: Sequence[str]) -> Suite:
    """Tests that need no ComfyUI, from the repository's root."""
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUTF8": "1", **os.environ}
    return Suite(label, python, tuple(arguments), ROOT, environment)


def host_suite(host: Host, choice: Choice) -> Suite:
    """The host tests in one ComfyUI."""
    python = host_python(host, HOST_TEST_NEEDS)
    arguments = (*(choice.host_paths or (str(HOST_TESTS),)), *choice.options)
    environment = {"OMP_NUM_THREADS": "1", **host_environment(), "EMMA_TEST_HOST": str(host.path)}
    return Suite(host.label, python, arguments, HOST_TESTS, environment)


def browser_suite(host: Host, choice: Choice) -> Suite:
    """The browser tests against a server of one ComfyUI."""
    server_python, python = host_python(host, SERVER_NEEDS), ensure_browser_environment()
    arguments = (*(choice.browser_paths or (str(BROWSER_TESTS),)), *choice.options)
    environment = {
        "OMP_NUM_THREADS": "1", **host_environment(), "EMMA_TEST_HOST": str(host.path),
        "EMMA_TEST_HOST_PYTHON": str(server_python),
    }
    return Suite(f"browser: {host.label}", python, arguments, BROWSER_TESTS, environment)


def run_suites(suites: Sequence[Suite], jobs: int) -> list[SuiteResult]:
    """Every suite's result, in the order of `suites`. Where several run at a time, each line is led by its suite's name."""
    jobs = max(1, min(jobs, len(suites)))
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(partial(run_pytest, named_lines=jobs > 1), suites))


def run_pytest(suite: Suite, named_lines: bool) -> SuiteResult:
    """One pytest process, its output shown as it comes."""
    say(f"\n===== {suite.label}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="emma-test-") as report_folder:
        report = Path(report_folder) / "report.xml"
        command = [str(suite.python), "-m", "pytest", f"--junitxml={report}", *suite.arguments]
        if named_lines:
            exit_status = run_with_named_lines(command, suite)
        else:
            exit_status = subprocess.run(command, cwd=suite.folder, env=suite.environment).returncode
        return read_report(suite.label, report, exit_status, time.monotonic() - started)


def run_with_named_lines(command: Sequence[str], suite: Suite) -> int:
    """The exit status of a command, whose lines are shown behind the suite's name."""
    name = suite.label.partition(" (")[0]
    process = subprocess.Popen(command, cwd=suite.folder, env=suite.environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    try:
        for line in process.stdout or ():
            say(f"{name} | {line.rstrip()}")
        return process.wait()
    finally:
        process.kill()  # where this one was interrupted


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
