"""The shipped graphs: what they need from other packs and in the models folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from harness.hosts import peer_roots

PACK = Path(os.path.abspath(__file__)).parents[3]
PACK_NAME = "ComfyUI-EMMA"
WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
APP = PACK / "workflows" / "01-first-picture.app.json"
GRAPHS = [path for path in WORKFLOWS if path != APP]
FIRST = PACK / "workflows" / "01-first-picture.json"
COMPARE = PACK / "workflows" / "02-compare.json"
GATE_MAP = PACK / "workflows" / "07-gate-map.json"
OUR_PACK, STOCK = "comfyui-emma", "comfy-core"
# where the files lie that a graph names without saying where to get them: loader -> (its widget's index, folder of models)
FOLDERS = {
    "EMMALoadModule": (0, "emma"), "EMMALoadReference": (0, "emma_references"), "EMMALoadReferenceEncoder": (0, "adaface"),
}


def read_graph(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def shipped_nodes() -> Iterator[dict]:
    """Every node of every shipped graph."""
    for path in WORKFLOWS:
        yield from read_graph(path)["nodes"]


def pack_of(node: dict) -> str | None:
    """The registry's name of the pack that a saved node belongs to."""
    return node["properties"].get("cnr_id")


def link_packs(folder: Path, host_path: Path) -> list[str]:
    """Link the other packs that shipped graphs use, where they are at hand, into `folder`; their names.

    They are looked for in `peer_roots`; nothing is fetched.
    """
    wanted = {pack_of(node) for node in shipped_nodes()} - {OUR_PACK, STOCK, None}
    linked = []
    for root in peer_roots(host_path):
        for pack in sorted(root.iterdir()) if root.is_dir() else ():
            if pack.name.lower() in wanted and pack.name not in linked:
                (folder / pack.name).symlink_to(pack.resolve(), target_is_directory=True)
                linked.append(pack.name)
    return linked


def place_files(base_directory: Path) -> None:
    """An empty file where each graph says that a model belongs, and a picture under each name it asks for."""
    for node in shipped_nodes():
        models = {(model["directory"], model["name"]) for model in node["properties"].get("models", ())}
        if not models and node["type"] in FOLDERS:
            index, folder = FOLDERS[node["type"]]
            models = {(folder, node["widgets_values"][index])}
        for folder, name in models:
            place = base_directory / "models" / folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        if node["type"] == "LoadImage":
            place = base_directory / "input" / node["widgets_values"][0]
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PACK / "docs" / "demo.png", place)
