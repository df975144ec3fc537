"""The library as a Python package: a wheel that is whole, and draws where nothing else of the repository is."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emma_core.__main__ import main
from emma_core.playground import PLAYGROUND_DIR

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("emma_core", "playground", "requirements", "requirements.txt", "pyproject.toml", "README.md", "LICENSE")
DRAWN = ["generate", "man cook", "--sampling.steps", "2", "--device", "cpu", "--out"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what git has, so that nothing is written into the repository."""
    folder = tmp_path_factory.mktemp("package")
    listed = subprocess.run(["git", "ls-files", "-z", *SOURCES], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", "dist"]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` of a fresh environment that has the wheel, and what it depends on from this one."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    binaries = venv / ("Scripts" if os.name == "nt" else "bin")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([sys.executable, "-m", "pip", "--python", str(binaries / "python"), "install", "--no-deps", "--no-index",
                    str(wheel)], check=True, capture_output=True)
    return binaries


def test_a_wheel_holds_the_library_and_the_weights_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "emma_core").rglob("*.py")}
    library.add("emma_core/training/prompts.txt")
    weights = {f"emma_core/playground/weights/{path.relative_to(PLAYGROUND_DIR).as_posix()}"
               for path in PLAYGROUND_DIR.rglob("*") if path.is_file()}
    assert names == library | weights


def test_everything_that_the_library_always_imports_is_required(wheel):
    with zipfile.ZipFile(wheel) as content:
        [metadata] = (name for name in content.namelist() if name.endswith("METADATA"))
        lines = content.read(metadata).decode().splitlines()
    required = {re.split(r"[^\w.-]", line.split()[1])[0].lower().replace("_", "-") for line in lines
                if line.startswith("Requires-Dist: ")}
    distributions = packages_distributions()
    for path in (ROOT / "emma_core").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                assert {one.lower().replace("_", "-") for one in distributions[name]} & required, (path, name)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> np.ndarray:
    """Drawn by the repository."""
    folder = tmp_path_factory.mktemp("drawn")
    assert main([*DRAWN, str(folder)]) == 0
    return np.asarray(Image.open(folder / "man-cook-0.png"))


@pytest.mark.parametrize("command", [["emma"], ["python", "-m", "emma_core"]])
def test_an_installed_wheel_draws_what_the_repository_draws(installed, wanted, tmp_path, command):
    """Away from the repository, with the weights inside."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    called = [str(installed / command[0]), *command[1:]]
    done = subprocess.run([*called, *DRAWN, "found"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.asarray(Image.open(tmp_path / "found" / "man-cook-0.png")), wanted)
    where = subprocess.run([str(installed / "python"), "-c", "import emma_core.playground as p; print(p.PLAYGROUND_DIR)"],
                           cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert where.strip().endswith("weights") and str(installed.parent) in where


def test_the_console_command_calls_itself_by_its_name(installed, tmp_path):
    done = subprocess.run([str(installed / "emma"), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("usage: emma [-h]")
