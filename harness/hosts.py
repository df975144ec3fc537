"""Finds ComfyUI folders and a Python that runs each of them."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .environment import (
    BASE_VENV,
    ROOT,
    STAMP_NAME,
    InstallStep,
    SetupError,
    create_venv,
    ensure_base_environment,
    ensure_environment,
    python_of,
    say,
)

HOST_VENVS = ROOT / ".venv-hosts"
TORCH_PACKAGES = ("torch", "torchvision", "torchaudio")


@dataclass(frozen=True)
class Host:
    """One ComfyUI folder."""

    path: Path
    version: str

    @property
    def label(self) -> str:
        return f"ComfyUI {self.version} ({self.path})"


def read_host(folder: Path) -> Host | None:
    """The ComfyUI in this folder, or None if it holds none."""
    version_file = folder / "comfyui_version.py"
    if not (version_file.is_file() and (folder / "main.py").is_file()):
        return None
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", version_file.read_text(encoding="utf-8"))
    return Host(folder.resolve(), found.group(1) if found else "of unknown version")


def find_hosts(named: Sequence[str] = (), root: Path = ROOT) -> list[Host]:
    """Every distinct ComfyUI, in search order: the `named` folders alone if there are any, else COMFYUI_PATH (several
    separated by the system's path separator), the ComfyUI the pack is installed in, ~/ComfyUI*.

    Raises SetupError for a folder that the user named and that holds no ComfyUI.
    """
    asked_for = list(named) or [entry for entry in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if entry]
    hosts = [_require_host(Path(entry).expanduser()) for entry in asked_for]
    if not named:
        hosts += [host for host in map(read_host, _likely_folders(root)) if host]
    return list(dict.fromkeys(hosts))


def _likely_folders(root: Path) -> Iterator[Path]:
    if root.parent.name == "custom_nodes":
        yield root.parent.parent
    yield from sorted(Path.home().glob("ComfyUI*"))


def peer_roots(host_path: Path) -> list[Path]:
    """Folders that may hold other node packs, in search order: COMFYUI_PEERS, the host's custom_nodes, ~/peers."""
    named = [Path(entry) for entry in os.environ.get("COMFYUI_PEERS", "").split(os.pathsep) if entry]
    return [*named, host_path / "custom_nodes", Path.home() / "peers"]


def _require_host(folder: Path) -> Host:
    host = read_host(folder)
    if host is None:
        raise SetupError(
            f"No ComfyUI in {folder}: its main.py and comfyui_version.py (ComfyUI 0.3.64 or newer) were not found.\n"
            f"Set COMFYUI_PATH, or --comfyui, to the folder that holds ComfyUI's main.py."
        )
    return host


def host_python(host: Host, needs: Iterable[str]) -> Path:
    """An interpreter that runs this host and imports `needs`: the host's own, else an environment made for it."""
    needs = tuple(needs)
    for python in own_pythons(host):
        missing = missing_modules(python, needs)
        if not missing:
            return python
        say(f"{host.label}: not using {python}, which lacks {', '.join(missing)}")
    return ensure_host_environment(host)


def own_pythons(host: Host) -> list[Path]:
    """Interpreters that belong to the host: COMFYUI_PYTHON, a venv inside it, the portable build's."""
    chosen = os.environ.get("COMFYUI_PYTHON")
    if chosen:
        if not Path(chosen).is_file():
            raise SetupError(f"COMFYUI_PYTHON is {chosen}, which is no file: set it to ComfyUI's python, or unset it.")
        return [Path(chosen)]
    likely = [python_of(host.path / "venv"), python_of(host.path / ".venv")]
    likely.append(host.path.parent / "python_embeded" / "python.exe")
    return [python for python in likely if python.is_file()]


def missing_modules(python: Path, modules: Sequence[str]) -> list[str]:
    """Those of `modules` that this interpreter cannot find."""
    code = "import importlib.util, sys; print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])"
    finished = subprocess.run([str(python), "-c", code, *modules], capture_output=True, text=True)
    return finished.stdout.split() if finished.returncode == 0 else list(modules)


def ensure_host_environment(host: Host) -> Path:
    """An environment over `.venv` with what this host asks for; its pins win over the packages of `.venv`."""
    base_python = ensure_base_environment()
    name = f"{host.path.name}-{hashlib.sha256(str(host.path).encode()).hexdigest()[:8]}"
    venv = HOST_VENVS / name
    HOST_VENVS.mkdir(exist_ok=True)
    requirements, constraints = HOST_VENVS / f"{name}.txt", HOST_VENVS / f"{name}-torch.txt"
    asked_text = (host.path / "requirements.txt").read_text(encoding="utf-8")
    requirements.write_text("\n".join([*without_torch(asked_text), "requests", ""]), encoding="utf-8")
    base_stamp = (BASE_VENV / STAMP_NAME).read_text(encoding="utf-8")
    if not constraints.is_file() or not constraints.read_text(encoding="utf-8").startswith(f"# {base_stamp}"):
        constraints.write_text("\n".join([f"# {base_stamp}", *installed_torch(base_python), ""]), encoding="utf-8")
    steps = [InstallStep(f"what {host.label} asks for", ("-r", str(requirements), "-c", str(constraints)))]
    if "torchaudio" in asked_text:
        # Its versions no longer follow torch's, and its pin would replace torch.
        steps.append(InstallStep("torchaudio", ("--no-deps", "torchaudio")))
    return ensure_environment(venv, steps, create=lambda: create_overlay(base_python, venv), depends_on=[base_stamp])


def without_torch(requirements_text: str) -> list[str]:
    """The requirement lines less torch, torchvision and torchaudio, which the base environment decides."""
    lines = requirements_text.splitlines()
    return [line for line in lines if re.split(r"[^A-Za-z0-9_-]", line.strip(), maxsplit=1)[0] not in TORCH_PACKAGES]


def installed_torch(python: Path) -> list[str]:
    """`torch==...` and `torchvision==...` as installed, for pip to keep."""
    code = "from importlib.metadata import version; print(*[f'{p}=={version(p)}' for p in ('torch', 'torchvision')])"
    finished = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    if finished.returncode != 0:
        raise SetupError(f"{BASE_VENV} lacks torch or torchvision: delete it and run the same command again.")
    return finished.stdout.split()


def create_overlay(base_python: Path, venv: Path) -> None:
    """An empty environment that sees the base environment's packages, pip and torch among them, after its own."""
    create_venv(base_python, venv, "--without-pip")
    base_folders = site_folders(base_python)
    own_folder = Path(site_folders(python_of(venv))[0])
    (own_folder / "emma-base.pth").write_text("\n".join([*base_folders, ""]), encoding="utf-8")


def site_folders(python: Path) -> list[str]:
    """Where this interpreter's packages are installed."""
    code = "import sysconfig; print(*dict.fromkeys(map(sysconfig.get_path, ('purelib', 'platlib'))), sep='\\n')"
    finished = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return finished.stdout.splitlines()
