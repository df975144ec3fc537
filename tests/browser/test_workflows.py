"""Every shipped graph opens in the editor, and can be read as it opens."""

from __future__ import annotations

import pytest
from graphs import FIRST, GRAPHS, OUR_PACK, STOCK, WORKFLOWS, pack_of, read_graph

LEAST_ZOOM = 0.57  # below it the editor leaves out titles, names and values
LEAST_ZOOM_OF_FIRST = 0.65


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_graph_opens_without_complaint_and_can_be_read(editor, path):
    graph = read_graph(path)
    editor.open_template(path.stem, graph)
    missing = editor.missing_types()
    others = {pack_of(node) for node in graph["nodes"] if node["type"] in missing}
    if missing and not others & {OUR_PACK, STOCK, None}:
        pytest.skip(f"{', '.join(sorted(others))}: not found, or this host cannot load it")
    assert not missing
    editor.page.wait_for_timeout(500)  # the editor looks for missing files after it has opened a graph
    editor.screenshot(f"graph-{path.stem}")
    view = editor.view()
    assert view.zoom >= (LEAST_ZOOM_OF_FIRST if path == FIRST else LEAST_ZOOM) and view.draws_texts
    assert not view.nodes_outside
    assert len(editor.widgets()) == len(graph["nodes"])
    assert not editor.red_nodes() and not editor.values_not_offered()
    assert not editor.shows_error() and not editor.new_complaints()
    assert not editor.overlapping_nodes() and not editor.links_behind_nodes()


def test_a_node_of_no_pack_is_noticed(open_editor):
    editor, graph = open_editor(), read_graph(WORKFLOWS[0])
    editor.load({**graph, "nodes": [{**graph["nodes"][0], "type": "NoSuchNode"}], "links": []})
    assert editor.missing_types() == ["NoSuchNode"] and len(editor.red_nodes()) == 1


def test_no_graph_has_a_deprecated_node(server):
    nodes = server.get_json("/object_info")
    found = {(path.stem, node["type"]) for path in WORKFLOWS for node in read_graph(path)["nodes"]
             if nodes.get(node["type"], {}).get("deprecated")}
    assert not found
