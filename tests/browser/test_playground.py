"""The first thing a new user does: open the playground and press Run."""

from __future__ import annotations

import itertools

from graphs import PACK, read_graph

PICTURES = ("text only", "+ style", "+ face", "+ style + face")
SHOWN = (*PICTURES, "what the encoder saw (style)", "what the encoder saw (face)", "gate map")
LEAST_SPREAD = 40
LEAST_DIFFERENCE = 3


def test_run_button_gives_four_different_pictures(editor):
    editor.load(read_graph(PACK / "workflows" / "playground.json"))
    editor.run()
    editor.wait_for_pictures(SHOWN)
    editor.screenshot("playground-after-run", fit=True)
    seen = {title: editor.picture(title) for title in SHOWN}
    for title, brightness in seen.items():
        assert max(brightness) - min(brightness) > LEAST_SPREAD, f"{title} is blank"
    for first, second in itertools.combinations(PICTURES, 2):
        difference = sum(abs(a - b) for a, b in zip(seen[first], seen[second], strict=True)) / len(seen[first])
        assert difference > LEAST_DIFFERENCE, (first, second, difference)
    assert not editor.shows_error() and not editor.new_complaints() and not editor.red_nodes()
