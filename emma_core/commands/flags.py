"""What commands share: a flag for every key of their settings, and how a run is ended."""

from __future__ import annotations

import argparse
import dataclasses
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from ..base.config import BaseConfig, EllaConfig
from ..base.found_files import found_file, tokenizer_of
from ..files.comfyui_folders import find_comfyui
from ..settings import sections


def _folders(of: type, key: str) -> tuple[str, ...]:
    return next(entry.metadata["folders"] for entry in dataclasses.fields(of) if entry.name == key)


# arguments of commands that have no configuration: as messages name them, and where ComfyUI has such files
_MODEL_FILES = {
    "file": ("the module", ("emma",)), "ella": ("--ella", _folders(EllaConfig, "file")),
    "text_encoder": ("--text-encoder", _folders(EllaConfig, "text_encoder")),
    "checkpoint": ("--checkpoint", _folders(BaseConfig, "checkpoint")),
}


def add_keys(parser: argparse.ArgumentParser, of: type) -> None:
    """A flag `--section.key` for each key of a class of configurations."""
    for section, kind in sections(of).items():
        group = parser.add_argument_group(section, (kind.__doc__ or "").splitlines()[0])
        hints = get_type_hints(kind)
        for entry in dataclasses.fields(kind):
            group.add_argument(f"--{section}.{entry.name}", dest=f"{section}.{entry.name}", default=None,
                               **_flag(hints[entry.name], entry))


def add_comfyui(parser: argparse.ArgumentParser) -> None:
    """The flag `--comfyui`."""
    parser.add_argument("--comfyui", default="", metavar="DIR",
                        help="a ComfyUI: files may be named as in its model folders, its extra_model_paths.yaml honoured "
                             "(default: the first of COMFYUI_PATH, or the ComfyUI that this pack is installed in)")


def find_files(options: argparse.Namespace) -> argparse.Namespace:
    """Arguments with the model files that they name as paths, as settings of runs are; a T5's tokenizer as ``tokenizer``.

    Args:
        options: of a parser with `add_comfyui`.
    Raises:
        SettingsError: see `found_file` and `find_comfyui`.
    """
    comfyui, found = find_comfyui(options.comfyui), {}
    for name, (flag, folders) in _MODEL_FILES.items():
        if value := getattr(options, name, None):
            found[name] = Path(found_file(flag, str(value), folders, comfyui))
    text_encoder = str(found.get("text_encoder", ""))
    return argparse.Namespace(**{**vars(options), **found, "tokenizer": tokenizer_of(text_encoder, comfyui)})


def changes_of(options: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given: `section.key` -> value."""
    return {path: tuple(value) if isinstance(value, list) else value
            for path, value in vars(options).items() if "." in path and value is not None}


def end_as_interrupt() -> None:
    """Let SIGTERM, which is how clusters and timeouts end a run, do what Ctrl-C does."""
    def stop(number, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def _flag(kind: Any, entry: dataclasses.Field) -> dict[str, Any]:
    default = entry.default if entry.default not in ("", ()) else None
    explain = entry.metadata["help"].replace("%", "%%") + (f" (default: {default})" if default is not None else "")
    if get_origin(kind) is tuple:
        return {"nargs": "+", "metavar": "TEXT", "help": explain}
    if kind is bool:
        return {"type": _boolean, "metavar": "true|false", "help": explain}
    choices: Sequence[str] | None = entry.metadata.get("choices")
    if choices:
        return {"choices": list(choices), "help": explain}
    return {"type": kind, "metavar": kind.__name__.upper(), "help": explain}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}; wanted true or false")
    return text.lower() == "true"
