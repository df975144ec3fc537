"""What the playground says of words that it never read."""

import subprocess
import sys
from pathlib import Path

import pytest

from emma_core.errors import FileError
from emma_core.playground.words import known_words

ROOT = Path(__file__).resolve().parents[2]
HELP = ("web/docs/EMMAPlayground.md", "web/docs/EMMAPlayground/zh.md")


@pytest.mark.parametrize("prompt", ["", "woman astronaut", "emoji of a Man Cook", "astronaut, woman", "(old:1.3) man, person"])
def test_prompts_of_known_words_are_passed_in_silence(prompt):
    assert known_words().notice(prompt) == ""


@pytest.mark.parametrize(("prompt", "unknown"), [
    ("a cat", {"cat": ""}),
    ("woman doctor", {"doctor": "health worker"}),
    ("Chefs and wizards", {"chefs": "cook", "and": "", "wizards": "mage"}),
    ("man astronuat", {"astronuat": "astronaut"}),
    ("(dark skin:1.2) woman", {"dark": "", "skin": ""}),
    ("女 judge", {"女": ""}),
])
def test_every_unknown_word_is_named_with_the_nearest_known_one(prompt, unknown):
    assert known_words().unknown(prompt) == unknown
    notice = known_words().notice(prompt)
    assert all(repr(word) in notice and repr(near) in notice for word, near in unknown.items() if near)


def test_every_synonym_leads_to_words_that_are_known():
    words = known_words()
    assert all(words.unknown(near) == {} and words.unknown(word) for word, near in words.synonyms.items())


@pytest.mark.parametrize("page", HELP)
def test_the_help_page_names_every_word_that_is_known(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [word for name in known_words().names for word in name.split() if word not in text] == []


def test_generate_says_so_beside_the_picture(tmp_path):
    command = [sys.executable, "-m", "emma_core", "generate", "woman doctor", "--sampling.steps", "2", "--device", "cpu"]
    ran = subprocess.run([*command, "--out", str(tmp_path / "drawn")], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "'doctor' (nearest: 'health worker')" in ran.stderr
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 1


def test_a_damaged_list_is_refused(tmp_path):
    (tmp_path / "words.json").write_text("[1")
    with pytest.raises(FileError, match="words.json"):
        known_words(tmp_path / "words.json")
