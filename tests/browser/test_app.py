"""The playground as an app: a form beside the picture. Hosts without app mode open its graph."""

from __future__ import annotations

import pytest
from frontends import close_app_tour, has_apps
from graphs import APP, read_graph

LEAST_SPREAD = 40


@pytest.fixture
def app(open_editor):
    """The editor with the app opened."""
    editor = open_editor()
    editor.open_template(APP.stem, read_graph(APP))
    return editor


def test_form_asks_for_prompt_references_and_strengths_and_shows_the_picture(app):
    if not has_apps(app.page):
        pytest.skip("this host's editor has no app mode")
    close_app_tour(app.page)
    form = app.page.get_by_test_id("linear-widgets")
    app.screenshot("app")
    graph = read_graph(APP)
    labels = [socket["label"] for node in graph["nodes"] for socket in node["inputs"] if "label" in socket]
    assert form.get_by_text("prompt", exact=True).is_visible() and len(labels) == len(graph["extra"]["linearData"]["inputs"])
    for label in labels:
        assert form.get_by_text(label, exact=True).count() == 1, label
    before = app.prompt()
    form.locator("textarea").first.fill("man farmer")
    app.run()
    shown = app.page.get_by_test_id("linear-outputs").locator("img")
    shown.first.wait_for()
    app.screenshot("app-after-run")
    changed = {key for key, node in app.prompt().items() if node != before[key]}
    assert [before[key]["_meta"]["title"] for key in changed] == ["prompt"]
    assert not app.shows_error() and not app.new_complaints()


def test_app_is_the_first_graph(app):
    assert not app.missing_types() and not app.red_nodes() and not app.new_complaints()
