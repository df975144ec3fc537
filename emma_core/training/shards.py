"""Large training sets: samples in tar shards, read where they lie, and work shared out over processes.

A sample is all files `<key>.<ending>` of a shard, as webdataset has it: a picture, txt or json, ref.<picture>, mask.png.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import signal
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import EmmaWarning, TrainingConfigError, TrainingError, quoted, short
from ..files.json_file import JsonFault, is_text, loads
from ..files.plain_file import is_file
from .store import FeatureStore, Filling

SAMPLE_PICTURES = ("jpg", "jpeg", "png", "webp")
_REFERENCES = tuple(f"ref.{ending}" for ending in SAMPLE_PICTURES)
_MASK = "mask.png"
_KNOWN = (*SAMPLE_PICTURES, *_REFERENCES, _MASK, "txt", "json")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512  # of a tar file: zeros end it
_MOST_ZEROS = 1 << 20  # at the end; more is a file that was never filled
_FEWEST_FOR_PROCESSES = 16  # starting processes takes longer than reading fewer
_MOST_NAMED, _MOST_SHARDS = 10, 100_000
_LONGEST_WAIT = timedelta(days=7)  # for a process that encodes more than this one

Item, Made = TypeVar("Item"), TypeVar("Made")


@dataclass(frozen=True, slots=True)
class ShardMember:
    """A file inside an uncompressed tar file, with what `Path` offers to read one."""

    shard: Path
    name: str
    offset: int
    nbytes: int

    def is_file(self) -> bool:
        return self.shard.is_file()

    def resolve(self) -> ShardMember:
        """The member itself, as a shard is listed once: two names of a `Path` may be one file."""
        return self

    def read_bytes(self) -> bytes:
        """The member's content.

        Raises:
            OSError: the shard cannot be read, or ends before.
        """
        with open(self.shard, "rb") as stream:
            stream.seek(self.offset)
            content = stream.read(self.nbytes)
        if len(content) < self.nbytes:
            raise OSError(f"{self.shard.name} ends inside {self.name}")
        return content


Source = Path | ShardMember  # where a picture or a mask is


@dataclass(frozen=True, slots=True)
class Sample:
    """What a shard holds under one key; ``faults``: why it cannot be used. ``mask`` is the reference's if there is one."""

    key: str
    picture: ShardMember | None
    captions: tuple[str, ...]
    group: str | None
    reference: ShardMember | None
    mask: ShardMember | None
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Processes:
    """The processes of a run, of which this is number ``rank``; by default it is alone.

    Args:
        exchange: gives each process the values of all, by rank; it returns when all have called it.
    """

    rank: int = 0
    count: int = 1
    exchange: Callable[[Any], list[Any]] = lambda value: [value]

    @classmethod
    def of_run(cls) -> Processes:
        """The processes that torch.distributed connects; all of them have to call it."""
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return cls()
        count = distributed.get_world_size()
        group = distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)  # NCCL gives up after ten minutes

        def exchange(value: Any) -> list[Any]:
            values: list[Any] = [None] * count
            distributed.all_gather_object(values, value, group=group)
            return values

        return cls(distributed.get_rank(), count, exchange)

    def part(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's share: neighbours, so that each reads shards of its own."""
        return items[len(items) * self.rank // self.count:len(items) * (self.rank + 1) // self.count]

    def together(self, work: Callable[[], Made]) -> list[Made]:
        """What ``work`` gives in each process, by rank; ``work`` itself must not wait for others.

        Raises:
            Exception: what ``work`` raised here.
            TrainingError: it failed in another process: all end, none waits for ever.
        """
        if self.count == 1:
            return [work()]
        try:
            made = work()
        except Exception as found:
            fault = f"{type(found).__name__}: {found}"
            warnings.warn(f"process {self.rank + 1} of {self.count} failed and waits for the others to end: {fault}",
                          EmmaWarning, stacklevel=2)
            self.exchange((None, fault))
            raise
        told = self.exchange((made, ""))
        for rank, (_, fault) in enumerate(told):
            if fault:
                raise TrainingError(f"process {rank + 1} of {self.count} failed, which ends the others: {fault.rstrip('.')}. "
                                    "Correct that and start again; what was done is kept.")
        return [made for made, _ in told]

    def each(self, work: Callable[[], Made]) -> Made:
        """What ``work`` gives here, when it is done everywhere. Raises as `together`."""
        made: list[Made] = []
        self.together(lambda: made.append(work()))
        return made[0]

    def first_alone(self, work: Callable[[], Made]) -> Made:
        """What ``work`` gives here, in the first process before the others, as it makes files. Raises as `together`."""
        made = [self.each(work if mine else lambda: None) for mine in (self.rank == 0, self.rank > 0)]
        return made[self.rank > 0]

    def agreed(self, work: Callable[[], Made]) -> Made:
        """What ``work`` gives in the first process, which alone does it."""
        return self.together(lambda: work() if self.rank == 0 else None)[0]

    def over(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Made]]) -> list[Made]:
        """``work`` on every process's part of the items, one result for each, joined in order.

        Raises:
            TrainingError: the processes were given other items; else as `together`.
        """
        told = self.together(lambda: (len(items), list(work(self.part(items)))))
        counts = [count for count, _ in told]
        if len(set(counts)) > 1:
            raise TrainingError(f"the processes see {counts} files; wanted the same number. Give all machines of the run the "
                                "same data, under the same paths.")
        return [made for _, part in told for made in part]


def disconnect(well: bool) -> None:
    """End what torch.distributed connects: a process that exits before is often aborted (SIGABRT) by gloo's threads.

    Args:
        well: all processes have come this far. Otherwise NCCL, which would wait for them, is left to the exit.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and (well or distributed.get_backend() == "gloo"):
        distributed.destroy_process_group()


def in_workers(
    items: Sequence[Item], work: Callable[[Item], Made], workers: int, at_once: int = 1,
    fewest: int = _FEWEST_FOR_PROCESSES,
) -> Iterator[Made]:
    """``work`` on each item, in order, in reading processes, no more than there are cores; ``at_once`` are sent together."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    loader = DataLoader(_Work(items, work), batch_size=at_once, num_workers=min(workers, cores) if len(items) >= fewest else 0,
                        collate_fn=_as_is, worker_init_fn=_leave_to_the_parent,
                        generator=torch.Generator())  # else it draws from the global one
    for made in loader:
        yield from made


def _leave_to_the_parent(number: int) -> None:
    """What ends a whole group of processes (`timeout`, a cluster) is the parent's to answer; a reader ends when told by it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def fill(
    what: str, store: FeatureStore, keys: Iterable[str], work: Callable[[Sequence[str], Filling], None],
    progress: Callable[[str, int, int], None], processes: Processes,
) -> None:
    """``work`` on this process's part of the keys that the store lacks; at the end it has those of all processes.

    Raises:
        TrainingError: another process failed, or writes to another folder; else what ``work`` raises.
    """
    todo = processes.agreed(lambda: store.missing(keys))
    part = processes.part(todo)

    def mine() -> list[str]:
        with Filling(what, store, len(part), progress) as filling:
            work(part, filling)
        return store.missing(part)

    failed = set(itertools.chain(*processes.together(mine)))

    def check() -> None:
        lacking = set(store.missing(todo)) - failed
        if lacking:
            raise TrainingError(f"the cache {store.folder} lacks {len(lacking)} {what} that other processes wrote. Name a "
                                "folder in data.cache that all machines of the run share, and start again.")

    processes.each(check)


def find_shards(pattern: str) -> tuple[list[Path], str]:
    """The shards that a pattern names, in its order, and what is wrong with it ("": nothing).

    Raises:
        TrainingConfigError: braces that do not fit, or without the package that reads them.
    """
    paths: dict[Path, None] = {}
    missing = []
    for name in [pattern] if is_file(Path(pattern)) else _braces(pattern):
        found = [name] if is_file(Path(name)) else sorted(glob.glob(name, recursive=True))
        files = [path for path in map(Path, found) if is_file(path)]
        paths |= dict.fromkeys(files)
        missing += [] if files else [name]
    if not missing:
        return list(paths), ""
    more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
    return list(paths), (f"names shards that do not exist: {', '.join(missing[:_MOST_NAMED])}{more}; correct data.shards, or "
                         "get these .tar files")


def index_shard(shard: Path) -> tuple[list[Sample], str]:
    """The samples of a shard, from its headers and captions alone, and what is wrong with it ("": nothing).

    Of a damaged shard those before the last that can be found, which may lack files.
    """
    try:
        with open(shard, "rb") as stream:
            head = stream.read(max(map(len, _COMPRESSED)))
            for mark, kind in _COMPRESSED.items():
                if head.startswith(mark):
                    return [], (f"is compressed ({kind}), so that its pictures cannot be read where they lie; unpack it to a "
                                "plain .tar file")
            stream.seek(0)
            files, damage = _walk(shard, stream)
            return [_sample(key, endings, stream) for key, endings in files.items()], damage
    except OSError as found:
        return [], f"cannot be read ({found.strerror or found}); check the file"


class _Work(Dataset):
    """What `in_workers` gives to a reading process."""

    def __init__(self, items: Sequence[Any], work: Callable[[Any], Any]):
        self.items, self.work = items, work

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> Any:
        return self.work(self.items[place])


def _as_is(batch: list[Any]) -> list[Any]:
    """Arrays stay arrays: as tensors they would travel through shared memory, which containers have little of."""
    return batch


def _braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    try:
        from braceexpand import UnbalancedBracesError, braceexpand
    except ImportError as found:
        raise TrainingConfigError(f"data.shards = {pattern!r} has braces, which the package braceexpand reads; it is not "
                                  "installed: pip install braceexpand, or use * in place of them.") from found
    try:
        names = list(itertools.islice(braceexpand(pattern, escape=False), _MOST_SHARDS + 1))  # a backslash is part of a path
        if len(names) > _MOST_SHARDS:
            raise TrainingConfigError(f"data.shards = {short(repr(pattern))} names more than {_MOST_SHARDS:,} files; wanted "
                                      "fewer. Correct the braces, as in data/{000..099}.tar.")
        return names
    except UnbalancedBracesError as found:
        raise TrainingConfigError(f"data.shards = {pattern!r}: {found}. Correct the braces, as in data/{{000..099}}.tar."
                                  ) from found


def _walk(shard: Path, stream: BinaryIO) -> tuple[dict[str, dict[str, list[ShardMember | None]]], str]:
    """Key -> ending -> its files (None: a link), and what is wrong with the shard."""
    files: dict[str, dict[str, list[ShardMember | None]]] = {}
    nbytes, end, last, reason = os.fstat(stream.fileno()).st_size, 0, "", ""
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                end = tar.offset
                tar.members.clear()  # else a large shard would fill the memory
                place = re.fullmatch(r"((?:.*/|)[^./]+)\.([^/]*)", member.name)
                if place and not member.isdir():
                    last = place[1]
                    endings = files.setdefault(last, {})
                    if (ending := place[2].lower()) in _KNOWN:
                        plain = member.isreg() and not member.issparse()
                        endings.setdefault(ending, []).append(
                            ShardMember(shard, Path(member.name).name, member.offset_data, member.size) if plain else None)
    # of numbers in broken headers, and of headers of long names behind each other
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as found:
        reason = short(str(found), 200)
        if end == 0:
            return {}, f"is no tar file that can be read ({reason}); get it again"
    reason = reason or _end_fault(stream, end, nbytes)
    if not reason:
        return files, ""
    files.pop(last, None)
    return files, (f"is damaged at byte {min(end, nbytes)} of {nbytes} ({reason}); {len(files)} samples before that are "
                   "whole. Get the shard again")


def _end_fault(stream: BinaryIO, end: int, nbytes: int) -> str:
    """What is wrong where no header follows: tarfile takes anything for the end, but it must be zeros."""
    stream.seek(end)
    rest = stream.read(_MOST_ZEROS + 1)
    if len(rest) < _BLOCK:
        return "it is cut off"
    if rest.strip(b"\0"):
        return "something else follows"
    return f"{nbytes - end} empty bytes follow" if len(rest) > _MOST_ZEROS else ""


def _sample(key: str, files: dict[str, list[ShardMember | None]], stream: BinaryIO) -> Sample:
    faults = [f"has {len(found)} files {ending}; wanted one" for ending, found in files.items() if len(found) > 1]
    faults += [f"its {ending} is a link, or sparse; pack plain files" for ending, found in files.items() if None in found]
    one = {ending: found[0] for ending, found in files.items() if found[0] is not None}
    pictures, references = ([ending for ending in endings if ending in one] for endings in (SAMPLE_PICTURES, _REFERENCES))
    faults += [f"has several pictures ({', '.join(endings)}); wanted one" for endings in (pictures, references)
               if len(endings) > 1]
    captions, group, told = _texts({ending: _content(stream, one[ending]) for ending in ("txt", "json") if ending in one})
    picture, reference = (one[endings[0]] if endings else None for endings in (pictures, references))
    return Sample(key, picture, captions, group, reference, one.get(_MASK), (*faults, *told))


def _content(stream: BinaryIO, member: ShardMember) -> bytes:
    stream.seek(member.offset)
    return stream.read(member.nbytes)


def _texts(contents: dict[str, bytes]) -> tuple[tuple[str, ...], str | None, list[str]]:
    """Captions (of txt, else of json), the group (of json), and what is wrong with them; json may hold anything else too."""
    texts, entry, faults = {}, {}, []
    for ending, content in contents.items():
        try:
            texts[ending] = content.decode("utf-8-sig")
        except UnicodeDecodeError as found:
            faults.append(f"its {ending} is not UTF-8 (byte {found.start}); save it as UTF-8")
    if "json" in texts:
        try:
            entry = loads(texts["json"], whole=False)
        except JsonFault as found:
            faults.append(f"its json {found}")
    if not isinstance(entry, dict):
        faults.append(f"its json is {quoted(entry)}; wanted an object")
        entry = {}
    known = {name: entry[name] for name in ("caption", "captions", "group") if entry.get(name) is not None}
    faults += [f"its json has {name} = {quoted(known[name])}; wanted text" for name in ("caption", "group")
               if not is_text(known.get(name, ""))]
    many = known.get("captions", [known.get("caption", "")])
    if "captions" in known and not (isinstance(many, list) and all(map(is_text, many))):
        faults.append(f"its json has captions = {quoted(many)}; wanted a list of texts")
    if "caption" in known and "captions" in known:
        faults.append("its json has both caption and captions; give one of them")
    if faults:
        return ("",), None, faults
    lines = texts["txt"].splitlines() if "txt" in texts else many
    return tuple(line.strip() for line in lines if line.strip()) or ("",), known.get("group"), []
