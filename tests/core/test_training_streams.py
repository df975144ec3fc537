"""Webdataset shards: each sample once an epoch over processes and workers, bad ones told, never a crash."""

import io
import json
import sys
import tarfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from emma_core.errors import EmmaWarning, TrainingConfigError, TrainingDataError
from emma_core.training.config import DataConfig
from emma_core.training.streams import StreamedExamples, stream_examples

needs_webdataset = pytest.mark.skipif(find_spec("webdataset") is None, reason="webdataset is not installed")


def picture(colour: str = "red", size: tuple[int, int] = (48, 32), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("L" if colour == "white" else "RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def shard(path: Path, files: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    """Five shards of six samples with equal keys in each shard; the caption tells which is which."""
    for number in range(5):
        shard(tmp_path / f"{number}.tar", {
            f"{sample:03}.{ending}": content for sample in range(6)
            for ending, content in (("png", picture()), ("txt", f"shard {number} sample {sample}"))})
    return str(tmp_path / "{0..4}.tar")


def config(**changes) -> DataConfig:
    return DataConfig(**{"resolution_px": 64, "bucket_step_px": 16} | changes)


def captions(samples) -> list[str]:
    return [sample["captions"][0] for sample in samples]


def as_is(item):
    return item


@needs_webdataset
def test_two_processes_with_two_workers_see_each_sample_once(shards):
    seen = []
    for rank in range(2):
        examples = StreamedExamples(shards, config(), seed=3, epoch=1, rank=rank, world_size=2)
        part = captions(DataLoader(examples, batch_size=None, num_workers=2, collate_fn=as_is))
        assert len(part) >= 12
        seen += part
    assert Counter(seen) == Counter(f"shard {number} sample {sample}" for number in range(5) for sample in range(6))


@needs_webdataset
def test_the_order_is_that_of_seed_and_epoch(shards):
    def order(seed, epoch):
        return captions(stream_examples(shards, config(), seed, epoch))

    assert order(0, 0) == order(0, 0) and len({tuple(order(*which)) for which in ((0, 0), (0, 1), (1, 0))}) == 3
    assert order(0, 0) != sorted(order(0, 0))


@needs_webdataset
def test_a_sample_is_decoded_whole(tmp_path):
    path = shard(tmp_path / "a.tar", {
        "x.jpg": picture("blue", (48, 32), "JPEG"), "x.json": json.dumps({"captions": ["one", "two"], "width": 48}),
        "x.ref.webp": picture("lime", (20, 10), "WEBP"), "x.mask.png": picture("white", (40, 20)),
        "y.png": picture("red", (100, 100)), "y.txt": "a\n\n b", "y.mask.png": picture("white", (50, 50)),
        "z.png": picture(), "z.json": '{"caption": "c"}'})
    x, y, z = sorted(stream_examples(str(path), config(), 0, 0), key=lambda sample: sample["name"])
    assert (x["name"], x["captions"], y["captions"], z["captions"]) == ("a.tar/x", ("one", "two"), ("a", "b"), ("c",))
    assert x["size_px"] == (80, 48) and x["picture"].shape == (48, 80, 3) and x["picture"].dtype == np.uint8
    assert x["reference"].shape == (10, 20, 3) and x["reference"][0, 0, 1] > 240 and x["mask"].shape == (10, 20)
    assert y["reference"].shape == (100, 100, 3) and y["mask"].shape == (100, 100) and y["mask"].min() == 255
    assert z["mask"] is None and z["reference"].shape == (32, 48, 3)


@needs_webdataset
def test_bad_samples_are_told_and_the_others_used(tmp_path):
    shard(tmp_path / "0.tar", {
        "a.png": picture(), "a.txt": "good", "b.png": b"<html>", "b.txt": "x", "c.png": picture(), "d.txt": "x",
        "e.png": picture(), "e.json": "{", "f.png": picture(), "f.json": '{"prompt": "x"}', "g.png": picture(),
        "g.txt": b"\xff", "h.png": picture()[:90], "h.txt": "x", "i.png": picture(), "i.txt": "x",
        "i.mask.png": picture("white", (32, 32))})
    (tmp_path / "1.tar").write_bytes(b"no tar")
    whole = shard(tmp_path / "2.tar", {"a.png": picture(), "a.txt": "before", "b.png": bytes(5000), "b.txt": "after"})
    whole.write_bytes(whole.read_bytes()[:4000])
    told = []
    found = list(stream_examples(str(tmp_path / "{0..2}.tar"), config(), 0, 0, report=lambda *seen: told.append(seen)))
    assert sorted(captions(found)) == ["before", "good"] and len(told) == 1
    problems, used = told[0]
    texts = {problem.where: problem.text for problem in problems}
    assert used == 2 and set(texts) == {f"0.tar/{key}" for key in "bcdefghi"} | {"1.tar", "2.tar"}
    assert texts["0.tar/b"] == "holds no picture that can be read" and texts["0.tar/c"] == "has no caption (txt or json)"
    assert texts["0.tar/d"] == "has no picture (jpg, jpeg, png, webp)" and "wanted texts" in texts["0.tar/f"]
    assert texts["0.tar/i"].startswith("its mask is 32 x 32 px, another shape than its reference's 48 x 32")
    assert texts["1.tar"].startswith("is damaged") and texts["2.tar"].startswith("is damaged (unexpected end of data")


@needs_webdataset
def test_without_a_report_bad_samples_are_warned_of(tmp_path):
    path = shard(tmp_path / "a.tar", {"a.png": b"", "a.txt": "x", "b.png": picture(), "b.txt": "y"})
    with pytest.warns(EmmaWarning, match="1 samples or shards could not be used, 1 samples could: a.tar/a: holds no picture"):
        assert captions(stream_examples(str(path), config(), 0, 0)) == ["y"]


@needs_webdataset
def test_missing_and_too_few_shards_are_refused(tmp_path, shards):
    with pytest.raises(TrainingDataError, match=r"names 2 files that do not exist: .*5.tar, .*6.tar. Correct the pattern"):
        stream_examples(str(tmp_path / "{3..6}.tar"), config(), 0, 0)
    with pytest.raises(TrainingDataError, match="names 5 shards for 6 processes"):
        stream_examples(shards, config(), 0, 0, rank=5, world_size=6)
    with pytest.raises(TrainingDataError, match="names 1 files that do not exist: pipe:"):
        stream_examples("pipe:touch run", config(), 0, 0)


@needs_webdataset
def test_a_shard_that_vanishes_is_told(shards, tmp_path):
    told = []
    samples = stream_examples(shards, config(), 0, 0, report=lambda problems, used: told.extend([problems[0].where, used]))
    (tmp_path / "3.tar").unlink()
    assert len(list(samples)) == 24 and told == ["3.tar", 24]


def test_without_webdataset_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(TrainingConfigError, match="not installed: pip install webdataset"):
        stream_examples("a.tar", config(), 0, 0)
