"""Virtual environments: made once, stamped, and left alone while their requirements stay the same."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parent.parent
BASE_VENV = ROOT / ".venv"
STAMP_NAME = "emma-stamp.txt"
SHOWN_PIP_LINES = ("Collecting ", "Downloading ", "Installing collected", "Successfully installed", "ERROR")
NO_NETWORK_SIGNS = ("NewConnectionError", "Temporary failure in name", "ReadTimeout", "ConnectTimeout", "getaddrinfo")


class SetupError(Exception):
    """Something the user must mend; the message says what was found, what is needed and what to do."""


@dataclass(frozen=True)
class InstallStep:
    """One `pip install`: what the user reads while it runs, and pip's arguments."""

    title: str
    pip_arguments: tuple[str, ...]

    def fingerprint(self) -> str:
        """The arguments, requirement files by name and contents: a checkout may be moved, or share its environment."""
        files = [Path(argument) for argument in self.pip_arguments if argument.endswith(".txt")]
        words = [Path(argument).name if argument.endswith(".txt") else argument for argument in self.pip_arguments]
        return "\n".join([*words, *(file.read_text(encoding="utf-8") for file in files)])


def python_of(venv: Path) -> Path:
    """The interpreter of a virtual environment, which need not exist."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def base_steps() -> list[InstallStep]:
    """What the bare machine installs: PyTorch (or EMMA_TORCH), then everything else."""
    chosen = shlex.split(os.environ.get("EMMA_TORCH", ""))
    torch = tuple(chosen) if chosen else ("-r", str(ROOT / "requirements" / "torch.txt"))
    files = [ROOT / "requirements.txt", ROOT / "requirements" / "standalone.txt", ROOT / "requirements" / "dev.txt"]
    others = tuple(part for file in files for part in ("-r", str(file)))
    return [
        InstallStep("PyTorch (with CUDA libraries on Linux: several GB, the first time only)", torch),
        InstallStep("the other packages", others),
    ]


def ensure_base_environment() -> Path:
    """Make or update `.venv`; returns its interpreter. Instant when nothing has changed."""
    return ensure_environment(BASE_VENV, base_steps(), create=lambda: create_venv(Path(sys.executable), BASE_VENV))


def ensure_environment(venv: Path, steps: Sequence[InstallStep], create, depends_on: Iterable[str] = ()) -> Path:
    """Run `create` if the environment has no interpreter and `steps` if its stamp is out of date.

    `depends_on` holds further texts whose change makes the environment out of date. Raises SetupError.
    """
    python = python_of(venv)
    if not python.exists():
        say(f"Making {venv}")
        create()
    wanted = stamp_text(venv, steps, depends_on)
    stamp = venv / STAMP_NAME
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    stamp.unlink(missing_ok=True)
    for number, step in enumerate(steps, 1):
        say(f"[{number}/{len(steps)}] Installing {step.title}")
        pip_install(python, step.pip_arguments)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def stamp_text(venv: Path, steps: Sequence[InstallStep], depends_on: Iterable[str] = ()) -> str:
    """A hash of the environment's Python version and of everything that decides what is installed."""
    config_lines = (venv / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    version_lines = [line for line in config_lines if line.startswith("version")]
    parts = [*version_lines, *(step.fingerprint() for step in steps), *depends_on]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def create_venv(python: Path, venv: Path, *options: str) -> None:
    """`python -m venv`, with an explanation where Debian and Ubuntu leave the module out."""
    command = [str(python), "-m", "venv", "--clear", *options, str(venv)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode == 0:
        return
    output = finished.stdout + finished.stderr
    if "ensurepip" in output or "No module named venv" in output:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise SetupError(
            f"This Python cannot make virtual environments: its venv module is missing.\n"
            f"On Debian or Ubuntu: sudo apt install python{version}-venv. Elsewhere: install Python from python.org.\n"
            f"Then run the same command again."
        )
    raise SetupError(explain_failure(output, venv) or f"Could not make {venv}:\n{output}")


def pip_install(python: Path, arguments: Sequence[str]) -> None:
    """Run pip, showing what it collects and downloads as plain lines. Raises SetupError."""
    command = [str(python), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
    )
    lines: list[str] = []
    for line in process.stdout or ():
        lines.append(line.rstrip())
        if line.lstrip().startswith(SHOWN_PIP_LINES):
            say("    " + line.strip()[:160])
    if process.wait() != 0:
        output = "\n".join(lines[-40:])
        reason = explain_failure(output, python.parent)
        raise SetupError(f"{reason}\n\nWhat pip said:\n{output}" if reason else f"pip failed:\n{output}")


def explain_failure(output: str, place: Path) -> str | None:
    """What to do about the failures a user can mend, recognised by what pip or venv printed."""
    if "No space left" in output or "not enough space" in output:
        free_gb = shutil.disk_usage(ROOT).free / 1e9
        return (
            f"The disk is full: {free_gb:.1f} GB free at {ROOT}; the environment takes about 7 GB on Linux, "
            f"1 to 2 GB elsewhere.\nMake room (pip cache purge frees pip's downloads), then run the same command again."
        )
    if any(sign in output for sign in NO_NETWORK_SIGNS):
        return "The package index could not be reached: check the network or proxy, then run the same command again."
    if "No matching distribution found for torch" in output:
        return (
            "The package index has no such PyTorch for this Python and system.\nName another with EMMA_TORCH, for "
            'instance EMMA_TORCH="torch>=2.4 torchvision", or use Python 3.11 to 3.13, and run the same command again.'
        )
    if "Permission denied" in output or "Access is denied" in output:
        return f"No permission to write to {place}: run this from a folder you own."
    return None


def say(line: str) -> None:
    """One progress line, at once even when the output goes to a file."""
    print(line, flush=True)
