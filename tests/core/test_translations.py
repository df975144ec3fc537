"""Translations and help pages beside each other, the English ones and the code; whether they tell what the nodes are is
tested in the host.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCALES, HELP = ROOT / "locales", ROOT / "web" / "docs"
WANTED = {"en", "zh", "zh-TW", "ja", "ko", "fr", "es"}
TRANSLATED = sorted(WANTED - {"en"})
# words that none of the other languages has
ENGLISH = re.compile(r"\b(the|of|and|with|from|is|are|this|which)\b", re.IGNORECASE)
OWN_LETTERS = {"zh": r"[\u4e00-\u9fff]", "zh-TW": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff]", "ko": r"[\uac00-\ud7a3]"}
# paths, file names, numbers and other words with a digit, an underscore, a slash or a star
LITERAL = re.compile(r"[\w.*/-]*[\d_/*][\w.*/-]*", re.ASCII)
MARKS_OF_RELATED = {"en": ("**Related:** ", ", "), "zh": ("**相关：** ", "、")}


def read(language: str, name: str) -> dict:
    return json.loads((LOCALES / language / name).read_text(encoding="utf-8"))


def texts(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text of a tree with its path."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from texts(value, (*path, key))
        else:
            yield (*path, key), value


NODES = {language: read(language, "nodeDefs.json") for language in WANTED}
TITLES = {language: {node: entry["display_name"] for node, entry in nodes.items()} for language, nodes in NODES.items()}


def page(node: str, language: str) -> str:
    path = HELP / f"{node}.md" if language == "en" else HELP / node / f"{language}.md"
    return path.read_text(encoding="utf-8")


def code_texts() -> list[str]:
    """Every text in the code, what is filled in left out."""
    found = []
    for part in ("nodes", "host", "emma_core"):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    found.append("\0".join(part.value for part in node.values if isinstance(part, ast.Constant)))
    return found


def test_languages_are_those_promised():
    assert {path.name for path in LOCALES.iterdir()} == WANTED


@pytest.mark.parametrize("name", ["nodeDefs.json", "main.json"])
@pytest.mark.parametrize("language", TRANSLATED)
def test_every_text_is_translated_and_no_other_is_there(language, name):
    english, translated = dict(texts(read("en", name))), dict(texts(read(language, name)))
    assert translated.keys() == english.keys()
    assert all(text.strip() == text and text for text in translated.values())
    copies = [path for path, text in translated.items() if text == english[path] and len(text) > 12]
    assert not copies and not [path for path, text in translated.items() if ENGLISH.search(text)]


@pytest.mark.parametrize("language", sorted(OWN_LETTERS))
def test_sentences_are_in_their_script(language):
    for path, text in texts(NODES[language]):
        assert path[-1] == "name" or re.search(OWN_LETTERS[language], text), path


@pytest.mark.parametrize("language", sorted(WANTED))
def test_texts_hold_nothing_that_the_editor_would_compile(language):
    """vue-i18n fills in braces, follows @ and splits at |."""
    for name in ("nodeDefs.json", "main.json"):
        assert not [path for path, text in texts(read(language, name)) if set(text) & set("{}@|")]


@pytest.mark.parametrize("language", TRANSLATED)
def test_paths_and_numbers_stay_as_they_are(language):
    translated = dict(texts(NODES[language]))
    for path, text in texts(NODES["en"]):
        if path[-1] in ("tooltip", "description"):
            words = [found.strip(".-").removesuffix("-like") for found in LITERAL.findall(text)]
            assert not [word for word in words if word not in translated[path]], path


@pytest.mark.parametrize("language", TRANSLATED)
def test_other_nodes_are_called_as_the_editor_calls_them(language):
    titles = sorted(TITLES["en"].items(), key=lambda item: -len(item[1]))
    mention = re.compile("|".join(re.escape(title) for _, title in titles))
    node_of = {title: node for node, title in titles}
    translated = dict(texts(NODES[language]))
    for path, text in texts(NODES["en"]):
        for title in mention.findall(text):
            assert TITLES[language][node_of[title]] in translated[path], (path, title)


@pytest.mark.parametrize("language", sorted(WANTED))
def test_no_two_nodes_or_inputs_of_a_node_have_one_name(language):
    assert len(set(TITLES[language].values())) == len(TITLES[language])
    for node, entry in NODES[language].items():
        names = [one["name"] for one in entry.get("inputs", {}).values()]
        assert len(set(names)) == len(names), node


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("node", sorted(NODES["en"]))
def test_help_names_every_input_and_the_nodes_around(node, language):
    text, entry = page(node, language), NODES[language][node]
    assert text.startswith(f"# {entry['display_name']}\n")
    for key, one in entry.get("inputs", {}).items():
        assert (f"`{key}`" if language == "en" else f"`{key}` {one['name']}") in text, key
    mark, comma = MARKS_OF_RELATED[language]
    related = text.rstrip().splitlines()[-1].removeprefix(mark).split(comma)
    assert related and set(related) < set(TITLES[language].values()) - {entry["display_name"]}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_messages_in_help_are_those_of_the_code(language):
    known = code_texts()
    for node in NODES["en"]:
        messages = re.findall(r"^\| \*(.+?)\* \|", page(node, language), re.MULTILINE)
        assert messages, node
        assert not [message for message in messages if not any(message in text for text in known)], node


def test_every_socket_type_of_ours_has_a_colour():
    text = (HELP.parent / "colours.js").read_text(encoding="utf-8")
    named = re.findall(r"\b([A-Z_]+): \"(#[0-9a-f]{6})\"", text)
    types = json.loads((HELP.parents[1] / "locales" / "en" / "main.json").read_text(encoding="utf-8"))["dataTypes"]
    assert {name for name, _ in named} == types.keys() and len({colour for _, colour in named}) == len(types)


def test_help_pages_are_those_of_the_nodes():
    wanted = {Path(f"{node}.md") for node in NODES["en"]} | {Path(node) / "zh.md" for node in NODES["en"]}
    assert {path.relative_to(HELP) for path in HELP.rglob("*") if path.is_file()} == wanted
    scripts = {path.name for path in HELP.parent.rglob("*") if path.is_file() and path.suffix != ".md"}
    assert scripts == {"colours.js", "old_graphs.js"}
