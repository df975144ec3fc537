"""What the playground says of words that it never read."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emma_core.errors import FileError
from emma_core.playground import PLAYGROUND_DIR
from emma_core.playground.words import known_words
from emma_core.text.encoder import load_text_encoder

ROOT = Path(__file__).resolve().parents[2]
HELP = ("web/docs/EMMAPlayground.md", "web/docs/EMMAPlayground/zh.md")


@pytest.mark.parametrize("prompt", ["", "woman astronaut", "an icon of a Man Cook", "astronaut, woman", "(old:1.3) man, person",
                                    "santa", "woman doctor, dark skin, noto style", "chef", "wizard", "a cat", "pizza"])
def test_prompts_of_known_words_are_passed_in_silence(prompt):
    assert known_words().notice(prompt) == ""


@pytest.mark.parametrize(("prompt", "unknown"), [
    ("a gearbox", {"gearbox": ""}),
    ("woman docter", {"docter": "doctor"}),
    ("Chefs versus wizards", {"chefs": "chef", "versus": "", "wizards": "wizard"}),
    ("man astronuat", {"astronuat": "astronaut"}),
    ("(dark skinn:1.2) woman", {"skinn": "skin"}),
    ("女 judge", {"女": ""}),
    ("🐱 cat!!!", {"🐱": ""}),
    ("king and queen", {"king": "prince", "queen": "princess"}),
    ("a knight", {"knight": "guard"}),
])
def test_every_unknown_word_is_named_with_the_nearest_known_one(prompt, unknown):
    assert known_words().unknown(prompt) == unknown
    notice = known_words().notice(prompt)
    assert all(repr(word) in notice and repr(near) in notice for word, near in unknown.items() if near)


def test_it_knows_a_thousand_things_of_every_kind():
    things = known_words().things
    assert sum(len(names) for names in things.values()) >= 1000
    assert all(known_words().notice(name) == "" for names in things.values() for name in names)
    assert all(len(things[kind]) > 50 for kind in ("Animals & Nature", "Food & Drink", "Objects", "People & Body",
                                                   "Travel & Places"))


def test_every_synonym_leads_to_words_that_are_known():
    words = known_words()
    assert words.synonyms and all(words.unknown(word) == {word: near} for word, near in words.synonyms.items())
    assert all(words.unknown(near) == {} for near in words.synonyms.values())


@pytest.mark.parametrize("prompt", ["cat!", "cat!!!", "🐱 cat", "“cat”", "cat.", "(cat)"])
def test_signs_that_it_never_read_change_no_picture(prompt):
    encode = load_text_encoder(PLAYGROUND_DIR / "t5.safetensors").encode
    assert torch.equal(encode([prompt])[0], encode(["cat"])[0])
    assert not torch.equal(encode(["cat, dark skin"])[0], encode(["cat dark skin"])[0])


@pytest.mark.parametrize("page", HELP)
def test_the_help_page_names_every_thing_that_is_known(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [name for names in known_words().things.values() for name in names if name not in text] == []


def test_generate_says_so_beside_the_picture(tmp_path):
    command = [sys.executable, "-m", "emma_core", "generate", "woman docter", "--sampling.steps", "2", "--device", "cpu",
               "--sampling.width_px", "64"]
    ran = subprocess.run([*command, "--out", str(tmp_path / "drawn")], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "'docter' (nearest: 'doctor')" in ran.stderr
    assert "pictures of 64 x 128; this small model learnt 128 x 128 alone" in ran.stderr
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 1


def test_a_damaged_list_is_refused(tmp_path):
    (tmp_path / "words.json").write_text("[1")
    with pytest.raises(FileError, match="words.json"):
        known_words(tmp_path / "words.json")
