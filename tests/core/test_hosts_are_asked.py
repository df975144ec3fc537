"""Host and browser tests ask a host what it can do, never which version it is: a host in between may have either."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FILES = [path for folder in ("host", "browser") for path in sorted((TESTS / folder).rglob("*.py"))]
A_VERSION = re.compile(r"v?\d+\.\d+(\.\d+)*")
ASKS = re.compile(r"host_version|HOST\.version|host\.version|COMFYUI_FRONTEND_VERSION|comfyui_version|__version__")


def version_comparisons(source: str) -> list[str]:
    """Comparisons in which a host's version, or a text that looks like a version, takes part.

    A host's own word for its version may be compared with another one's word for it: that asks whether it is the same host.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        literal = any(isinstance(part, ast.Constant) and isinstance(part.value, str) and A_VERSION.fullmatch(part.value)
                      for side in sides for part in ast.walk(side))
        asked = [side for side in sides if ASKS.search(ast.unparse(side))]
        if literal or (asked and len(asked) < len(sides)):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_test_compares_versions_of_hosts(path):
    assert not version_comparisons(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("source", [
    'if host_version == "0.3.64": pass', "if tuple(map(int, host.version.split('.'))) >= (0, 33): pass",
    'newer = page.evaluate("window.__COMFYUI_FRONTEND_VERSION__") > limit', 'x = version in ("0.3.64", "0.8.0")',
])
def test_a_comparison_of_versions_is_noticed(source):
    assert version_comparisons(source)
