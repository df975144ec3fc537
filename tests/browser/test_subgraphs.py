"""Our subgraphs in the node library: one node each, found by name, that runs and opens into the real nodes."""

from __future__ import annotations

import urllib.error

import pytest
from frontends import place_found_node
from graphs import FIRST, PACK, PACK_NAME, read_graph
from windows import open_search, search

SUBGRAPHS = {path.stem: read_graph(path) for path in sorted((PACK / "subgraphs").glob("*.json"))}
# types of the nodes inside of a subgraph node, by its id
INNER = "id => window.app.graph.getNodeById(id).subgraph.nodes.map(node => node.type)"


@pytest.fixture(scope="module", autouse=True)
def served(server):
    """Skip where the host serves none."""
    try:
        known = server.get_json("/global_subgraphs").values()
    except urllib.error.HTTPError:
        pytest.skip("this host serves no subgraphs")
    assert {one["name"] for one in known if one["info"]["node_pack"] == f"custom_nodes.{PACK_NAME}"} == SUBGRAPHS.keys()


def put(editor, name: str) -> int:
    """Find a subgraph as a user does, and put it on the canvas; its id."""
    before = {node["id"] for node in editor.saved()["nodes"]}
    open_search(editor)
    assert name in search(editor, name, name)
    editor.page.locator("[data-testid=result-item]").get_by_text(name, exact=True).first.click()
    editor.page.wait_for_function("count => window.app.graph._nodes.length === count", arg=len(before) + 1)
    place_found_node(editor.page)
    (new,) = {node["id"] for node in editor.saved()["nodes"]} - before
    return new


@pytest.mark.parametrize("name", SUBGRAPHS)
def test_it_is_one_node_that_opens_into_the_real_ones(editor, name):
    editor.clear()
    node = put(editor, name)
    (wanted,) = SUBGRAPHS[name]["definitions"]["subgraphs"]
    assert sorted(editor.page.evaluate(INNER, node)) == sorted(one["type"] for one in wanted["nodes"])
    found = editor.page.evaluate("""id => {
        const node = window.app.graph.getNodeById(id);
        return { inputs: node.inputs.map(one => one.name), outputs: node.outputs.map(one => one.name),
            widgets: node.widgets.map(one => one.name) };
    }""", node)
    assert found["inputs"] == [one["name"] for one in wanted["inputs"]]
    assert found["outputs"] == [one["name"] for one in wanted["outputs"]]
    (outer,) = SUBGRAPHS[name]["nodes"]
    assert found["widgets"] == [one["name"] for one in outer["inputs"] if "widget" in one]
    editor.show_node(node)
    editor.screenshot(f"subgraph-{name}")
    assert not editor.red_nodes() and not editor.new_complaints() and not editor.missing_types()


def test_a_style_reference_in_place_of_its_two_nodes_gives_the_same_prompt(editor):
    """What the server gets: the inner nodes, wired and set as those of the first graph that it stands for."""
    editor.load(read_graph(FIRST))
    style, face = editor.node_titled("style"), editor.node_titled("face")
    connector, world = editor.node_of_type("EMMAConnector"), editor.node_of_type("EMMAPlayground")
    picture = editor.node_titled("style reference")
    editor.connect(style, "EMMA_ASSEMBLY", connector, "assembly")
    before = editor.prompt()
    assert before[str(connector)]["inputs"]["assembly"][0] == str(style) != str(face)
    node = put(editor, "Style reference")
    for origin, output, wanted in (
        (world, "style module", "module"), (world, "EMMA_ENCODER", "encoder"), (picture, "IMAGE", "image"),
    ):
        editor.connect(origin, output, node, wanted)
    editor.connect(node, "EMMA_ASSEMBLY", connector, "assembly")
    after = editor.prompt()
    source = after[after[str(connector)]["inputs"]["assembly"][0]]
    assert source["class_type"] == "EMMAAssembleModules"
    encode = after[source["inputs"]["reference"][0]]
    wanted = before[str(style)]["inputs"]
    assert {**source["inputs"], "reference": None} == {**wanted, "reference": None}
    assert encode["inputs"] == before[wanted["reference"][0]]["inputs"]
    editor.run()
    editor.wait_for_pictures(["picture"])
    editor.screenshot("subgraph-after-run")
    assert not editor.shows_error() and not editor.new_complaints()
