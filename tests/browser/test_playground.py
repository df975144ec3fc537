"""The first thing a new user does: open the playground and press Run."""

from __future__ import annotations

import itertools

from graphs import COMPARE, FIRST, read_graph

REFERENCES = ("style reference", "face reference")
VARIANTS = ("text only", "+ style", "+ face", "+ style + face")
LEAST_SPREAD = 40
LEAST_DIFFERENCE = 3


def run(editor, path, titles) -> dict[str, list[float]]:
    """Open a graph, press Run; the picture of each node with one of these titles."""
    editor.open_template(path.stem, read_graph(path))
    editor.run()
    editor.wait_for_pictures(titles)
    editor.show_all()
    editor.screenshot(f"{path.stem}-after-run")
    seen = {title: editor.picture(title) for title in titles}
    for title, brightness in seen.items():
        assert max(brightness) - min(brightness) > LEAST_SPREAD, f"{title} is blank"
    assert not editor.shows_error() and not editor.new_complaints() and not editor.red_nodes()
    return seen


def test_first_picture_comes_with_its_references_beside_it(editor):
    run(editor, FIRST, ("picture", *REFERENCES))


def test_references_are_shown_again_in_a_new_browser_though_nothing_is_computed_anew(open_editor):
    run(open_editor(), FIRST, ("picture", *REFERENCES))


def test_four_variants_are_four_different_pictures(editor):
    seen = run(editor, COMPARE, (*VARIANTS, *REFERENCES))
    for first, second in itertools.combinations(VARIANTS, 2):
        difference = sum(abs(a - b) for a, b in zip(seen[first], seen[second], strict=True)) / len(seen[first])
        assert difference > LEAST_DIFFERENCE, (first, second, difference)
