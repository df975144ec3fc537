"""The shipped subgraphs: each is one node, made of nodes of this host, whose sockets, links and widgets are right."""

from __future__ import annotations

import json
import urllib.error
from pathlib import Path

import pytest
from emma_harness.server_client import ComfyClient

FOLDER = Path(__file__).resolve().parents[2] / "subgraphs"
NAMES = ("ELLA prompt", "Face and style", "Style reference", "Train a style")
INPUTS, OUTPUTS = -10, -20  # ids that stand for the subgraph's own sockets
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def infos(server):
    return ComfyClient(server.url).object_info()


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def node(name):
    """The one node that stands for the subgraph."""
    (found,) = read(name)["nodes"]
    return found


@pytest.fixture
def inner(name):
    (found,) = read(name)["definitions"]["subgraphs"]
    return found


def specs_of(info: dict) -> dict:
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def widgets_of(info: dict) -> list[str]:
    return [name for name, spec in specs_of(info).items()
            if (isinstance(spec[0], list) or spec[0] in WIDGETS) and not (spec[1] if len(spec) > 1 else {}).get("forceInput")]


def kind_of(spec: list) -> str:
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def test_these_and_no_others_are_shipped():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(NAMES)


def test_hosts_that_have_them_serve_them_as_they_are(server, name):
    try:
        known = server.get_json("/global_subgraphs")
    except urllib.error.HTTPError as refusal:
        assert refusal.code == 404
        pytest.skip("this host serves no subgraphs")
    served = {one["name"]: key for key, one in known.items()
              if one["info"]["node_pack"] == f"custom_nodes.{FOLDER.parent.name}"}
    assert json.loads(server.get_json(f"/global_subgraphs/{served[name]}")["data"]) == read(name)


def test_node_has_the_sockets_of_its_subgraph_and_a_value_for_each_widget(node, inner):
    assert node["type"] == inner["id"]
    for side in ("inputs", "outputs"):
        assert [(one["name"], one["type"]) for one in node[side]] == [(one["name"], one["type"]) for one in inner[side]]
    shown = [one["name"] for one in node["inputs"] if "widget" in one]
    assert node["properties"]["proxyWidgets"] == [["-1", one] for one in shown] and len(node["widgets_values"]) == len(shown)


def test_inner_nodes_are_those_of_this_host(infos, inner):
    """A node may have got an input since; values are kept by position, so widgets must be the first ones in their order."""
    for one in inner["nodes"]:
        info = infos[one["type"]]
        assert not info.get("deprecated"), one["type"]
        specs, widgets = specs_of(info), widgets_of(info)
        assert all(kind_of(specs[socket["name"]]) == socket["type"] for socket in one["inputs"]), one["type"]
        shown = [socket["name"] for socket in one["inputs"] if "widget" in socket]
        assert shown == widgets[:len(shown)] and len(one["widgets_values"]) == len(shown)
        outputs = list(zip(info["output_name"], info["output"], strict=True))
        assert [(socket["name"], socket["type"]) for socket in one["outputs"]] == outputs[:len(one["outputs"])]


def test_links_join_sockets_of_one_type_and_are_known_at_both_ends(inner):
    nodes = {one["id"]: one for one in inner["nodes"]}
    for link in inner["links"]:
        if link["origin_id"] == INPUTS:
            start = inner["inputs"][link["origin_slot"]]
            assert link["id"] in start["linkIds"]
        else:
            start = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
            assert link["id"] in start["links"]
        if link["target_id"] == OUTPUTS:
            end = inner["outputs"][link["target_slot"]]
            assert link["id"] in end["linkIds"]
        else:
            end = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert end["link"] == link["id"]
        assert set(start["type"].split(",")) & set(end["type"].split(",")), (start, end)
    counted = sum(len(one["linkIds"]) for one in inner["inputs"]) + sum(
        len(socket["links"]) for one in inner["nodes"] for socket in one["outputs"])
    assert counted == len(inner["links"]) == len({link["id"] for link in inner["links"]}) == inner["state"]["lastLinkId"]


def test_what_a_node_needs_is_wired_or_has_a_widget(infos, inner):
    for one in inner["nodes"]:
        required = infos[one["type"]]["input"].get("required", {})
        for socket in one["inputs"]:
            given = socket["link"] is not None or "widget" in socket
            assert given or socket["name"] not in required, (one["type"], socket["name"])
