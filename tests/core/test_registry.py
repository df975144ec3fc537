"""What pyproject.toml tells the Comfy registry agrees with the files that it speaks of."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LARGEST_ICON_PX = 400
# what the registry's reviewers look for; a tensor's or a model's .eval() is neither
STARTS_PROCESSES_OR_CODE = re.compile(r"\bsubprocess\b|os\.system|os\.popen|(?<![.\w])(?:eval|exec)\(")


def requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def shown(key: str) -> Image.Image:
    """The picture in this checkout that an address of pyproject.toml stands for."""
    path = re.fullmatch(r"https://raw\.githubusercontent\.com/[^/]+/[^/]+/main/(.+)", PROJECT["tool"]["comfy"][key])[1]
    return Image.open(ROOT / path)


def test_dependencies_are_those_of_the_requirement_files():
    comfyui, alone = requirements("requirements.txt"), requirements("requirements/standalone.txt")
    assert len(comfyui) > 2 and PROJECT["project"]["dependencies"] == comfyui + alone


def test_icon_and_banner_have_the_sizes_that_the_registry_takes():
    icon, banner = shown("Icon"), shown("Banner")
    assert icon.width == icon.height <= LARGEST_ICON_PX
    assert banner.width * 9 == banner.height * 21


def test_every_address_and_the_publisher_have_one_owner():
    """So that filling it in is one substitution."""
    owners = {re.match(r"https://(?:raw\.githubusercontent|github)\.com/([^/]+)/", address)[1]
              for address in [*PROJECT["project"]["urls"].values(),
                              PROJECT["tool"]["comfy"]["Icon"], PROJECT["tool"]["comfy"]["Banner"]]}
    publish = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert owners == {PROJECT["tool"]["comfy"]["PublisherId"]} == set(re.findall(r"repository_owner == '(.+)'", publish))


def test_shipped_graphs_say_that_our_nodes_come_from_this_name():
    """By it the editor offers to install what a graph lacks."""
    names = set()
    for path in [*(ROOT / "workflows").glob("*.json"), *(ROOT / "subgraphs").glob("*.json")]:
        graph = json.loads(path.read_text(encoding="utf-8"))
        inner = [node for one in graph.get("definitions", {}).get("subgraphs", []) for node in one["nodes"]]
        names |= {node["properties"].get("cnr_id") for node in [*graph["nodes"], *inner] if node["type"].startswith("EMMA")}
    assert names == {PROJECT["project"]["name"]}


@pytest.fixture(scope="module")
def left_out() -> set[str]:
    """What git has and .comfyignore keeps out of the archive; its patterns are git's own."""
    listed = subprocess.run(["git", "ls-files", "-c", "-i", "--exclude-from=.comfyignore"], cwd=ROOT, capture_output=True,
                            text=True, check=True)
    return set(listed.stdout.splitlines())


def test_every_line_of_comfyignore_leaves_something_out(left_out):
    for line in requirements(".comfyignore"):
        start, _, end = line.strip("/").partition("*")
        assert any(path.startswith(start) and path.endswith(end) for path in left_out), line


def test_what_is_published_starts_no_process(left_out):
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    published = [path for path in tracked if path not in left_out and (ROOT / path).is_file()]
    assert len(published) > 100 and {"harness/server.py", "run.py"} <= left_out
    found = [path for path in published if STARTS_PROCESSES_OR_CODE.search((ROOT / path).read_text(encoding="utf-8"))]
    assert not found
