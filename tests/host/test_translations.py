"""What the editor shows of a node: its help page and its texts in other languages, as the running server gives them."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh", "zh-TW", "ja", "ko", "fr", "es")
HELP_LANGUAGES = ("en", "zh")
# how the editor builds the addresses of help pages, whatever its minified names are
_HELP_ADDRESS = r"/extensions/\$\{\w+\}/docs/\$\{\w+\.name\}"
HELP_ADDRESSES = (rf"{_HELP_ADDRESS}/\$\{{\w+\}}\.md", rf"{_HELP_ADDRESS}\.md")


@pytest.fixture(scope="module")
def infos(server):
    """What the editor is told about each of our nodes."""
    return {name: info for name, info in server.get_json("/object_info").items()
            if info["python_module"] == f"custom_nodes.{PACK.name}"}


@pytest.fixture(scope="module")
def shown(server):
    """Language -> the texts that the editor merges into its own, those of packs beside this one among them."""
    return server.get_json("/i18n")


def texts(language: str, name: str) -> dict:
    return json.loads((PACK / "locales" / language / name).read_text(encoding="utf-8"))


def inputs(info: dict) -> dict[str, dict]:
    return {key: options[0] if options else {} for kind in ("required", "optional")
            for key, (_, *options) in info["input"].get(kind, {}).items()}


def named_outputs(info: dict) -> set[str]:
    """Slots whose name the editor looks up; one that is named as its type gets the translation of the type."""
    kinds_and_names = zip(info["output"], info["output_name"], strict=True)
    return {str(slot) for slot, (kind, name) in enumerate(kinds_and_names) if kind != name}


def get_text(server, path: str) -> str | None:
    """The text at a path, None where the server has nothing."""
    try:
        with urllib.request.urlopen(server.url + urllib.parse.quote(path), timeout=60) as answer:
            return answer.read().decode("utf-8")
    except urllib.error.HTTPError as refusal:
        assert refusal.code == 404
        return None


def help_page(server, info: dict, language: str) -> str | None:
    """As the editor looks for it: the page of its language, else the one for all."""
    folder = f"/extensions/{info['python_module'].split('.')[1]}/docs/{info['name']}"
    return get_text(server, f"{folder}/{language}.md") or get_text(server, f"{folder}.md")


def test_english_texts_are_those_of_the_nodes(infos):
    found = texts("en", "nodeDefs.json")
    assert found.keys() == infos.keys() and len(infos) > 10
    for name, info in infos.items():
        wanted = {
            "display_name": info["display_name"], "description": info["description"],
            "inputs": {key: {"name": key, "tooltip": options["tooltip"]} for key, options in inputs(info).items()},
            "outputs": {str(slot): {"tooltip": tooltip} for slot, tooltip in enumerate(info["output_tooltips"] or ())},
        }
        for slot in named_outputs(info):
            wanted["outputs"][slot]["name"] = info["output_name"][int(slot)]
        assert {"inputs": {}, "outputs": {}, **found[name]} == wanted, name


@pytest.mark.parametrize("language", LANGUAGES)
def test_server_gives_every_text_in_every_language(shown, infos, language):
    found = texts(language, "nodeDefs.json")
    assert found.keys() == infos.keys()
    for name, info in infos.items():
        assert shown[language]["nodeDefs"][name] == found[name]
        entry = {"inputs": {}, "outputs": {}, **found[name]}
        assert entry["inputs"].keys() == inputs(info).keys(), name
        assert {slot for slot, one in entry["outputs"].items() if "name" in one} == named_outputs(info), name
        assert len(entry["outputs"]) == len(info["output"]), name


@pytest.mark.parametrize("language", LANGUAGES)
def test_types_of_the_pack_have_names(shown, infos, host_nodes, language):
    stock = {kind for node in host_nodes.NODE_CLASS_MAPPINGS.values() for kind in getattr(node, "RETURN_TYPES", ())
             if "EMMA" not in node.__name__ and isinstance(kind, str)}
    own = {kind for info in infos.values() for kind in info["output"]} - stock
    names = texts(language, "main.json")["dataTypes"]
    assert names.keys() == own and "EMMA_MODULE" in own
    assert names.items() <= shown[language]["dataTypes"].items()


def test_editor_looks_for_help_where_it_lies():
    import comfyui_frontend_package

    scripts = (Path(comfyui_frontend_package.__file__).parent / "static" / "assets").glob("*.js")
    found = {address for script in scripts for address in HELP_ADDRESSES
             if re.search(address, script.read_text(encoding="utf-8", errors="replace"))}
    assert found == set(HELP_ADDRESSES)


@pytest.mark.parametrize("language", HELP_LANGUAGES)
def test_help_page_names_every_input_and_output(server, infos, language):
    for name, info in infos.items():
        text = help_page(server, info, language)
        assert text is not None, name
        missing = [key for key in (*inputs(info), *info["output_name"]) if f"`{key}`" not in text]
        assert not missing, (name, missing)


def test_help_in_other_languages_is_english(server, infos):
    for name, info in infos.items():
        english = (PACK / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert help_page(server, info, "ru") == help_page(server, info, "en") == english
        assert help_page(server, info, "zh") != english


def test_editor_loads_two_scripts_of_the_pack(server):
    own = f"/extensions/{PACK.name}/"
    found = sorted(path.removeprefix(own) for path in server.get_json("/extensions") if path.startswith(own))
    assert found == ["colours.js", "old_graphs.js"]
