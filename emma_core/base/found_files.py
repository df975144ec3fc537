"""Settings that name files as ComfyUI does, by their names in its model folders, become paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from ..errors import SettingsError, TextEncoderFileError
from ..files.comfyui_folders import ModelFolders
from ..files.plain_file import is_there
from ..playground import PLAYGROUND
from ..settings import sections
from ..text.t5_file import open_t5_file
from ..text.t5_tokenizer import has_standard_vocabulary
from .config import EllaConfig

Config = TypeVar("Config")


def with_found_files(config: Config, comfyui: ModelFolders | None, strict: bool = True) -> Config:
    """A configuration whose files are paths: what is no path is looked up in the folders that its key declares.

    A T5 without a tokenizer of its own gets ComfyUI's standard one.

    Args:
        config: of any command; keys declare `folders`.
        comfyui: where names are looked up; None: only paths are known.
        strict: refuse a name that is in none of the folders; else it stays as it is, for checks that tell all faults at once.
    Raises:
        SettingsError: a name that is in none of the folders; they are all named.
    """
    if comfyui is None:
        return config

    def found_or_given(setting: str, value: Any, keys: Sequence[str]) -> Any:
        try:
            return _found(setting, value, keys, comfyui)
        except SettingsError:
            if strict:
                raise
            return value

    changed = {}
    for name, kind in sections(type(config)).items():
        section = getattr(config, name)
        found = {entry.name: found_or_given(f"{name}.{entry.name}", getattr(section, entry.name), entry.metadata["folders"])
                 for entry in dataclasses.fields(kind) if "folders" in entry.metadata}
        changed[name] = _with_tokenizer(dataclasses.replace(section, **found), comfyui)
    return dataclasses.replace(config, **changed)


def found_file(setting: str, name: str, keys: Sequence[str], comfyui: ModelFolders | None) -> str:
    """One path, as `with_found_files` finds it.

    Raises:
        SettingsError: see `with_found_files`.
    """
    if not name or name == PLAYGROUND or comfyui is None or is_there(name):
        return name
    path = comfyui.find(name, keys)
    if path is None:
        folders = list(dict.fromkeys(str(folder) for key in keys for folder in comfyui.folders(key)))
        raise SettingsError(f"{setting} = {name!r} does not exist, as a path or in ComfyUI's folders ({', '.join(folders)}). "
                            "Check the name; nothing is downloaded.")
    return str(path)


def _found(setting: str, value: Any, keys: Sequence[str], comfyui: ModelFolders) -> Any:
    if isinstance(value, tuple):
        return tuple(found_file(setting, name, keys, comfyui) for name in value)
    return found_file(setting, value, keys, comfyui)


def tokenizer_of(text_encoder: str, comfyui: ModelFolders | None) -> str:
    """ComfyUI's standard tokenizer for a T5 without one of its own, which it suits; else ""."""
    if not text_encoder or comfyui is None or comfyui.tokenizer is None:
        return ""
    try:
        file = open_t5_file(text_encoder)
    except TextEncoderFileError:
        return ""  # told where it is loaded
    return str(comfyui.tokenizer) if file.tokenizer_path is None and has_standard_vocabulary(file) else ""


def _with_tokenizer(section: Any, comfyui: ModelFolders) -> Any:
    if not isinstance(section, EllaConfig) or section.tokenizer:
        return section
    return dataclasses.replace(section, tokenizer=tokenizer_of(section.text_encoder, comfyui))
