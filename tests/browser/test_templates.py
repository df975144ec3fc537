"""The Templates window: how a new user comes to our graphs."""

from __future__ import annotations

from graphs import GATE_MAP, PACK_NAME, WORKFLOWS, read_graph
from windows import choose_template, open_templates, template_cards


def test_templates_show_every_graph_with_its_picture_and_open_it(editor):
    open_templates(editor, PACK_NAME)
    cards = template_cards(editor)
    editor.screenshot("templates")
    assert cards.keys() == {path.stem for path in WORKFLOWS}
    assert not [name for name, width in cards.items() if not width], "cards without a picture"
    choose_template(editor, GATE_MAP.stem)
    graph = read_graph(GATE_MAP)
    opened = editor.saved()
    assert sorted(node["type"] for node in opened["nodes"]) == sorted(node["type"] for node in graph["nodes"])
    assert len(opened["links"]) == len(graph["links"]) and not editor.missing_types()
    editor.run()
    editor.wait_for_pictures([node["title"] for node in graph["nodes"] if node["type"] == "PreviewImage"])
    assert not editor.new_complaints()
