"""Finding pictures, captions and references of a training set, and everything that is wrong with them, in one go."""

from __future__ import annotations

import hashlib
import io
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..errors import TrainingConfigError, TrainingDataError
from ..tensor_file import sha256_of_file
from .buckets import bucket_of, enlargement, open_mask, open_picture, picture_size, same_shape
from .config import DataConfig

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MASK_SUFFIX = ".mask.png"
SMALLEST_PX = 64
_KEYS = ("image", "caption", "captions", "group", "reference", "references", "mask")
_MOST_LISTED = 50


@dataclass(frozen=True)
class Example:
    """A picture to learn from.

    Args:
        name: as the set calls it: the path relative to the folder, or what the JSON line says.
        captions: one at least, "" where there is none.
        group: pictures of one group are references for each other; "" is the top level, a group too.
        references: given ones; empty: those of the group.
        mask: white on the object.
    """

    name: str
    picture: Path
    captions: tuple[str, ...]
    group: str
    references: tuple[Path, ...] = ()
    mask: Path | None = None


@dataclass(frozen=True)
class Problem:
    """What is wrong at one place; ``fatal``: training cannot start."""

    where: str
    text: str
    fatal: bool


@dataclass(frozen=True)
class PictureSet:
    """Distinct pictures under one index: those of the examples first, in order, then references that are no targets.

    Args:
        pictures, masks: by that index.
        own: of each example, the index of its picture: the first one's where several examples share a file.
        given: of each example, the indices of the references that it names.
        groups: of each example, the indices of its group, itself among them.
        own_reference: the picture itself is a reference even where its group has others.
    """

    pictures: tuple[Path, ...]
    masks: tuple[Path | None, ...]
    own: tuple[int, ...]
    given: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    own_reference: bool = False

    @classmethod
    def of(cls, examples: Sequence[Example], own_reference: bool = False) -> PictureSet:
        pictures, masks = [example.picture for example in examples], [example.mask for example in examples]
        known: dict[Path, int] = {}
        own = tuple(known.setdefault(example.picture.resolve(), index) for index, example in enumerate(examples))
        members: dict[str, dict[int, None]] = defaultdict(dict)
        for example, index in zip(examples, own, strict=True):
            members[example.group][index] = None
        groups = {name: tuple(indices) for name, indices in members.items()}
        given = []
        for example in examples:
            indices = []
            for path in example.references:
                index = known.setdefault(path.resolve(), len(pictures))
                if index == len(pictures):
                    pictures.append(path)
                    masks.append(_mask_beside(path))
                indices.append(index)
            given.append(tuple(dict.fromkeys(indices)))
        return cls(tuple(pictures), tuple(masks), own, tuple(given), tuple(groups[example.group] for example in examples),
                   own_reference)

    def references(self, example: int) -> tuple[int, ...]:
        """Given references, else the others of the group (and the picture itself, if wanted), else the picture itself."""
        own, group = self.own[example], self.groups[example]
        others = group if self.own_reference else tuple(index for index in group if index != own)
        return self.given[example] or others or (own,)

    def only_itself(self, example: int) -> bool:
        """Whether the picture has no reference but itself."""
        return (self.given[example] or self.groups[example]) == (self.own[example],)

    def used(self) -> list[int]:
        """Indices of everything that may be a reference."""
        return sorted({index for given, group in set(zip(self.given, self.groups, strict=True)) for index in given or group})


def references_of(examples: Sequence[Example], own_reference: bool = False) -> list[tuple[int, ...]]:
    """For each example the indices of `PictureSet` that may be its reference."""
    pictures = PictureSet.of(examples, own_reference)
    return [pictures.references(index) for index in range(len(examples))]


def read_examples(data: DataConfig) -> tuple[list[Example], list[Problem]]:
    """The usable examples of a folder or a JSON-lines file, and all problems of the set.

    Raises:
        TrainingConfigError: neither a folder nor a JSON-lines file is named, or both are.
    """
    if bool(data.folder) == bool(data.jsonl):
        found = "both are given" if data.folder else "neither is given"
        raise TrainingConfigError(f"data.folder and data.jsonl: {found}; wanted one of them. Name where the pictures are.")
    examples, problems = _from_folder(data) if data.folder else _from_jsonl(Path(data.jsonl))
    if not examples and not any(problem.fatal for problem in problems):
        wanted = f"pictures ({', '.join(PICTURE_SUFFIXES)})" if data.folder else "a JSON object per line"
        problems.append(Problem(data.folder or data.jsonl, f"holds no example; wanted {wanted}", True))
    looks = _looks(examples, data)
    problems += [problem for example in examples for problem in _content_problems(example, looks)]
    unusable = {problem.where for problem in problems if problem.fatal}
    usable = [example for example in examples if example.name not in unusable]
    problems += [note for example in usable for note in _notes(example, looks[example.picture].size, data)]
    return usable, problems + _lonely(usable, data) + _duplicates(usable, looks)


def require(examples: Sequence[Example], problems: Iterable[Problem]) -> None:
    """Refuse a set that cannot be trained on.

    Raises:
        TrainingDataError: every fatal problem.
    """
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        raise TrainingDataError(listing(fatal))
    if not examples:
        raise TrainingDataError("there is no picture to learn from. Add pictures with captions.")


def listing(fatal: Sequence[Problem]) -> str:
    """The message of an error that lists every problem."""
    lines = "\n".join(f"- {problem.where}: {problem.text}" for problem in fatal)
    return (f"{len(fatal)} problem{'s' * (len(fatal) > 1)} in the training data:\n{lines}\n"
            "Correct these, or take those pictures out of the set.")


def contents_of(paths: Iterable[Path], workers: int) -> tuple[dict[Path, str], dict[Path, tuple[int, int]]]:
    """SHA-256 and (width, height) of pictures.

    Raises:
        TrainingDataError: every file that cannot be read.
    """
    def look(path: Path) -> tuple[Path, str, tuple[int, int], str]:
        try:
            return path, sha256_of_file(path), picture_size(path), ""
        except OSError as found:
            return path, "", (0, 0), f"cannot be read any more ({found}); check the file"

    with ThreadPoolExecutor(max(1, workers)) as pool:
        looks = list(pool.map(look, paths))
    faults = [Problem(path.name, fault, True) for path, _, _, fault in looks if fault]
    if faults:
        raise TrainingDataError(listing(faults))
    return {path: content for path, content, _, _ in looks}, {path: size for path, _, size, _ in looks}


def describe(examples: Sequence[Example], problems: Sequence[Problem], data: DataConfig) -> str:
    """What the set holds, as text: groups, sizes, captions, references, problems."""
    groups = Counter(example.group or "top level" for example in examples)
    sizes = Counter("{} x {}".format(*bucket_of(*picture_size(example.picture), data)) for example in examples)
    captions = [caption for example in examples for caption in example.captions]
    words = statistics.median(len(caption.split()) for caption in captions) if captions else 0
    pictures = PictureSet.of(examples, data.own_reference)
    own = sum(pictures.only_itself(index) for index in range(len(examples)))
    given = sum(bool(indices) and not pictures.only_itself(index) for index, indices in enumerate(pictures.given))
    fatal = [problem for problem in problems if problem.fatal]
    notes = [problem for problem in problems if not problem.fatal]
    return "\n".join([
        f"pictures: {len(examples)} to learn from, {len(pictures.pictures) - len(examples)} that are references alone, "
        f"{sum(example.mask is not None for example in examples)} with a mask",
        f"groups: {len(groups)} ({_counts(groups)})",
        f"sizes in pixels: {_counts(sizes)}",
        f"captions: {len(captions)}, {len(set(captions))} distinct, {captions.count('')} empty, {words:g} words in the median",
        f"references: given for {given}, others of the group for {len(examples) - given - own}, the picture itself for {own}",
        f"problems: {len(fatal)} that stop training, {len(notes)} to know of",
        *_listed("stop", fatal), *_listed("note", notes),
    ])


def _counts(counter: Counter[str]) -> str:
    common = counter.most_common(_MOST_LISTED)
    more = [f"{len(counter) - len(common)} more"] if len(counter) > len(common) else []
    return ", ".join([f"{name}: {count}" for name, count in common] + more)


def _listed(mark: str, problems: Sequence[Problem]) -> list[str]:
    lines = [f"  {mark}  {problem.where}: {problem.text}" for problem in problems[:_MOST_LISTED]]
    return lines + [f"  {mark}  and {len(problems) - _MOST_LISTED} more"] * (len(problems) > _MOST_LISTED)


def _mask_beside(picture: Path) -> Path | None:
    mask = picture.with_name(picture.stem + MASK_SUFFIX)
    return mask if mask.is_file() else None


def _from_folder(data: DataConfig) -> tuple[list[Example], list[Problem]]:
    folder, ending = Path(data.folder), "." + data.caption_extension.lstrip(".")
    if not folder.is_dir():
        return [], [Problem(data.folder, "is no folder; wanted one with pictures", True)]
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()
             and not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    masks = {path for path in files if path.name.endswith(MASK_SUFFIX)}
    pictures = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES and path not in masks]
    stems = {path.with_suffix("") for path in pictures}
    problems = [Problem(path.relative_to(folder).as_posix(), "belongs to no picture: there is none of this name", False)
                for path in files if (path.suffix == ending and path.with_suffix("") not in stems)
                or (path in masks and path.with_name(path.name[:-len(MASK_SUFFIX)]) not in stems)]
    examples = []
    for path in pictures:
        name, group = path.relative_to(folder).as_posix(), path.parent.relative_to(folder).as_posix()
        captions, fault = _captions_in(path.with_suffix(ending))
        problems += [Problem(name, fault, True)] if fault else []
        examples.append(Example(name, path, captions, "" if group == "." else group, (), _mask_beside(path)))
    return examples, problems


def _captions_in(path: Path) -> tuple[tuple[str, ...], str]:
    """The captions of a file, one per line, and what is wrong with it."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else []
    except UnicodeDecodeError as found:
        return ("",), f"its caption file {path.name} is not UTF-8 (byte {found.start}); save it as UTF-8"
    return tuple(line.strip() for line in lines if line.strip()) or ("",), ""


def _from_jsonl(path: Path) -> tuple[list[Example], list[Problem]]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as found:
        return [], [Problem(str(path), f"cannot be read ({found.strerror}); wanted a JSON-lines file", True)]
    examples, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            faults = ["is not UTF-8; save the file as UTF-8"]
        except json.JSONDecodeError as found:
            faults = [f"is not JSON ({found.msg} at character {found.colno})"]
        else:
            faults = _entry_faults(entry)
        problems += [Problem(f"{path.name} line {number}", fault, True) for fault in faults]
        if not faults:
            examples.append(_example(entry, path.parent))
    return examples, problems


def _entry_faults(entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return [f"is {entry!r:.40}; wanted an object with the key image"]
    faults = [f"has the unknown key {key!r}; known are {', '.join(_KEYS)}" for key in entry if key not in _KEYS]
    faults += [] if "image" in entry else ["has no key image"]
    faults += [f"has both {one} and {many}; give one of them" for one, many in
               (("caption", "captions"), ("reference", "references")) if one in entry and many in entry]
    for key in ("image", "caption", "group", "reference", "mask"):
        if key in entry and (not isinstance(entry[key], str) or (key in ("image", "reference", "mask") and not entry[key])):
            faults.append(f"has {key} = {entry[key]!r:.40}; wanted text")
    for key in ("captions", "references"):
        if key in entry and not (isinstance(entry[key], list) and all(isinstance(item, str) for item in entry[key])):
            faults.append(f"has {key} = {entry[key]!r:.40}; wanted a list of texts")
    return faults


def _example(entry: dict[str, Any], home: Path) -> Example:
    captions = entry.get("captions", [entry.get("caption", "")])
    references = entry.get("references", [entry["reference"]] if "reference" in entry else [])
    return Example(
        entry["image"], home / entry["image"], tuple(text.strip() for text in captions if text.strip()) or ("",),
        entry.get("group", ""), tuple(home / name for name in references), home / entry["mask"] if "mask" in entry else None)


@dataclass(frozen=True)
class _Look:
    """Size as shown and SHA-256 of a file that could be decoded, or what is wrong with it."""

    size: tuple[int, int] = (0, 0)
    digest: str = ""
    fault: str = ""


def _looks(examples: Sequence[Example], data: DataConfig) -> dict[Path, _Look]:
    """Every file decoded once, in threads: Pillow lets others work while it decodes."""
    masks = {example.mask for example in examples if example.mask}
    paths = list(dict.fromkeys(path for example in examples for path in (example.picture, *example.references)))
    paths += sorted(masks - set(paths))
    with ThreadPoolExecutor(max(1, data.workers)) as pool:
        return dict(zip(paths, pool.map(lambda path: _look(path, path in masks), paths), strict=True))


def _look(path: Path, is_mask: bool) -> _Look:
    if not path.is_file():
        return _Look(fault="does not exist; check the name")
    try:
        content = path.read_bytes()
        if not content:
            return _Look(fault="is empty (0 bytes); get the file again")
        with Image.open(io.BytesIO(content)) as picture:
            picture.verify()
        shown = (open_mask if is_mask else open_picture)(io.BytesIO(content))
    except UnidentifiedImageError:
        return _Look(fault="is no picture that can be read; save it as PNG or JPEG")
    except Exception as found:  # each of Pillow's formats raises kinds of its own for damage
        return _Look(fault=f"cannot be decoded ({found}); get the file again")
    return _Look(shown.size, hashlib.sha256(content).hexdigest())


def _content_problems(example: Example, looks: dict[Path, _Look]) -> list[Problem]:
    look = looks[example.picture]
    texts = [look.fault] if look.fault else []
    texts += [f"its reference {path.name} {looks[path].fault}" for path in example.references if looks[path].fault]
    if example.mask and looks[example.mask].fault:
        texts.append(f"its mask {example.mask.name} {looks[example.mask].fault}")
    elif example.mask and not look.fault and not same_shape(look.size, looks[example.mask].size):
        texts.append("its mask is {} x {} px, another shape than the picture's {} x {}; draw it on the picture".format(
            *looks[example.mask].size, *look.size))
    return [Problem(example.name, text, True) for text in texts]


def _notes(example: Example, size: tuple[int, int], data: DataConfig) -> list[Problem]:
    """A missing caption, too few pixels."""
    bucket, found = bucket_of(*size, data), f"is {size[0]} x {size[1]} px"
    texts = ["has no caption: the empty caption is used"] if example.captions == ("",) else []
    if min(size) < SMALLEST_PX:
        texts.append(f"{found}, tiny: wanted {SMALLEST_PX} px at least; it becomes {bucket[0]} x {bucket[1]}")
    elif enlargement(*size, bucket) > 1:
        texts.append(f"{found}, enlarged to {bucket[0]} x {bucket[1]}; use a larger one if there is")
    return [Problem(example.name, text, False) for text in texts]


def _lonely(examples: Sequence[Example], data: DataConfig) -> list[Problem]:
    """Pictures that find no other in their group."""
    members: dict[str, set[Path]] = defaultdict(set)
    for example in examples:
        members[example.group].add(example.picture.resolve())
    cropped = ", cropped" if data.reference_crops else ""
    return [Problem(example.name, f"is alone in its group {example.group or 'top level'!r}: it will be its own "
                                  f"reference{cropped}", False)
            for example in examples
            if not data.own_reference and not example.references and len(members[example.group]) == 1]


def _duplicates(examples: Sequence[Example], looks: dict[Path, _Look]) -> list[Problem]:
    """Files of the same content under several names; one file in several lines is meant so."""
    first: dict[str, Example] = {}
    problems = []
    for example in examples:
        digest = looks[example.picture].digest
        if first.setdefault(digest, example).picture.resolve() != example.picture.resolve():
            problems.append(Problem(example.name, f"has the same content as {first[digest].name}", False))
    return problems
