"""Weights in a typed prompt, in ComfyUI's syntax: `(words:1.2)`; `(words)` for 1.1; `\\(` and `\\)` for plain brackets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from ..errors import TextInputError, short

_BRACKETS = 1.1  # of words in brackets without a number, times that around them
_DEEPEST = 64
_ESCAPED = {"(": "\ue000", ")": "\ue001"}  # private letters, which no prompt has


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """The prompt in parts of one weight each, in order; they are tokenized one by one.

    Raises:
        TextInputError: a weight that is not finite, brackets too deep in each other.
    """
    text = re.sub(r"\\([()])", lambda found: _ESCAPED[found[1]], prompt)
    parts = [(_unescaped(part), weight) for part, weight in _parts(text, 1.0, 0)]
    odd = next((part for part, weight in parts if not math.isfinite(weight)), None)
    if odd is not None:
        raise TextInputError(f"the prompt {short(prompt)} gives {short(odd)!r} a weight that is no finite number; wanted one "
                             "such as 1.2. Correct the number behind the colon.")
    return parts


def _parts(text: str, weight: float, depth: int) -> Iterator[tuple[str, float]]:
    if depth > _DEEPEST:
        raise TextInputError(f"the prompt has brackets in brackets, more than {_DEEPEST} deep. Remove some, or write "
                             "\\( and \\) for brackets that weigh nothing.")
    for group in _groups(text):
        if len(group) < 2 or group[0] != "(" or group[-1] != ")":
            yield group, weight
            continue
        words, stated = _stated(group[1:-1])
        yield from _parts(words, weight * _BRACKETS if stated is None else stated, depth + 1)


def _groups(text: str) -> Iterator[str]:
    """The outermost pairs of brackets, and what stands between them."""
    depth, begin = 0, 0
    for place, letter in enumerate(text):
        if letter == "(":
            if depth == 0 and place > begin:
                yield text[begin:place]
                begin = place
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                yield text[begin:place + 1]
                begin = place + 1
    if begin < len(text):
        yield text[begin:]


def _stated(words: str) -> tuple[str, float | None]:
    """The words before a weight, and the weight; None where none is stated."""
    before, colon, number = words.rpartition(":")
    if not (before and colon):
        return words, None
    try:
        return before, float(number)
    except ValueError:
        return words, None


def _unescaped(part: str) -> str:
    for bracket, letter in _ESCAPED.items():
        part = part.replace(letter, bracket)
    return part
