"""Large training sets as webdataset shards: every sample once an epoch, over any number of processes and workers."""

from __future__ import annotations

import io
import json
import random
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import EmmaWarning, TrainingConfigError, TrainingDataError
from .buckets import bucket_of, fit, open_mask, open_picture, same_shape
from .config import DataConfig
from .examples import Problem

SHUFFLED_AT_ONCE = 1000  # samples, as bytes
_PICTURES = ("jpg", "jpeg", "png", "webp")
_MASK = "mask.png"
_MOST_TOLD = 10

Report = Callable[[list[Problem], int], None]


class StreamedExamples(IterableDataset):
    """`stream_examples` for a DataLoader: one epoch each time it is read, from epoch 0, split over its workers."""

    def __init__(self, pattern: str, data: DataConfig, seed: int = 0, epoch: int = 0, rank: int = 0, world_size: int = 1):
        self.pattern, self.data, self.seed, self.epoch = pattern, data, seed, epoch
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return stream_examples(self.pattern, self.data, self.seed, self.epoch, self.rank, self.world_size)


def stream_examples(
    pattern: str, data: DataConfig, seed: int, epoch: int, rank: int = 0, world_size: int = 1, report: Report | None = None
) -> Iterator[dict[str, Any]]:
    """One epoch of this process's samples (in a DataLoader's worker: of this worker's), in an order of seed and epoch.

    A sample is a picture (jpg, jpeg, png or webp) with txt (a caption per line) or json (`caption` or `captions`), and
    perhaps ref.jpg (or another of these) and mask.png, of the reference, or of the picture where there is none.

    Args:
        pattern: shards on this machine, as in `data/{00000..00099}.tar`; at least one for each process.
        report: gets the samples and shards that could not be used and how many samples could, at the epoch's end;
            default: a warning.
    Yields:
        {"name", "picture" (H, W, 3) fitted to its "size_px" (W, H), "captions", "reference" (H', W', 3), "mask" (H', W') or
        None}; pictures in 0..255.
    Raises:
        TrainingConfigError: webdataset is not installed.
        TrainingDataError: missing shards, or fewer than processes.
    """
    try:
        import webdataset
    except ImportError as found:
        raise TrainingConfigError("shards need the package webdataset, which is not installed: pip install webdataset"
                                  ) from found
    shards = _shards(pattern, world_size, webdataset)
    random.Random(f"{seed} {epoch}").shuffle(shards)
    return _epoch(shards[rank::world_size], data, f"{seed} {epoch} {rank}", report or _warn, webdataset)


def _shards(pattern: str, world_size: int, webdataset: Any) -> list[Path]:
    paths = [Path(name) for name in webdataset.shardlists.expand_urls(pattern)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - _MOST_TOLD} more" if len(missing) > _MOST_TOLD else ""
        told = ", ".join(missing[:_MOST_TOLD])
        raise TrainingDataError(f"the pattern of shards names {len(missing)} files that do not exist: {told}{more}. Correct "
                                "the pattern, or get these shards (.tar files on this machine).")
    if len(paths) < world_size:
        raise TrainingDataError(f"the pattern names {len(paths)} shards for {world_size} processes; wanted one for each at "
                                "least. Split the shards, or use fewer processes.")
    return paths


def _epoch(shards: list[Path], data: DataConfig, seed: str, report: Report, webdataset: Any) -> Iterator[dict[str, Any]]:
    problems: list[Problem] = []
    used = 0
    worker = get_worker_info()
    chance = random.Random(f"{seed} {worker.id if worker else 0}")
    samples = _samples(webdataset.split_by_worker(iter(shards)), problems, webdataset)
    try:
        for sample in webdataset.shuffle(SHUFFLED_AT_ONCE, rng=chance)(samples):
            name = f"{Path(sample['__url__']).name}/{sample['__key__']}"
            try:
                decoded = _decoded(name, sample, data)
            except UnidentifiedImageError:
                problems.append(Problem(name, "holds no picture that can be read", False))
                continue
            except Exception as found:  # each of Pillow's formats raises kinds of its own for damage
                problems.append(Problem(name, f"{found}", False))
                continue
            used += 1
            yield decoded
    finally:
        if problems:
            report(problems, used)


def _samples(shards: Iterable[Path], problems: list[Problem], webdataset: Any) -> Iterator[dict[str, Any]]:
    """Raw samples of shard after shard; what a damaged one still holds is used."""
    for path in shards:
        def note(found: Exception, path: Path = path) -> bool:
            problems.append(Problem(path.name, f"is damaged ({_reason(found)})", False))
            return not isinstance(found, tarfile.TarError | OSError | EOFError)  # go on, unless the file itself is broken
        try:
            with open(path, "rb") as stream:
                files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": stream}], handler=note)
                yield from webdataset.tariterators.group_by_keys(files, handler=note)
        except OSError as found:
            note(found)


def _reason(found: Exception) -> str:
    """Without the objects that webdataset adds to an exception."""
    return found.strerror if isinstance(found, OSError) and found.strerror else str(found.args[0] if found.args else found)


def _decoded(name: str, sample: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    captions = _captions(sample)
    content = _first(sample, "")
    if content is None:
        raise TrainingDataError(f"has no picture ({', '.join(_PICTURES)})")
    picture = open_picture(io.BytesIO(content))
    other = _first(sample, "ref.")
    reference = picture if other is None else open_picture(io.BytesIO(other))
    mask = open_mask(io.BytesIO(sample[_MASK])) if _MASK in sample else None
    if mask is not None and not same_shape(mask.size, reference.size):
        raise TrainingDataError("its mask is {} x {} px, another shape than its reference's {} x {}".format(
            *mask.size, *reference.size))
    size_px = bucket_of(*picture.size, data)
    return {"name": name, "picture": np.array(fit(picture, size_px)), "size_px": size_px, "captions": captions,
            "reference": np.array(reference), "mask": None if mask is None else np.array(mask.resize(reference.size))}


def _first(sample: dict[str, Any], prefix: str) -> bytes | None:
    return next((sample[prefix + suffix] for suffix in _PICTURES if prefix + suffix in sample), None)


def _captions(sample: dict[str, Any]) -> tuple[str, ...]:
    if "txt" in sample:
        texts = sample["txt"].decode("utf-8-sig").splitlines()
    elif "json" in sample:
        entry = json.loads(sample["json"])
        entry = entry if isinstance(entry, dict) else {}
        texts = entry.get("captions", [entry.get("caption")])
    else:
        raise TrainingDataError("has no caption (txt or json)")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TrainingDataError(f"its captions are {texts!r:.40}; wanted texts")
    return tuple(text.strip() for text in texts if text.strip()) or ("",)


def _warn(problems: list[Problem], used: int) -> None:
    told = "; ".join(f"{problem.where}: {problem.text}" for problem in problems[:_MOST_TOLD])
    warnings.warn(f"{len(problems)} samples or shards could not be used, {used} samples could: {told}", EmmaWarning,
                  stacklevel=2)
