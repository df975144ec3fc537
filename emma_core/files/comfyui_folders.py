"""The model folders of a ComfyUI, without ComfyUI: names are looked up as its nodes do, its extra_model_paths.yaml honoured."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SettingsError, short
from .plain_file import is_there, read_text

# folder keys that have several folders below models/, or another one than their name
_FOLDERS = {"text_encoders": ("text_encoders", "clip"), "diffusion_models": ("unet", "diffusion_models")}
_OLD_KEYS = {"clip": "text_encoders", "unet": "diffusion_models"}
_YAML, _LARGEST = "extra_model_paths.yaml", 1 << 16  # bytes, which take a second or two to read
_PACK = Path(__file__).absolute().parents[2]  # not resolved: it may be a link in custom_nodes
_TOKENIZER = Path("comfy", "text_encoders", "t5_tokenizer", "tokenizer.json")


@dataclass(frozen=True)
class ModelFolders:
    """Where a ComfyUI looks for models.

    Args:
        root: the folder of its main.py.
        extra: folders by key, from its extra_model_paths.yaml; those that are the default first.
    """

    root: Path
    extra: tuple[tuple[str, Path, bool], ...] = ()

    def folders(self, key: str) -> list[Path]:
        """Every folder of a key, in the order in which ComfyUI looks into them."""
        own = [self.root / "models" / name for name in _FOLDERS.get(key, (key,))]
        added = [(path, first) for name, path, first in self.extra if name == key]
        return list(dict.fromkeys([*(path for path, first in reversed(added) if first), *own,
                                   *(path for path, first in added if not first)]))

    def find(self, name: str, keys: Sequence[str]) -> Path | None:
        """The file or folder of this name in a folder of one of these keys."""
        for key in keys:
            for folder in self.folders(key):
                path = folder / name
                if is_there(path) and path.resolve().is_relative_to(folder.resolve()):
                    return path
        return None

    @property
    def tokenizer(self) -> Path | None:
        """The standard tokenizer.json of T5, which every ComfyUI has."""
        path = self.root / _TOKENIZER
        return path if path.is_file() else None


def open_comfyui(root: Path) -> ModelFolders:
    """The model folders of the ComfyUI in this folder.

    Raises:
        SettingsError: there is none, or its extra_model_paths.yaml cannot be read.
    """
    if not _is_comfyui(root):
        raise SettingsError(f"{root} holds no ComfyUI (its main.py and models/); wanted the folder of ComfyUI's main.py. "
                            "Correct --comfyui or COMFYUI_PATH.")
    path = root / _YAML
    return ModelFolders(root, tuple(_extra(path)) if path.is_file() else ())


def find_comfyui(given: str = "", pack: Path = _PACK) -> ModelFolders | None:
    """The ComfyUI that is named, else the first of COMFYUI_PATH, else the one that the pack is installed in.

    Args:
        given: a folder, or "".
        pack: this repository.
    Raises:
        SettingsError: see `open_comfyui`, of a folder that was named.
    """
    named = [given] if given else [entry for entry in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if entry]
    if named:
        return open_comfyui(Path(named[0]).expanduser())
    above = pack.parent.parent
    return open_comfyui(above) if pack.parent.name == "custom_nodes" and _is_comfyui(above) else None


def _is_comfyui(root: Path) -> bool:
    return (root / "main.py").is_file() and (root / "models").is_dir()


def _extra(path: Path) -> Iterator[tuple[str, Path, bool]]:
    """Key, folder, and whether it is a default, of each line of a file."""
    import yaml

    wanted = "wanted sections with folders, as in ComfyUI's extra_model_paths.yaml.example. Correct it."
    try:
        sections = yaml.safe_load(read_text(path, "ComfyUI's extra_model_paths.yaml", SettingsError, _LARGEST))
    except (yaml.YAMLError, ValueError, RecursionError) as found:  # ValueError of dates that are none
        raise SettingsError(f"{path} is not YAML ({short(' '.join(str(found).split()), 200)}); {wanted}") from None
    if sections is None:
        return
    if not isinstance(sections, Mapping):
        raise SettingsError(f"{path} holds {short(sections)}; {wanted}")
    for name, section in sections.items():
        if isinstance(section, Mapping):
            yield from _of_section(section, path.parent)
        elif section is not None:
            raise SettingsError(f"{path}: the section {short(name)} holds {short(section)}; {wanted}")


def _of_section(section: Mapping[Any, Any], home: Path) -> Iterator[tuple[str, Path, bool]]:
    given = section.get("base_path") or ""
    if not isinstance(given, str):  # of lists in lists that name each other the text would never end
        raise SettingsError(f"{home / _YAML} has base_path = {short(given)}; wanted a folder. Correct it.")
    base = home / os.path.expandvars(os.path.expanduser(given))
    for key, value in section.items():
        if key in ("base_path", "is_default") or not isinstance(value, str):
            continue
        for line in filter(None, map(str.strip, value.splitlines())):
            yield _OLD_KEYS.get(key, key), Path(os.path.normpath(base / line)), bool(section.get("is_default"))
