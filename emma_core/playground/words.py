"""Which words the playground's texts were made of, and what is nearest to a word that it never read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ..files.json_file import read_json
from . import PLAYGROUND_DIR

_ALIKE = 0.8  # of the letters: a slip of the pen, not another word
# letters, or a sign that is none of a keyboard's, such as an emoji
_WORD = re.compile(r"[^\W\d_]+|[^\w\s\x00-\x7f]")


@dataclass(frozen=True)
class KnownWords:
    """What a small text encoder learnt to read.

    Args:
        things: what it can draw by its usual name, such as "woman astronaut", by category.
        names: every name of these.
        around: words that stood around names, such as "a".
        synonyms: everyday word -> the name, or the part of one, that it learnt instead.
    """

    things: dict[str, list[str]]
    names: tuple[str, ...]
    around: tuple[str, ...]
    synonyms: dict[str, str]

    @property
    def words(self) -> set[str]:
        """Every single word it read."""
        return {word for text in (*self.names, *self.around) for word in _WORD.findall(text)}

    def unknown(self, prompt: str) -> dict[str, str]:
        """The prompt's words that it never read, with the nearest that it did, "" where none is near."""
        known = self.words
        return {word: self._nearest(word) for word in _WORD.findall(prompt.lower()) if word not in known}

    def notice(self, prompt: str) -> str:
        """What is to be said of a prompt, "" where every word is known."""
        unknown = self.unknown(prompt)
        if not unknown:
            return ""
        told = ", ".join(f"{word!r} (nearest: {near!r})" if near else f"{word!r}" for word, near in unknown.items())
        things = [name for names in self.things.values() for name in names]
        example = next(filter(str.isalpha, things), things[0])
        return (f"EMMA playground: the prompt {prompt!r} has words that this small model never read: {told}. It knows "
                f"{len(things):,} things, such as {example!r}: see the help page of Load EMMA Playground. Style and skin "
                "tone come best from reference pictures.")

    def _nearest(self, word: str) -> str:
        if word in self.synonyms:
            return self.synonyms[word]
        near = [one for one in self.words if one[0] == word[0] and abs(len(one) - len(word)) <= 1]
        return next(iter(get_close_matches(word, sorted(near), 1, _ALIKE)), "")


def size_notice(width_px: int, height_px: int, learnt_px: int) -> str:
    """What is to be said of a picture's size, "" of the one that was learnt."""
    if (width_px, height_px) == (learnt_px, learnt_px):
        return ""
    return (f"EMMA playground: pictures of {width_px} x {height_px}; this small model learnt {learnt_px} x {learnt_px} alone: "
            "other sizes fall apart. Draw that size, and enlarge the picture afterwards.")


def known_words(path: Path = PLAYGROUND_DIR / "words.json") -> KnownWords:
    """The shipped playground's.

    Raises:
        FileError: the file is missing or damaged.
    """
    entry = read_json(path, "the playground's list of words")
    return KnownWords(entry["things"], tuple(entry["names"]), tuple(entry["around"]), entry["synonyms"])
