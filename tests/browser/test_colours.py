"""Each socket type of ours has one colour of its own, whichever palette is chosen."""

from __future__ import annotations

import pytest
from graphs import FIRST, PACK, read_graph

TYPES = tuple(read_graph(PACK / "locales" / "en" / "main.json")["dataTypes"])
IN_FIRST = ("ELLA", "EMMA_MODULE", "EMMA_ENCODER", "EMMA_REFERENCE", "EMMA_ASSEMBLY")
PALETTE = "Comfy.ColorPalette"
# of dots, of wires, and of the dots of nodes that are drawn by the page
COLOURS = """types => types.map(type => {
    const canvas = window.app.canvas, page = getComputedStyle(document.documentElement);
    return [canvas.default_connection_color_byType[type], canvas.constructor.link_type_colors[type],
            page.getPropertyValue(`--color-datatype-${type}`).trim()];
})"""
WIRES = """() => Object.fromEntries([...window.app.graph.links.values()].map(link => [link.type, String(link._colour ??
    window.app.canvas.constructor.link_type_colors[link.type])]))"""


def choose_palette(editor, name: str) -> None:
    editor.page.evaluate("([key, name]) => window.app.extensionManager.setting.set(key, name)", [PALETTE, name])
    editor.page.wait_for_timeout(1000)


@pytest.fixture
def palette(editor, request):
    """Another palette chosen, and the dark one after it."""
    choose_palette(editor, request.param)
    yield request.param
    choose_palette(editor, "dark")


@pytest.mark.parametrize("palette", ["dark", "light", "arc"], indirect=True)
def test_every_type_has_one_colour_of_its_own_in_every_palette(editor, palette):
    colours = editor.page.evaluate(COLOURS, list(TYPES))
    assert all(len(set(of_type)) == 1 and of_type[0].startswith("#") for of_type in colours), colours
    others = editor.page.evaluate("types => Object.entries(window.app.canvas.constructor.link_type_colors)"
                                  ".filter(([type]) => !types.includes(type)).map(([, colour]) => colour)", list(TYPES))
    ours = [of_type[0].lower() for of_type in colours]
    assert len(set(ours)) == len(TYPES) and not set(ours) & {colour.lower() for colour in others if colour}


def test_wires_of_the_first_graph_have_them(editor):
    editor.open_template(FIRST.stem, read_graph(FIRST))
    wires = editor.page.evaluate(WIRES)
    assert set(IN_FIRST) <= wires.keys() and set(IN_FIRST) <= set(TYPES)
    assert len({wires[name] for name in IN_FIRST}) == len(IN_FIRST) and all(wires[name].startswith("#") for name in IN_FIRST)
    editor.screenshot("colours")
    assert not editor.new_complaints()
