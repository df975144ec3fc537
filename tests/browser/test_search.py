"""Double-clicking the canvas and typing: nodes are found under the names a user would try."""

from __future__ import annotations

import pytest
from frontends import place_found_node
from graphs import PACK_NAME
from windows import open_search, search


@pytest.fixture(scope="module")
def ours(server) -> dict[str, dict]:
    """What the editor knows of our nodes."""
    nodes = server.get_json("/object_info")
    found = {name: info for name, info in nodes.items() if info["python_module"] == f"custom_nodes.{PACK_NAME}"}
    assert len(found) > 10
    return found


def test_display_names_find_their_nodes(editor, ours):
    open_search(editor)
    names = [info["display_name"] for info in ours.values()]
    found = {name: search(editor, name, name)[:1] for name in names}
    editor.screenshot("search-by-name")
    assert found == {name: [name] for name in names}


def test_aliases_find_their_nodes(editor, ours):
    if not all("search_aliases" in info for info in ours.values()):
        pytest.skip("this host's nodes have no aliases")
    open_search(editor)
    lost = []
    for info in ours.values():
        assert info["search_aliases"], info["name"]
        for alias in info["search_aliases"]:
            if info["display_name"] not in search(editor, alias, info["display_name"]):
                lost.append((info["display_name"], alias))
    editor.screenshot("search-by-alias")
    assert not lost


@pytest.mark.parametrize("words", ["style transfer", "multi modal", "reference image", "ip-adapter"])
def test_the_words_of_other_packs_and_papers_find_a_node(editor, ours, words):
    """What a newcomer types who knows the task, not us. Without aliases the editor searches names alone."""
    has_aliases = all("search_aliases" in info for info in ours.values())
    if not has_aliases and words not in "Encode Reference Image".lower():
        pytest.skip("this host's nodes have no aliases, and its editor searches names alone")
    open_search(editor)
    assert "Encode Reference Image" in search(editor, words, "Encode Reference Image")


def test_a_found_node_is_put_on_the_canvas(editor):
    editor.clear()
    open_search(editor)
    assert search(editor, "encode reference", "Encode Reference Image")[0] == "Encode Reference Image"
    editor.page.keyboard.press("Enter")
    place_found_node(editor.page)
    editor.page.wait_for_function("() => window.app.graph._nodes.length === 1")
    assert [node["type"] for node in editor.saved()["nodes"]] == ["EMMAEncodeReference"]
