"""What the Comfy registry would publish: validated and packed with its own command, comfy-cli, in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .environment import ROOT, InstallStep, SetupError, create_venv, ensure_environment, say
from .hosts import HOST_VENVS

REGISTRY_VENV = HOST_VENVS / "registry"
PACKED_NAME = "node.zip"  # comfy-cli's
ALL_WELL = "All validation checks passed successfully"
COMPLAINTS = ("Warning", "warnings found", "Error")


def pack(out: Path) -> str:
    """Validate and pack what git has of this folder, as it is now; returns what comfy-cli said.

    Raises SetupError if it complains of anything.
    """
    python = ensure_registry_environment()
    with tempfile.TemporaryDirectory(prefix="emma-pack-", ignore_cleanup_errors=True) as name:
        folder, home = Path(name) / "pack", Path(name) / "home"
        home.mkdir()
        copy_checkout(folder)
        said = comfy(python, "validate", folder, home)
        if ALL_WELL not in said:
            raise SetupError(f"comfy node validate does not say that all is well:\n{said}")
        said += comfy(python, "pack", folder, home)
        shutil.move(folder / PACKED_NAME, out)
    return said


def ensure_registry_environment() -> Path:
    """Make or update the environment that holds comfy-cli and nothing of ours; returns its interpreter."""
    HOST_VENVS.mkdir(exist_ok=True)
    steps = [InstallStep("the Comfy registry's command", ("-r", str(ROOT / "requirements" / "registry.txt")))]
    return ensure_environment(REGISTRY_VENV, steps, create=lambda: create_venv(Path(sys.executable), REGISTRY_VENV))


def copy_checkout(folder: Path) -> None:
    """The files that git lists, with what was changed in them, as a repository of their own: comfy-cli packs what git lists."""
    for path in tracked_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    for command in (("init", "--quiet"), ("add", "--all", "--force")):
        subprocess.run(["git", *command], cwd=folder, check=True)


def tracked_files() -> list[str]:
    """What git has of this folder and is still there. Raises SetupError outside of a checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if listed.returncode != 0:
        raise SetupError(f"{ROOT} is no git checkout, so what would be published is not known. Use a clone of the repository.")
    return [path for path in listed.stdout.split("\0") if path and (ROOT / path).is_file()]


def comfy(python: Path, command: str, folder: Path, home: Path) -> str:
    """Run `comfy node COMMAND` in a folder, without questions, telemetry or a trace in the user's own settings."""
    environment = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home), "XDG_CACHE_HOME": str(home),
                   "DO_NOT_TRACK": "1", "PYTHONUTF8": "1", "COLUMNS": "200"}
    line = [str(python), "-m", "comfy_cli", "--skip-prompt", "node", command]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace",
                          stdin=subprocess.DEVNULL)
    said = done.stdout + done.stderr
    if done.returncode != 0 or any(word in said for word in COMPLAINTS):
        raise SetupError(f"comfy node {command} complains:\n{said}")
    return said


def run_pack(out: Path) -> int:
    """The command `run.py pack`."""
    for line in pack(out).splitlines():
        say(f"    {line}")
    say(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")
    return 0
