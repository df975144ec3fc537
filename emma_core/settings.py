"""Settings of any command: frozen dataclasses by section, read from a TOML file and flags; unknown keys are refused.

Every key is `section.key` in the file and `--section.key` on the command line.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .errors import SettingsError, short

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LARGEST_INTEGER = 1 << 64  # seeds reach it
_LARGEST, _MOST_PARTS = 1 << 20, 100  # bytes of a file, and parts of a key, whose square the parser's time grows with
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def key(default: Any, explain: str, *, choices: tuple[str, ...] = (), least: float | None = None,
        most: float | None = None, folders: tuple[str, ...] = ()) -> Any:
    """A key of a section: its default, its explanation for ``--help``, and the values it may have.

    Args:
        folders: keys of ComfyUI's model folders that a file named by its name lies in.
    """
    limits = {"help": explain, "choices": choices, "least": least, "most": most, "folders": folders}
    metadata = {name: value for name, value in limits.items() if value not in (None, ())}
    return dataclasses.field(default=default, metadata=metadata)


def toml_of(config: Any) -> str:
    """The sections of a configuration as TOML; JSON's strings, numbers and lists are TOML's too."""
    lines = []
    for section in sections(type(config)):
        lines += ["", f"[{section}]"]
        values = dataclasses.asdict(getattr(config, section))
        # TOML has no surrogate pairs, which JSON would make of an emoji
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def sections(of: type) -> dict[str, type]:
    """Section name -> its dataclass, of a class of configurations."""
    return {name: kind for name, kind in get_type_hints(of).items() if dataclasses.is_dataclass(kind)}


def read_toml(path: str | Path) -> dict[str, Any]:
    """The file's tables.

    Raises:
        SettingsError: missing, or no TOML.
    """
    path = Path(path)
    try:
        if not path.is_file():  # of a pipe the end may never come
            raise SettingsError(f"{path} cannot be read (no file of this name); wanted a configuration (TOML). Check the path.")
        if path.stat().st_size > _LARGEST:
            raise SettingsError(f"{path} holds {path.stat().st_size:,} bytes; wanted a configuration (TOML). Check the path.")
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows begin files with a byte order mark
    except OSError as found:
        raise SettingsError(f"{path} cannot be read ({found.strerror}); wanted a configuration (TOML). Check the path."
                            ) from found
    except UnicodeDecodeError as found:
        raise SettingsError(f"{path} is not TOML: {found}. Save it as UTF-8.") from found
    if any(line.partition("=")[0].count(".") > _MOST_PARTS for line in text.splitlines()):
        raise SettingsError(f"{path} has a key of more than {_MOST_PARTS} parts; wanted section.key. Correct that place.")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as found:  # also of numbers of thousands of digits, of tables in tables in tables
        paths = " Paths of Windows go between single quotes, 'C:\\pictures', or with / in them." if "\\" in text else ""
        raise SettingsError(f"{path} is not TOML: {short(str(found), 300)}. Correct that place.{paths}") from found


def resolve_sections(
    of: type, given: Mapping[str, Any], changes: Mapping[str, Any] | None = None,
    begin: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The sections of a class of configurations: defaults, then ``begin``, then a file's tables, then `section.key` changes.

    Raises:
        SettingsError: an unknown section or key, a value of the wrong kind or out of range.
    """
    merged: dict[str, dict[str, Any]] = {name: dict((begin or {}).get(name, {})) for name in sections(of)}
    for name, table in given.items():
        if name not in merged or not isinstance(table, Mapping):
            raise SettingsError(f"the configuration has {short(repr(name))}, which is no section; wanted {', '.join(merged)}.")
        merged[name].update(table)
    for path, value in (changes or {}).items():
        section, _, key = path.partition(".")
        merged[section][key] = value
    return {name: _section(name, kind, merged[name]) for name, kind in sections(of).items()}


def _section(name: str, kind: type, table: Mapping[str, Any]) -> Any:
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise SettingsError(f"[{name}] has the unknown key {short(repr(unknown[0]))}; it knows {', '.join(known)}. Correct the "
                            "name.")
    hints = get_type_hints(kind)
    return kind(**{key: _value(f"{name}.{key}", value, hints[key], known[key].metadata) for key, value in table.items()})


def _value(path: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, get_args(kind)[0]) for item in value):
            raise SettingsError(f"{path} = {short(repr(value))}; wanted a list of texts.")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < _LARGEST_INTEGER else math.inf
    odd = kind is int and (isinstance(value, bool) or (isinstance(value, int) and abs(value) >= _LARGEST_INTEGER))
    if not isinstance(value, kind) or odd:
        raise SettingsError(f"{path} = {short(repr(value))}; wanted {_NAMES[kind]}.")
    if "choices" in limits and value not in limits["choices"]:
        raise SettingsError(f"{path} = {short(repr(value))}; choose one of {', '.join(limits['choices'])}.")
    if not limits.get("least", value) <= value <= limits.get("most", value):
        raise SettingsError(f"{path} = {short(repr(value))}; wanted {limits.get('least', '')} to {limits.get('most', 'any')}.")
    return value
