"""Captions as Hugging Face's imagefolder keeps them: `metadata.jsonl` with {"file_name": ..., "text": ...} on each line."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

from ..errors import FileError, short
from ..files.json_file import JsonFault, loads
from ..files.plain_file import read_text

METADATA = "metadata.jsonl"
_CAPTIONS = ("text", "caption")
_LARGEST = 256 << 20  # bytes


def read_metadata(path: Path, pictures: Set[Path]) -> tuple[dict[Path, str], list[str]]:
    """The captions of pictures that have none else, and why lines are not used.

    Args:
        path: of the file; names in it are relative to its folder.
        pictures: those without a caption file.
    """
    try:
        lines = read_text(path, "a list of captions", FileError, _LARGEST).splitlines()
    except FileError as found:
        return {}, [f"not read: {found}"]
    told: dict[Path, str] = {}
    lost: dict[str, list[int]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            picture, text, reason = _read_line(line, path.parent)
            if not reason and (picture not in pictures or picture in told):
                reason = "its file_name is no picture here that lacks a caption"
            if reason:
                lost.setdefault(reason, []).append(number)
            else:
                told[picture] = text
    return told, [f"{_lines(numbers)} not used: {reason}" for reason, numbers in lost.items()]


def _read_line(line: str, home: Path) -> tuple[Path, str, str]:
    """The picture, its caption, and why the line cannot be used ("": it can)."""
    try:
        entry = loads(line)
    except JsonFault as found:
        return home, "", f"it {short(str(found))}"
    name = entry.get("file_name") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        return home, "", "it has no file_name"
    texts = [text for key in _CAPTIONS if isinstance(text := entry.get(key), str)]
    if len(texts) != 1:
        return home, "", f"it has {'both text and caption' if texts else 'neither text nor caption'}; wanted one of them"
    return home / name, texts[0].strip(), ""


def _lines(numbers: list[int]) -> str:
    return f"line {numbers[0]}" + (f" and {len(numbers) - 1} more" if len(numbers) > 1 else "")
