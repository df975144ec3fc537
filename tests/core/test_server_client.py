"""The saved workflow in the server's API format."""

import json
from pathlib import Path

import pytest

from harness.server_client import ServerError, api_prompt, node_titled

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
OBJECT_INFO = {
    "Load": {"input": {"required": {"name": [["a", "b"]]}}},
    "Sample": {"input": {
        "required": {"model": ["MODEL"], "seed": ["INT", {"control_after_generate": True}], "steps": ["INT", {}],
                     "kind": ["COMBO", {"options": ["x"]}]},
        "optional": {"mask": ["MASK"], "text": ["STRING", {"multiline": True}]},
    }},
}
GRAPH = {
    "nodes": [
        {"id": 1, "type": "Load", "inputs": [], "widgets_values": ["b"]},
        {"id": 2, "type": "Sample", "title": "sampler", "widgets_values": [7, "fixed", 20, "x", "words"],
         "inputs": [{"name": "mask", "link": None}, {"name": "model", "link": 5}]},
        {"id": 3, "type": "MarkdownNote", "widgets_values": ["read me"]},
    ],
    "links": [[5, 1, 0, 2, 1, "MODEL"]],
}


def test_widgets_and_links_reach_their_inputs():
    prompt = api_prompt(GRAPH, OBJECT_INFO)
    assert set(prompt) == {"1", "2"}
    assert prompt["1"]["inputs"] == {"name": "b"}
    assert prompt["2"]["inputs"] == {"model": ["1", 0], "seed": 7, "steps": 20, "kind": "x", "text": "words"}
    assert node_titled(prompt, "sampler") == "2"


def test_a_graph_older_than_a_widget_gets_its_default():
    older = {**GRAPH, "nodes": [{**GRAPH["nodes"][1], "widgets_values": [7, "fixed", 20]}]}
    required = {**OBJECT_INFO["Sample"]["input"]["required"], "kind": ["COMBO", {"default": "y"}]}
    info = {"Sample": {"input": {"required": required, "optional": {"text": ["STRING", {}]}}}}
    assert api_prompt(older, info)["2"]["inputs"] == {"model": ["1", 0], "seed": 7, "steps": 20, "kind": "y"}


def test_unknown_nodes_and_titles_are_refused():
    with pytest.raises(ServerError, match="no node Sample"):
        api_prompt(GRAPH, {"Load": OBJECT_INFO["Load"]})
    with pytest.raises(ServerError, match="no node titled 'prompt'"):
        node_titled(api_prompt(GRAPH, OBJECT_INFO), "prompt")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_links_of_a_shipped_workflow_agree_with_its_sockets(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link_id, source, source_slot, target, target_slot, kind in workflow["links"]:
        assert link_id in nodes[source]["outputs"][source_slot]["links"]
        assert nodes[target]["inputs"][target_slot]["link"] == link_id
        assert nodes[source]["outputs"][source_slot]["type"] in kind.split(",")
