"""Messages may quote a stranger's file and are shown in terminals, editors and logs: what they must never hold."""

import warnings

import pytest

from emma_core.errors import EmmaWarning, FileError, TrainingDataError, printable, short

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m"


def test_no_message_moves_the_cursor_or_turns_the_text_around():
    for text in (ESCAPES, "\u202egnp.exe", "a\rb", "\0"):
        found = str(FileError(f"a{text}b"))
        assert not set(text) & set(found) & set(map(chr, [*range(32), *range(127, 160), 0x202E])), repr(found)
    assert str(FileError("\x1b[2Jx")) == "\\x1b[2Jx"


def test_half_a_surrogate_pair_can_be_written_to_any_stream():
    assert str(FileError("key \ud83d")).encode("utf-8") == b"key \\ud83d"
    assert printable("größe 🎨 字") == "größe 🎨 字"


def test_a_name_of_100_kb_leaves_a_message_of_a_few_lines():
    message = str(FileError(f"x.safetensors: {'a' * 100_000} has shape (3,); wanted (4,)."))
    assert len(message) < 2100 and message.startswith("x.safetensors: aaa") and message.endswith("wanted (4,).")
    assert "more characters" in message


def test_a_list_of_many_problems_is_shown_whole():
    lines = [f"- picture {number}.png: is empty" for number in range(5000)]
    assert str(TrainingDataError("\n".join(lines))).splitlines() == lines


@pytest.mark.parametrize(("found", "wanted"), [
    ("plain.weight", "plain.weight"), ("two\nlines\tof", "two\\nlines\\tof"), ("\x1b[2J", "\\x1b[2J"), (7, "7"),
])
def test_names_of_files_are_shown_on_one_line(found, wanted):
    assert short(found) == wanted


def test_values_of_any_size_and_depth_are_shown_short():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert len(short(deep)) < 200 and len(short(["x" * 10**6] * 10**4)) < 200 and len(short("y" * 10**6)) < 200


def test_warnings_are_as_safe_to_show():
    with pytest.warns(EmmaWarning) as told:
        warnings.warn(f"a{ESCAPES}", EmmaWarning, stacklevel=1)
    assert "\x1b" not in str(told[0].message)
