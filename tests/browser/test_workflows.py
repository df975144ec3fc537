"""Every shipped graph opens in the editor."""

from __future__ import annotations

import pytest
from graphs import OUR_PACK, STOCK, WORKFLOWS, pack_of, read_graph


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_graph_opens_without_complaint(editor, path):
    graph = read_graph(path)
    editor.load(graph)
    missing = editor.missing_types()
    others = {pack_of(node) for node in graph["nodes"] if node["type"] in missing}
    if missing and not others & {OUR_PACK, STOCK, None}:
        pytest.skip(f"{', '.join(sorted(others))}: not found, or this host cannot load it")
    assert not missing
    editor.page.wait_for_timeout(500)  # the editor looks for missing files after it has opened a graph
    editor.screenshot(f"graph-{path.stem}", fit=True)
    assert len(editor.widgets()) == len(graph["nodes"])
    assert not editor.red_nodes() and not editor.values_not_offered()
    assert not editor.shows_error() and not editor.new_complaints()
    assert not editor.links_behind_nodes()


def test_a_node_of_no_pack_is_noticed(open_editor):
    editor, graph = open_editor(), read_graph(WORKFLOWS[0])
    editor.load({**graph, "nodes": [{**graph["nodes"][0], "type": "NoSuchNode"}], "links": []})
    assert editor.missing_types() == ["NoSuchNode"] and len(editor.red_nodes()) == 1
