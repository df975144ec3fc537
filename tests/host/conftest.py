"""Puts one real ComfyUI into this process and serves it to the tests, alone and as a server.

EMMA_TEST_HOST names the ComfyUI folder. The pack is reached only as ComfyUI loaded it: the repository is kept off
sys.path, where its `nodes` would clash with the host's.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest

PACK = Path(os.path.abspath(__file__)).parents[2]
HOW_TO_RUN = "Host tests need a process of their own for each ComfyUI: python run.py test tests/host [pytest arguments]"


def _import_harness() -> None:
    """Import the repository's `harness` as `emma_harness`, without its folder on sys.path."""
    folder = PACK / "harness"
    spec = importlib.util.spec_from_file_location(
        "emma_harness", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["emma_harness"] = module
    spec.loader.exec_module(module)


if not os.environ.get("EMMA_TEST_HOST"):
    pytest.exit(HOW_TO_RUN, returncode=pytest.ExitCode.USAGE_ERROR)
if "emma_core" in sys.modules or "comfy" in sys.modules:
    pytest.exit(f"emma_core or comfy is imported already. {HOW_TO_RUN}", returncode=pytest.ExitCode.USAGE_ERROR)
_import_harness()
from emma_harness.hosts import read_host  # noqa: E402
from emma_harness.server import HostServer, isolated_arguments, prepare_base_directory  # noqa: E402

HOST = read_host(Path(os.environ["EMMA_TEST_HOST"]).expanduser())
if HOST is None:
    pytest.exit(f"No ComfyUI in {os.environ['EMMA_TEST_HOST']}.", returncode=pytest.ExitCode.USAGE_ERROR)

_base = tempfile.TemporaryDirectory(prefix="emma-host-", ignore_cleanup_errors=True)
BASE_DIRECTORY = Path(_base.name).resolve()
prepare_base_directory(BASE_DIRECTORY)
sys.path[:] = [str(HOST.path), *(entry for entry in sys.path if Path(entry or ".").resolve() != PACK)]
sys.argv = ["main.py", *isolated_arguments(BASE_DIRECTORY)]



def files_of(folder: Path) -> set[tuple[str, int]]:
    """Path and time of change of every file below `folder`, its version control aside."""
    files = (file for file in folder.rglob("*") if file.is_file() and ".git" not in file.parts)
    return {(str(file), file.stat().st_mtime_ns) for file in files}


FILES_BEFORE = files_of(HOST.path)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
sys.path.append(str(PACK / "tests" / "host" / "support"))
pytest_plugins = ["token_check", "tiny_models", "context_windows"]


@pytest.fixture(scope="session")
def host_path() -> Path:
    """The ComfyUI folder under test: read only."""
    return HOST.path


@pytest.fixture(scope="session")
def changed_host_files():
    """A function: the files of the ComfyUI folder that are new, gone or changed since before it was imported."""
    return lambda: FILES_BEFORE ^ files_of(HOST.path)


@pytest.fixture(scope="session")
def host_version() -> str:
    return HOST.version


@pytest.fixture(scope="session")
def base_directory() -> Path:
    """The in-process host's base directory: its models, input, output, temp and user folders are here."""
    return BASE_DIRECTORY


@pytest.fixture(scope="session")
def host_nodes():
    """The host's `nodes` module with all of ComfyUI's own nodes registered, no API nodes and no other packs."""
    import utils.extra_config  # noqa: F401, I001  (main.py's order: nodes.py puts another `utils` before this one)
    import nodes
    import server

    server.PromptServer(asyncio.new_event_loop())  # nodes reach for PromptServer.instance; it listens nowhere
    failed = asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    assert not failed, f"nodes of ComfyUI itself that did not import: {failed}"
    return nodes


@pytest.fixture(scope="session")
def pack(host_nodes):
    """The pack's root module as the host's own loader made it, its nodes registered."""
    loaded = asyncio.run(host_nodes.load_custom_node(str(PACK), ignore=set(host_nodes.NODE_CLASS_MAPPINGS)))
    assert loaded, "the host could not load the pack: its reason is in the captured log"
    return sys.modules[str(PACK).replace(".", "_x_")]


@pytest.fixture(scope="session")
def pack_import(pack):
    """`pack_import("emma_core.model.connector")`: a module of the pack, under the name the host gave the pack."""
    return lambda name: importlib.import_module(f"{pack.__name__}.{name}")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running server of this host with the pack loaded, as a process of its own: see harness/server.py."""
    with HostServer(HOST, Path(sys.executable), tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def clips(pack_import, tmp_path_factory):
    """CLIPs of T5: for an ELLA, and as wide as the MODEL's own tokens."""
    from tiny_models import TEXT_DIM, WIDTH, save_t5

    found = []
    for width in (TEXT_DIM, WIDTH):
        place = tmp_path_factory.mktemp(f"t5-{width}")
        save_t5(place, width)
        found.append(pack_import("host.text_encoder").load_text_encoder_clip(place))
    return found
