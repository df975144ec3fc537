"""Imports point one way: nodes -> host -> emma_core. Proved by reading them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOST_PACKAGES = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "node_helpers", "server", "execution"}
PARTS = {"emma_core", "host", "nodes", "harness", "lab"}
MAY_IMPORT = {
    "emma_core": {"emma_core"}, "host": {"host", "emma_core"}, "nodes": {"nodes", "host", "emma_core"}, "harness": {"harness"},
    "lab": {"lab", "emma_core", "harness"},
}


def imported(path: Path) -> set[str]:
    """Absolute names of everything a file imports, the pack's own parts without a prefix."""
    package = path.relative_to(ROOT).parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*prefix, *filter(None, [node.module])])
            names |= {stem} if stem else {alias.name for alias in node.names}
    return names


def files(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("part", sorted(PARTS))
def test_imports_stay_in_their_layer(part):
    assert files(part)
    for path in files(part):
        tops = {name.split(".")[0] for name in imported(path)}
        assert tops & PARTS <= MAY_IMPORT[part], path


@pytest.mark.parametrize("part", ["emma_core", "harness"])
def test_only_host_and_nodes_import_comfyui(part):
    for path in files(part):
        assert not {name.split(".")[0] for name in imported(path)} & HOST_PACKAGES, path


@pytest.mark.parametrize("part", ["emma_core", "host", "nodes"])
def test_the_pack_imports_itself_relatively(part):
    for path in files(part):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module and node.module.split(".")[0] not in PARTS, path


def test_importing_the_pack_imports_nothing_else():
    root = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in root.body if isinstance(node, ast.Import | ast.ImportFrom)]


def test_importing_emma_core_does_not_import_torch():
    code = "import sys; import emma_core, emma_core.playground; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nothing_switches_off_strict_loading():
    needle = "strict" + "=False"
    for part in PARTS:
        for path in files(part):
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if needle in line and "zip(" not in line]
            assert not lines, path
