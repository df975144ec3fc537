"""Which words the playground's texts were made of, and what is nearest to a word that it never read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ..files.json_file import read_json
from . import PLAYGROUND_DIR

_ALIKE = 0.8  # of the letters: a slip of the pen, not another word
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class KnownWords:
    """What a small text encoder learnt to read.

    Args:
        names: of what it can draw, such as "woman astronaut".
        around: words that stood around names, such as "a".
        synonyms: everyday word -> the name, or the part of one, that it learnt instead.
    """

    names: tuple[str, ...]
    around: tuple[str, ...]
    synonyms: dict[str, str]

    @property
    def words(self) -> set[str]:
        """Every single word it read."""
        return {word for text in (*self.names, *self.around) for word in text.split()}

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
        return (f"EMMA playground: the prompt {prompt!r} has words that this small model never read: {told}. It knows "
                f"{len(self.names)} names, such as {self.names[-1]!r}: see the help page of Load EMMA Playground. Style, skin "
                "and hair come from reference pictures.")

    def _nearest(self, word: str) -> str:
        named = {part: part for name in self.names for part in name.split()} | self.synonyms
        alike = get_close_matches(word, named, 1, _ALIKE)
        return named[alike[0]] if alike else ""


def known_words(path: Path = PLAYGROUND_DIR / "words.json") -> KnownWords:
    """The shipped playground's.

    Raises:
        FileError: the file is missing or damaged.
    """
    entry = read_json(path, "the playground's list of words")
    return KnownWords(tuple(entry["names"]), tuple(entry["around"]), entry["synonyms"])
