"""What the Comfy registry would publish, packed with its own command, unpacked as an installed pack, and run in this host."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
from emma_harness.registry import pack as pack_for_registry
from emma_harness.server import HostServer
from emma_harness.server_client import ComfyClient, api_prompt, node_titled
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
FIRST = "workflows/01-first-picture.json"
INSTALLED_AS = "emma-from-the-registry"
LARGEST_WITHOUT_WEIGHTS_MIB = 2


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "node.zip"
    pack_for_registry(path)
    return path


@pytest.fixture(scope="module")
def installed(archive, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("custom_nodes") / INSTALLED_AS
    zipfile.ZipFile(archive).extractall(folder)
    return folder


def test_archive_is_the_weights_and_little_else(archive):
    entries = zipfile.ZipFile(archive).infolist()
    weights = [entry for entry in entries if entry.filename.startswith("playground/")]
    others = sum(entry.compress_size for entry in entries if entry not in weights)
    assert weights and others < LARGEST_WITHOUT_WEIGHTS_MIB * 2**20
    assert not [entry.filename for entry in entries if entry.filename.split("/")[0] in ("tests", "harness", "lab", "run.py")]


def test_installed_archive_has_the_nodes_and_draws_the_first_picture(installed, tmp_path, server):
    with HostServer(server.host, Path(sys.executable), tmp_path, installed) as running:
        client = ComfyClient(running.url)
        nodes = client.object_info()
        ours = {name for name, info in nodes.items() if info["python_module"] == f"custom_nodes.{INSTALLED_AS}"}
        assert ours == {name for name in server.get_json("/object_info") if name.startswith("EMMA")}
        assert FIRST.split("/")[1].removesuffix(".json") in running.get_json("/workflow_templates")[INSTALLED_AS]
        prompt = api_prompt(json.loads((installed / FIRST).read_text(encoding="utf-8")), nodes)
        [image] = client.run(prompt)[node_titled(prompt, "picture")]["images"]
        low, high = Image.open(io.BytesIO(client.picture(image))).convert("L").getextrema()
        assert high - low > 100
