"""The demo and the workflow that it changes agree."""

import json

from emma_core.playground import PLAYGROUND_DIR
from lab.demo import ROWS, VARIANTS, WORKFLOW


def test_the_shipped_workflow_has_what_the_demo_changes():
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    titles = [node.get("title") for node in workflow["nodes"]]
    for title in ("prompt", "style reference", "face reference", *VARIANTS):
        assert titles.count(title) == 1
    assert len(ROWS) >= 4
    for row in ROWS:
        for name in (row.style, row.face):
            assert (PLAYGROUND_DIR / "references" / f"{name}.png").is_file()
