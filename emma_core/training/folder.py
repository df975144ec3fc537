"""What is in a folder of pictures: every file is used, or named with the reason why it is not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..files.picture_file import MASK_SUFFIX, PICTURE_SUFFIXES, readable_suffixes
from .checkpoints import checkpoints
from .metadata_file import METADATA, read_metadata

_OWN_FOLDERS, _OWN_FILES = ("samples", "cache", "tensorboard"), ("log.jsonl", "loss.png", "config.toml")
_TEXTS = (".txt", ".caption", ".captions", ".cap")
_FIRST, _SECOND = ".txt", (".caption", ".CAPTION")
_TABLES = (".csv", ".parquet")
_LOST = "belongs to no picture: there is none of this name"
_MOST_NAMED = 5


@dataclass
class Found:
    """Files of a folder, sorted by what they are for.

    Args:
        pictures: in the order of their names.
        captions: the caption file of a picture that has one.
        texts: the caption of a picture without one that a metadata.jsonl tells.
        unused: (file or files, relative to the folder; the reason).
    """

    pictures: list[Path] = field(default_factory=list)
    captions: dict[Path, Path] = field(default_factory=dict)
    texts: dict[Path, str] = field(default_factory=dict)
    unused: list[tuple[str, str]] = field(default_factory=list)


def find_in(folder: Path, caption_ending: str) -> Found:
    """Everything in a folder and the folders in it, links to others included, hidden folders not.

    Args:
        caption_ending: of caption files, as `.txt`; in small or large letters, after the picture's name or its whole name.
            Where a picture has no `.txt`, the default, a `.caption` is its caption file.
    """
    reasons: dict[str, list[str]] = defaultdict(list)
    files = sorted(_walk(folder, folder, (), reasons))
    found, readable = Found(), readable_suffixes()
    masks = {path for path in files if path.name.endswith(MASK_SUFFIX)}
    found.pictures = [path for path in files if path.suffix.lower() in readable and path not in masks]
    there = set(files)
    for picture in found.pictures:
        named = [path for path in _caption_names(picture, caption_ending) if path in there]
        if named:
            found.captions[picture] = named[0]
    tables = [path for path in files if path.name == METADATA]
    for table in tables:
        told, lost = read_metadata(table, set(found.pictures) - set(found.captions))
        found.texts |= told
        found.unused += [(table.relative_to(folder).as_posix(), reason) for reason in lost]
    stems = {*found.pictures, *(path.with_suffix("") for path in found.pictures)}
    used = {*found.pictures, *found.captions.values(), *tables,
            *(path for path in masks if path.with_name(path.name[:-len(MASK_SUFFIX)]) in stems)}
    for path in files:
        if path not in used:
            reasons[_reason(path, caption_ending, masks, stems)].append(path.relative_to(folder).as_posix())
    found.unused += [(name, _LOST) for name in reasons.pop(_LOST, ())]
    found.unused += [(_some(names), reason) for reason, names in reasons.items()]
    return found


def _walk(folder: Path, top: Path, above: tuple[Path, ...], reasons: dict[str, list[str]]) -> Iterator[Path]:
    """The files that may be used; the reasons of others are noted."""
    above = (*above, folder.resolve())
    own = _is_run(folder)
    for path in sorted(folder.iterdir()):
        name = path.relative_to(top).as_posix()
        if path.name.startswith("."):
            if not path.is_dir():
                reasons["hidden, so not read"].append(name)
        elif own and (path.name in (_OWN_FOLDERS if path.is_dir() else _OWN_FILES) or path.suffix in (".pt", ".safetensors")):
            reasons["what a training run wrote, so not learnt from"].append(name)
        elif path.is_dir() and path.resolve() in above:
            reasons["a link to a folder that it is in, so not followed"].append(name)
        elif path.is_dir():
            yield from _walk(path, top, above, reasons)
        elif path.is_file():
            yield path
        else:
            reasons["no plain file (a broken link, a pipe), so not read"].append(name)


def _is_run(folder: Path) -> bool:
    return (folder / "log.jsonl").is_file() or bool(checkpoints(folder))


def _caption_names(picture: Path, ending: str) -> Iterator[Path]:
    """Where a picture's captions may be, the first of them first."""
    for suffix in dict.fromkeys((ending, ending.lower(), ending.upper(), *(_SECOND if ending == _FIRST else ()))):
        yield picture.with_suffix(suffix)
        yield picture.with_name(picture.name + suffix)


def _reason(path: Path, caption_ending: str, masks: set[Path], stems: set[Path]) -> str:
    suffix = path.suffix.lower()
    if path in masks or suffix == caption_ending.lower():
        at_all = path in masks or path.with_suffix("") not in stems
        return _LOST if at_all else "another caption file of its picture is read"
    if suffix in PICTURE_SUFFIXES:
        return ("a picture of a kind that this Pillow cannot read, so left out; save it as PNG"
                + (", or `pip install pillow-heif`" if suffix in (".heic", ".heif") else ""))
    if suffix in _TEXTS and caption_ending == _FIRST and suffix == _SECOND[0]:
        return _LOST if path.with_suffix("") not in stems else "another caption file of its picture is read"
    if suffix in _TEXTS:
        return f"not read: caption files end in {caption_ending} here (data.caption_extension)"
    if path.stem == "metadata" and suffix in _TABLES:
        return f"not read: of Hugging Face's tables of captions only {METADATA} is; save it as one"
    return "neither a picture nor its caption or mask, so not read"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
