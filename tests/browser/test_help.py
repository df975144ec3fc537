"""Help pages and texts, in English and in Chinese, as the editor shows them."""

from __future__ import annotations

import json

import pytest
from graphs import FIRST, PACK, read_graph
from windows import node_texts, open_help, set_language, tooltip_of_input

NODES = ("EMMAEncodeReference", "EMMAConnector", "EMMALoadTextEncoder", "EMMATrainModule")
TABLES = {"en": ("Inputs", "Outputs"), "zh": ("输入", "输出")}


def texts(language: str) -> dict:
    return json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["en", "zh"])
def language(request, editor):
    """The editor's language, as its settings set it; English again afterwards."""
    if request.param != "en":
        set_language(editor, request.param)
        editor.reload()
    yield request.param
    if request.param != "en":
        set_language(editor, "en")


def test_help_opens_in_the_editors_language(editor, language):
    editor.clear()
    for name in NODES:
        wanted = texts(language)[name]
        page = open_help(editor, editor.add_node(name))
        editor.screenshot(f"help-{language}-{name}")
        assert page.title == wanted["display_name"]
        assert set(TABLES[language]) <= set(page.headings)
        shown = [cell.split()[0] for cell in page.first_cells]
        assert set(wanted["inputs"]) <= set(shown), name
        assert "|--" not in page.text and "**" not in page.text
        editor.clear()
    assert not editor.new_complaints()


def test_nodes_speak_the_editors_language(editor, language):
    editor.load(read_graph(FIRST))
    wanted = texts(language)["EMMAConnector"]
    node = editor.node_of_type("EMMAConnector")
    assert node_texts(editor, node) == {
        "title": wanted["display_name"],
        "inputs": {key: one["name"] for key, one in wanted["inputs"].items()},
    }
    assert tooltip_of_input(editor, node, "assembly") == wanted["inputs"]["assembly"]["tooltip"]
    editor.screenshot(f"tooltip-{language}")
    assert not editor.new_complaints()
