"""The tests' own ground: which ComfyUI they run against, and that its folder stays as it was."""

from __future__ import annotations

import sys
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]


def test_server_is_the_named_comfyui(server, host_version):
    assert server.get_json("/system_stats")["system"]["comfyui_version"] == host_version


def test_server_lists_nodes_of_the_pack_folder_once(server):
    nodes = server.get_json("/object_info")
    modules = {info["python_module"] for name, info in nodes.items() if name.startswith("EMMA")}
    assert modules == {f"custom_nodes.{PACK.name}"}


def test_nothing_is_written_into_the_comfyui_folder(server, pack, changed_host_files):
    assert changed_host_files() == set()
    assert server.log_path.is_file() and (server.work_dir / "comfyui.db").is_file()


def test_in_process_host_is_the_named_comfyui(host_nodes, host_path, base_directory):
    import folder_paths

    assert Path(host_nodes.__file__).parent == host_path
    assert Path(folder_paths.models_dir) == base_directory / "models"


def test_pack_is_loaded_once_and_off_sys_path(pack, pack_import):
    core = pack_import("emma_core")
    assert core.__name__.startswith(pack.__name__)
    assert "emma_core" not in sys.modules
    assert str(PACK) not in [str(Path(entry or ".").resolve()) for entry in sys.path]
