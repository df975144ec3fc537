"""Finding pictures, captions and references of a training set, and everything that is wrong with them, in one go."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..errors import FileError, TrainingConfigError, TrainingDataError, quoted, short
from ..files.json_file import JsonFault, loads
from ..files.picture_file import PICTURE_SUFFIXES, mask_beside
from ..files.plain_file import is_folder, read_bytes
from .buckets import Look, bucket_of, content_of, enlargement, look_at, same_shape
from .config import DataConfig
from .folder import find_in
from .shards import SAMPLE_PICTURES, Processes, Sample, ShardMember, Source, find_shards, in_workers, index_shard

SMALLEST_PX = 64
_KEYS = ("image", "caption", "captions", "group", "reference", "references", "mask")
_MOST_PLACES = 3  # that one note names
_MOST_LISTED = 50
_AT_ONCE = 32  # pictures that a reading process is sent together


@dataclass(frozen=True, slots=True)
class Example:
    """A picture to learn from.

    Args:
        name: as the set calls it: the path relative to the folder, what the JSON line says, shard and key.
        captions: one at least, "" where there is none.
        group: pictures of one group are references for each other; "" is the top level, a group too; None: in no group.
        references: given ones; empty: those of the group.
        mask: white on the object.
        reference_masks: of the first given references.
        size_px: width and height of a picture that was looked at.
    """

    name: str
    picture: Source
    captions: tuple[str, ...]
    group: str | None
    references: tuple[Source, ...] = ()
    mask: Source | None = None
    reference_masks: tuple[Source | None, ...] = ()
    size_px: tuple[int, int] = field(default=(0, 0), compare=False)

    def files(self) -> tuple[Source, ...]:
        """Every file that the example needs: picture, references, masks."""
        return tuple(file for file in (self.picture, *self.references, self.mask, *self.reference_masks) if file)


@dataclass(frozen=True, slots=True)
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

    pictures: tuple[Source, ...]
    masks: tuple[Source | None, ...]
    own: tuple[int, ...]
    given: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    own_reference: bool = False

    @classmethod
    def of(cls, examples: Sequence[Example], own_reference: bool = False) -> PictureSet:
        pictures, masks = [example.picture for example in examples], [example.mask for example in examples]
        known: dict[Source, int] = {}
        own = tuple(known.setdefault(example.picture.resolve(), index) for index, example in enumerate(examples))
        members: dict[str | None, dict[int, None]] = defaultdict(dict)
        for example, index in zip(examples, own, strict=True):
            members[example.group][index] = None
        named = {name: tuple(indices) for name, indices in members.items()}
        groups = tuple((index,) if example.group is None else named[example.group]
                       for example, index in zip(examples, own, strict=True))
        given = []
        for example in examples:
            indices = []
            for picture, mask in zip_longest(example.references, example.reference_masks):
                index = known.setdefault(picture.resolve(), len(pictures))
                if index == len(pictures):
                    pictures.append(picture)
                    masks.append(mask)
                indices.append(index)
            given.append(tuple(dict.fromkeys(indices)))
        return cls(tuple(pictures), tuple(masks), own, tuple(given), groups, own_reference)

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
        distinct = {id(group): group for given, group in zip(self.given, self.groups, strict=True) if not given}
        return sorted({index for indices in (*self.given, *distinct.values()) for index in indices})


def read_examples(data: DataConfig, processes: Processes | None = None) -> tuple[list[Example], list[Problem]]:
    """The usable examples of a folder, a JSON-lines file or shards, and all problems of the set.

    Args:
        processes: among which looking at the files is shared out; each gets the whole result.
    Raises:
        TrainingConfigError: not one of these is named, or several are.
        TrainingError: another process failed.
    """
    sources = {"data.folder": data.folder, "data.jsonl": data.jsonl, "data.shards": data.shards}
    given = [key for key, value in sources.items() if value]
    if len(given) != 1:
        found = f"{' and '.join(given)} are given" if given else "none is given"
        raise TrainingConfigError(f"{', '.join(sources)}: {found}; wanted one of them. Name where the pictures are.")
    processes = processes or Processes()
    if data.shards:
        examples, problems = _from_shards(data, processes)
    else:
        examples, problems = _from_folder(data) if data.folder else _from_jsonl(Path(data.jsonl))
    if not examples and not any(problem.fatal for problem in problems):
        wanted = {"data.folder": f"pictures ({', '.join(PICTURE_SUFFIXES)})", "data.jsonl": "a JSON object per line",
                  "data.shards": f"samples with pictures ({', '.join(SAMPLE_PICTURES)})"}[given[0]]
        problems.append(Problem(sources[given[0]], f"holds no example; wanted {wanted}", True))
    looks = _looks(examples, data, processes)
    problems += [problem for example in examples for problem in _content_problems(example, looks)]
    unusable = {problem.where for problem in problems if problem.fatal}
    usable = [replace(example, size_px=looks[example.picture].size) for example in examples if example.name not in unusable]
    problems += [note for example in usable for note in _notes(example, data)]
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


def contents_of(sources: Sequence[Source], workers: int, processes: Processes) -> dict[Source, Look]:
    """Size and SHA-256 of pictures; each process reads its part.

    Raises:
        TrainingDataError: every file that cannot be read.
    """
    looks = processes.over(sources, lambda part: list(in_workers(part, content_of, workers, _AT_ONCE)))
    faults = [Problem(source.name, look.fault, True) for source, look in zip(sources, looks, strict=True) if look.fault]
    if faults:
        raise TrainingDataError(listing(faults))
    return dict(zip(sources, looks, strict=True))


def describe(examples: Sequence[Example], problems: Sequence[Problem], data: DataConfig) -> str:
    """What the set holds, as text: groups, sizes, captions, references, problems."""
    groups = Counter(example.group or "top level" for example in examples if example.group is not None)
    alone = len(examples) - groups.total()
    sizes = Counter("{} x {}".format(*bucket_of(*example.size_px, data)) for example in examples)
    captions = [caption for example in examples for caption in example.captions]
    words = statistics.median(len(caption.split()) for caption in captions) if captions else 0
    pictures = PictureSet.of(examples, data.own_reference)
    own = sum(pictures.only_itself(index) for index in range(len(examples)))
    given = sum(bool(indices) and not pictures.only_itself(index) for index, indices in enumerate(pictures.given))
    fatal = [problem for problem in problems if problem.fatal]
    notes = [problem for problem in problems if not problem.fatal]
    shards = [f"{len(find_shards(data.shards)[0])} shards, {len(examples)} samples"] if data.shards else []
    return "\n".join([
        *shards,
        f"pictures: {len(examples)} to learn from, {len(pictures.pictures) - len(examples)} that are references alone, "
        f"{sum(example.mask is not None for example in examples)} with a mask",
        f"groups: {len(groups)}{f' ({_counts(groups)})' if groups else ''}{f', {alone} pictures in none' if alone else ''}",
        f"sizes in pixels: {_counts(sizes)}",
        f"captions: {len(captions)}, {len(set(captions))} distinct, {captions.count('')} empty, {words:g} words in the median",
        f"references: given for {given}, others of the group for {len(examples) - given - own}, the picture itself for {own}",
        f"problems: {len(fatal)} that stop training, {len(notes)} to know of",
        *_listed("stop", fatal), *_listed("note", _alike(notes)),
    ])


def _counts(counter: Counter[str]) -> str:
    common = counter.most_common(_MOST_LISTED)
    more = [f"{len(counter) - len(common)} more"] if len(counter) > len(common) else []
    return ", ".join([f"{name}: {count}" for name, count in common] + more)


def _listed(mark: str, problems: Sequence[Problem]) -> list[str]:
    lines = [f"  {mark}  {problem.where}: {problem.text}" for problem in problems[:_MOST_LISTED]]
    return lines + [f"  {mark}  and {len(problems) - _MOST_LISTED} more"] * (len(problems) > _MOST_LISTED)


def _alike(notes: Sequence[Problem]) -> list[Problem]:
    """One of each text, with the places of all that share it."""
    places: dict[str, list[str]] = defaultdict(list)
    for note in notes:
        places[note.text].append(note.where)
    return [Problem(", ".join(where[:_MOST_PLACES] + [f"{len(where) - _MOST_PLACES} more"] * (len(where) > _MOST_PLACES)),
                    text, False) for text, where in places.items()]


def _from_folder(data: DataConfig) -> tuple[list[Example], list[Problem]]:
    folder, ending = Path(data.folder), "." + data.caption_extension.lstrip(".")
    if not is_folder(folder):
        return [], [Problem(data.folder, "is no folder; wanted one with pictures", True)]
    found = find_in(folder, ending)
    problems = [Problem(names, reason, False) for names, reason in found.unused]
    examples = []
    for path in found.pictures:
        name, group = path.relative_to(folder).as_posix(), path.parent.relative_to(folder).as_posix()
        captions, fault = _captions_in(found.captions[path]) if path in found.captions else ((found.texts.get(path, ""),), "")
        problems += [Problem(name, fault, True)] if fault else []
        examples.append(Example(name, path, captions, "" if group == "." else group, (), mask_beside(path)))
    return examples, problems


def _captions_in(path: Path) -> tuple[tuple[str, ...], str]:
    """The captions of a file, one per line, and what is wrong with it."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as found:
        return ("",), f"its caption file {path.name} is not UTF-8 (byte {found.start}); save it as UTF-8"
    except OSError as found:
        return ("",), f"its caption file {path.name} cannot be read ({found.strerror or found}); check its permissions"
    return tuple(line.strip() for line in lines if line.strip()) or ("",), ""


def _from_jsonl(path: Path) -> tuple[list[Example], list[Problem]]:
    try:
        lines = read_bytes(path, "a JSON-lines file").removeprefix(b"\xef\xbb\xbf").splitlines()
    except FileError as found:
        return [], [Problem(str(path), f"cannot be read: {found}", True)]
    examples, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            faults = ["is not UTF-8; save the file as UTF-8"]
        except JsonFault as found:
            faults = [str(found)]
        else:
            faults = _entry_faults(entry)
        problems += [Problem(f"{path.name} line {number}", fault, True) for fault in faults]
        if not faults:
            examples.append(_example(entry, path.parent))
    return examples, problems


def _entry_faults(entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return [f"is {quoted(entry)}; wanted an object with the key image"]
    faults = [f"has the unknown key {short(repr(key))}; known are {', '.join(_KEYS)}" for key in entry if key not in _KEYS]
    faults += [] if "image" in entry else ["has no key image"]
    faults += [f"has both {one} and {many}; give one of them" for one, many in
               (("caption", "captions"), ("reference", "references")) if one in entry and many in entry]
    for key in ("image", "caption", "group", "reference", "mask"):
        if key in entry and (not isinstance(entry[key], str) or (key in ("image", "reference", "mask") and not entry[key])):
            faults.append(f"has {key} = {quoted(entry[key])}; wanted text")
    for key in ("captions", "references"):
        if key in entry and not (isinstance(entry[key], list) and all(isinstance(item, str) for item in entry[key])):
            faults.append(f"has {key} = {quoted(entry[key])}; wanted a list of texts")
    return faults


def _example(entry: dict[str, Any], home: Path) -> Example:
    mask = home / entry["mask"] if "mask" in entry else None
    captions = entry.get("captions", [entry.get("caption", "")])
    references = [home / name for name in entry.get("references", [entry["reference"]] if "reference" in entry else [])]
    return Example(
        entry["image"], home / entry["image"], tuple(text.strip() for text in captions if text.strip()) or ("",),
        entry.get("group", ""), tuple(references), mask, tuple(map(mask_beside, references)))


def _from_shards(data: DataConfig, processes: Processes) -> tuple[list[Example], list[Problem]]:
    """Each process reads the headers and captions of its part of the shards."""
    shards, fault = processes.agreed(lambda: find_shards(data.shards))
    problems = [Problem(data.shards, fault, True)] if fault else []
    labels = [path.name for path in shards]
    labels = labels if len(set(labels)) == len(labels) else list(map(str, shards))
    indexed = processes.over(shards, lambda part: list(in_workers(part, index_shard, data.workers, fewest=2)))
    examples = []
    for label, (samples, damage) in zip(labels, indexed, strict=True):
        if damage or not samples:
            problems.append(Problem(label, damage or "holds no samples", bool(damage)))
        for sample in samples:
            name = f"{label}/{sample.key}"
            problems += [Problem(name, fault, True) for fault in sample.faults]
            if sample.picture:
                examples.append(_example_of_sample(name, sample.picture, sample))
            elif not sample.faults:
                problems.append(Problem(name, f"has no picture ({', '.join(SAMPLE_PICTURES)})", False))
    return examples, problems


def _example_of_sample(name: str, picture: ShardMember, sample: Sample) -> Example:
    if sample.reference is None:
        return Example(name, picture, sample.captions, sample.group, (), sample.mask)
    return Example(name, picture, sample.captions, sample.group, (sample.reference,), None, (sample.mask,))


def _looks(examples: Sequence[Example], data: DataConfig, processes: Processes) -> dict[Source, Look]:
    """Every file decoded once, in reading processes of every process."""
    masks = {mask for example in examples for mask in (example.mask, *example.reference_masks)}
    pictures = {picture for example in examples for picture in (example.picture, *example.references)}
    files = list(dict.fromkeys(file for example in examples for file in example.files()))
    jobs = [(file, file in masks and file not in pictures) for file in files]
    looks = processes.over(jobs, lambda part: list(in_workers(part, _looked_at, data.workers, _AT_ONCE)))
    return dict(zip(files, looks, strict=True))


def _looked_at(job: tuple[Source, bool]) -> Look:
    return look_at(*job)


def _content_problems(example: Example, looks: dict[Source, Look]) -> list[Problem]:
    look = looks[example.picture]
    texts = [look.fault] if look.fault else []
    texts += [f"its reference {source.name} {looks[source].fault}" for source in example.references if looks[source].fault]
    masks = [("mask", example.mask, "picture", look)]
    masks += [("reference's mask", mask, "reference", looks[reference])
              for reference, mask in zip(example.references, example.reference_masks, strict=False)]
    for label, mask, owner, shown in masks:
        if mask and looks[mask].fault:
            texts.append(f"its {label} {mask.name} {looks[mask].fault}")
        elif mask and not shown.fault and not same_shape(shown.size, looks[mask].size):
            texts.append("its {} is {} x {} px, another shape than the {}'s {} x {}; draw it on the {}".format(
                label, *looks[mask].size, owner, *shown.size, owner))
    return [Problem(example.name, text, True) for text in texts]


def _notes(example: Example, data: DataConfig) -> list[Problem]:
    """A missing caption, too few pixels."""
    size = example.size_px
    bucket, found = bucket_of(*size, data), f"is {size[0]} x {size[1]} px"
    texts = ["has no caption: the empty caption is used"] if example.captions == ("",) else []
    if min(size) < SMALLEST_PX:
        texts.append(f"{found}, tiny: wanted {SMALLEST_PX} px at least; it becomes {bucket[0]} x {bucket[1]}")
    elif enlargement(*size, bucket) > 1:
        texts.append(f"{found}, enlarged to {bucket[0]} x {bucket[1]}; use a larger one if there is")
    return [Problem(example.name, text, False) for text in texts]


def _lonely(examples: Sequence[Example], data: DataConfig) -> list[Problem]:
    """Pictures that find no other in their group."""
    members: dict[str | None, set[Source]] = defaultdict(set)
    for example in examples:
        members[example.group].add(example.picture.resolve())
    cropped = ", cropped" if data.reference_crops else ""
    return [Problem(example.name, f"is alone in its group {example.group or 'top level'!r}: it will be its own "
                                  f"reference{cropped}", False)
            for example in examples
            if not data.own_reference and not example.references and example.group is not None
            and len(members[example.group]) == 1]


def _duplicates(examples: Sequence[Example], looks: dict[Source, Look]) -> list[Problem]:
    """Files of the same content under several names; one file in several lines is meant so."""
    first: dict[str, Example] = {}
    problems = []
    for example in examples:
        digest = looks[example.picture].digest
        if first.setdefault(digest, example).picture.resolve() != example.picture.resolve():
            problems.append(Problem(example.name, f"has the same content as {first[digest].name}", False))
    return problems
