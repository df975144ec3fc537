"""A user's mistake: the editor shows our message, the graph stays, and runs once the mistake is mended."""

from __future__ import annotations

import pytest
from frontends import dismiss_error, error_text
from graphs import FIRST, read_graph


def change_conditioning(editor, connector: int, sampler: int, world: int) -> None:
    zeroed = editor.add_node("ConditioningZeroOut")
    editor.connect(connector, "positive", zeroed, "conditioning")
    editor.connect(zeroed, "CONDITIONING", sampler, "positive")


def leave_connector_out(editor, connector: int, sampler: int, world: int) -> None:
    editor.connect(world, "MODEL", sampler, "model")


@pytest.mark.parametrize(("make_mistake", "message"), [
    (change_conditioning, "the conditioning was changed after EMMA Connector"),
    (leave_connector_out, "this conditioning comes from EMMA Connector, but the MODEL that samples it does not"),
])
def test_mistake_is_told_and_can_be_mended(open_editor, make_mistake, message):
    editor = open_editor()
    editor.load(read_graph(FIRST))
    connector, world = editor.node_of_type("EMMAConnector"), editor.node_of_type("EMMAPlayground")
    sampler = editor.target_of(connector, "MODEL")
    make_mistake(editor, connector, sampler, world)
    before = editor.saved()
    editor.run()
    text = error_text(editor.page)
    editor.screenshot(f"error-{make_mistake.__name__.replace('_', '-')}")
    assert message in text
    dismiss_error(editor.page)
    after = editor.saved()
    assert len(after["nodes"]) == len(before["nodes"]) and after["links"] == before["links"]
    for output in ("MODEL", "positive"):
        editor.connect(connector, output, sampler, output.lower())
    editor.run()
    editor.wait_for_pictures(["picture"])
    assert not editor.shows_error() and not editor.new_complaints()
