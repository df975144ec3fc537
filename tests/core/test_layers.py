"""Imports point one way: nodes -> host -> emma_core, and inside emma_core from room to room downwards."""

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
# of emma_core, from the ground up: a room imports rooms of lower floors, and none of its own floor but itself
FLOORS = (("errors",), ("model", "settings"), ("files", "drawing"), ("text", "encoders", "playground"), ("base",),
          ("training", "evaluation"), ("commands",), ("__main__",))
MOST_FILES_AT_THE_TOP = 8


def imported(path: Path, at_once: bool = False) -> set[str]:
    """Absolute names of everything a file imports, the pack's own parts without a prefix; ``at_once``: not in functions."""
    package = path.relative_to(ROOT).parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*prefix, *filter(None, [node.module])])
            names |= {stem} - {""} | {".".join(filter(None, [stem, alias.name])) for alias in node.names}
    return names


def files(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("part", sorted(PARTS))
def test_imports_stay_in_their_layer(part):
    assert files(part)
    for path in files(part):
        tops = {name.split(".")[0] for name in imported(path)}
        assert tops & PARTS <= MAY_IMPORT[part], path


def rooms_that_a_room_imports(room: str) -> set[str]:
    paths = files(f"emma_core/{room}") or [ROOT / "emma_core" / f"{room}.py"]
    names = [name.split(".") for path in paths for name in imported(path)]
    return {name[1] for name in names if name[0] == "emma_core" and len(name) > 1} - {room}


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_rooms_of_the_library_import_downwards_only(floor):
    below = {room for rooms in FLOORS[:floor] for room in rooms}
    for room in FLOORS[floor]:
        assert rooms_that_a_room_imports(room) <= below, room


def test_every_part_of_the_library_is_a_room():
    found = {path.stem for path in (ROOT / "emma_core").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__"} == {room for rooms in FLOORS for room in rooms}
    assert len(list((ROOT / "emma_core").glob("*.py"))) <= MOST_FILES_AT_THE_TOP


def reached_from(start: set[str], at_once: bool = False) -> set[str]:
    """Names of the pack's files that these import, that those import, and so on."""
    reached, todo = set(), set(start)
    while todo:
        name = todo.pop()
        path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        reached.add(name)
        if path.is_file():
            todo |= {one for one in imported(path, at_once) if one.split(".")[0] in PARTS} - reached
    return reached


def test_generate_reaches_no_file_of_the_trainer():
    """By reading: what `generate` imports, and what that imports, and so on, inside functions too."""
    reached = reached_from({"emma_core.commands.generate"})
    assert "emma_core.base.unet_files" in reached
    assert not [name for name in reached if name.startswith("emma_core.training")]


def test_drawing_a_picture_imports_nothing_of_the_trainer(tmp_path):
    code = """
import sys
from emma_core.__main__ import main
status = main(["generate", "man cook", "--device", "cpu", "--sampling.steps", "1", "--out", sys.argv[1], "--module",
               "playground/emma-style.safetensors", "playground/references/style-noto.png"])
print([name for name in sys.modules if name.startswith("emma_core.training")])
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("number", [0.18215, 0.00085, 0.012])
def test_the_numbers_of_stable_diffusion_stand_once(number):
    """Everything that needs a latent scale or a noise schedule reads the base's own."""
    found = [path for part in PARTS for path in files(part) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Constant) and node.value == number]
    assert len(found) == 1, found


def test_the_count_of_timesteps_stands_once():
    """999 and 1000 have other meanings only where they are no timesteps: flow models' time, settings, limits of a widget."""
    other = {"emma_core/model/source_spec.py", "emma_core/training/config.py", "nodes/encode.py", "nodes/train.py",
             "lab/playground/judge.py", "lab/playground/timed_run.py"}
    found = [path.relative_to(ROOT).as_posix() for part in PARTS for path in files(part)
             for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value in (999, 1000)]
    assert set(found) - other == {"emma_core/model/strength_keyframes.py"}
    assert found.count("emma_core/model/strength_keyframes.py") == 1


def test_the_librarys_tests_do_without_the_laboratory():
    for path in files("tests/core"):
        assert "lab" not in {name.split(".")[0] for name in imported(path)}, path


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


def test_comfyui_starts_with_schemas_and_folders_alone():
    """What takes long to import comes with the first node that runs: readers of files, encoders, models, the trainer."""
    reached = reached_from({"host.paths", *(f"nodes.{path.stem}" for path in files("nodes"))}, at_once=True)
    assert {"host.paths", "emma_core.encoders.options"} <= reached
    parts = {f"host.{path.stem}" for path in files("host")}
    assert reached & parts == {"host.messages", "host.paths", "host.picture_folders", "host.text_options"}
    heavy = ("emma_core.base", "emma_core.files.tensor_file", "emma_core.encoders.base", "emma_core.model.assembly",
             "emma_core.training.config", "emma_core.text", "emma_core.drawing")
    assert not [name for name in reached if name.startswith(heavy)]


def test_importing_emma_core_does_not_import_torch():
    code = "import sys; import emma_core, emma_core.playground; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nothing_switches_off_strict_loading():
    needle = "strict" + "=False"
    for part in PARTS:
        for path in files(part):
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if needle in line and "zip(" not in line]
            assert not lines, path
