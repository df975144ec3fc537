"""JSON of strangers, read so that what comes out can be used: no depth, number or text in it surprises its reader.

Python's own parser gives up on deep nesting with RecursionError and on long numbers with ValueError, and lets through halves
of surrogate pairs, which cannot be written anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from ..errors import EmmaError, FileError, short
from .plain_file import read_text

DEEPEST = 64  # lists and objects in each other
_LONGEST_NUMBER = 20  # digits: of the largest seeds, 2^64
LARGEST = 8 << 20  # bytes of a configuration or an index; the objects that it becomes take twenty times as much at most
_NAMES = {dict: "a JSON object", list: "a list", str: "text", int: "a whole number", float: "a number", bool: "true or false"}

Kind = TypeVar("Kind")


class JsonFault(ValueError):
    """What is wrong with a text that should be JSON, in a few words that begin with "is" or "has"."""


def loads(text: str, whole: bool = True) -> Any:
    """Any JSON value: at most `DEEPEST` levels, whole numbers of 20 digits, and, unless ``whole`` is False, whole characters.

    Raises:
        JsonFault: no JSON, or beyond one of these.
    """
    try:
        value = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise JsonFault(f"has lists or objects nested more than {DEEPEST} deep") from None
    except JsonFault:
        raise
    except json.JSONDecodeError as found:
        raise JsonFault(f"is not JSON ({found.msg} at line {found.lineno}, character {found.colno})") from None
    except ValueError as found:
        raise JsonFault(f"is not JSON ({found})") from None
    _check_depth(value)
    if whole and ("\\u" in text or not (text.isascii() or is_whole(text))):
        _check_characters(value)
    return value


def parse_json(text: str, where: str, error: type[EmmaError], kind: type[Kind] = dict, advice: str = "Get the file again."
               ) -> Kind:
    """A JSON value of one kind, as `loads` reads it.

    Args:
        text: the JSON.
        where: how messages call it: "x.safetensors: its `emma` metadata".
        error: exception type to raise.
        kind: dict, list, ...
        advice: what to do about it.
    Raises:
        error: no such JSON.
    """
    try:
        value = loads(text)
    except JsonFault as found:
        raise error(f"{where} {found}. {advice}") from None
    if not isinstance(value, kind):
        raise error(f"{where} is {json_kind(value)}, wanted {_NAMES[kind]}. {advice}")
    return value


def read_json(path: str | Path, what: str, error: type[EmmaError] = FileError, kind: type[Kind] = dict, most: int = LARGEST,
              advice: str = "Download it again.") -> Kind:
    """The JSON of a file of ``most`` bytes at most.

    Raises:
        error: no such file, larger, not UTF-8, no JSON of this kind.
    """
    return parse_json(read_text(path, what, error, most), str(path), error, kind, advice)


def entry_of(entries: Any, key: str, kind: type[Kind], where: str, error: type[EmmaError], default: Any = ...,
             advice: str = "Get the file again.") -> Kind:
    """The value of a key in a JSON object, of the wanted kind; whole numbers count as numbers, true and false never.

    Args:
        entries: the object.
        key, kind: of the value.
        where: how messages call the object.
        error: exception type to raise.
        default: of a key that is not there; without it the key must be there.
        advice: what to do about it.
    Raises:
        error: no such key, or a value of another kind.
    """
    value = entries.get(key, default)
    if value is default and default is not ...:
        return value
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        found = "is missing" if value is ... else f"is {json_kind(value)} ({short(value, 60)})"
        raise error(f"{where}: {short(key)} {found}, wanted {_NAMES[kind]}. {advice}")
    return value


def json_kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    return _NAMES.get(type(value), type(value).__name__)


def _whole_number(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise JsonFault(f"has a number of {len(digits)} digits; {_LONGEST_NUMBER} are the most")
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        groups = [group for group in level if isinstance(group, dict | list)]
        level = [item for group in groups for item in (group.values() if isinstance(group, dict) else group)]
    if any(isinstance(item, dict | list) for item in level):
        raise JsonFault(f"has lists or objects nested more than {DEEPEST} deep")


def _check_characters(value: Any) -> None:
    level = [value]
    while level:
        following = []
        for item in level:
            if isinstance(item, str):
                if not is_whole(item):
                    raise JsonFault(f"has half of a character (a lone surrogate) in the text {short(item, 60)}")
            elif isinstance(item, dict):
                following += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                following += item
        level = following


def is_text(value: Any) -> bool:
    """Whether a value is a text of whole characters."""
    return isinstance(value, str) and is_whole(value)


def is_whole(text: str) -> bool:
    """Whether a text can be written: it holds no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
