"""Training from tar shards: the samples of webdataset, read where they lie, shared out over processes; damage is told."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_training_prepare import GLOBAL, Faces, Frozen, Whole
from training_world import in_processes, write_shard

from emma_core.encoders.options import EncodeOptions
from emma_core.errors import EmmaWarning, TrainingConfigError, TrainingDataError, TrainingError
from emma_core.files.picture_file import open_mask, open_picture
from emma_core.training.config import DataConfig, EncoderConfig
from emma_core.training.examples import PictureSet, describe, read_examples, require
from emma_core.training.prepare import prepare
from emma_core.training.shards import Processes, ShardMember, find_shards, in_workers, index_shard

ROOT = Path(__file__).resolve().parents[2]
FACE = EncodeOptions(("face",))
needs_webdataset = pytest.mark.skipif(find_spec("webdataset") is None, reason="webdataset is not installed")


def picture(colour: str = "red", size: tuple[int, int] = (64, 64), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("L" if colour == "white" else "RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def noise(seed: int, size: tuple[int, int] = (40, 24)) -> bytes:
    stream = io.BytesIO()
    levels = np.random.default_rng(seed).integers(100, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(levels).save(stream, "PNG")
    return stream.getvalue()


def config(pattern, **changes) -> DataConfig:
    return DataConfig(**{"shards": str(pattern), "resolution_px": 64, "bucket_step_px": 8, "workers": 0} | changes)


def texts(problems) -> dict[str, str]:
    return {problem.where: ("! " if problem.fatal else "") + problem.text for problem in problems}


@pytest.fixture
def shards(tmp_path):
    """Four shards of six samples with equal keys in each; the caption tells which is which, and the first is larger."""
    for number in range(4):
        pictures = [noise(10 * number + sample, (40, 24 + 8 * sample)) for sample in range(6)]
        write_shard(tmp_path / f"{number}.tar", {f"{sample:03}.{ending}": content for sample, png in enumerate(pictures)
                                                 for ending, content in (("png", png), ("txt", f"{number} {sample}"))})
    return str(tmp_path / "*.tar")


def encode(pattern, frozen, folder, processes=None, options=GLOBAL, masked=False, **changes):
    data = config(pattern, **{"resolution_px": 32} | changes)
    examples, problems = read_examples(data, processes)
    require(examples, problems)
    return prepare(examples, data, EncoderConfig(masked=masked), frozen.encoders(), options, folder, None, processes)


def test_a_sample_is_read_whole(tmp_path):
    path = write_shard(tmp_path / "a.tar", {
        "x.jpg": picture("blue", (96, 64), "JPEG"), "x.json": json.dumps({"captions": ["one", " two "], "width": 48}),
        "x.ref.webp": picture("lime", (40, 20), "WEBP"), "x.mask.png": picture("white", (80, 40)),
        "deep/y.PNG": picture("red"), "deep/y.txt": "\ufeffa\n\n b", "deep/y.mask.png": picture("white", (32, 32)),
        "deep/y.json": json.dumps({"group": "ann", "caption": None}), "z.png": picture("yellow"), "z.json": '{"caption": "c"}',
        "._z.png": b"by macOS", "z.cls": "3", "README": "x"})
    examples, problems = read_examples(config(path))
    x, y, z = examples
    assert texts(problems) == {"a.tar/deep/y": "is alone in its group 'ann': it will be its own reference, cropped"}
    assert [example.name for example in examples] == ["a.tar/x", "a.tar/deep/y", "a.tar/z"]
    assert (x.captions, y.captions, z.captions) == (("one", "two"), ("a", "b"), ("c",))
    assert (x.group, y.group, z.group) == (None, "ann", None) and (x.size_px, y.size_px) == ((96, 64), (64, 64))
    pictures = PictureSet.of(examples)
    assert [pictures.references(index) for index in range(3)] == [(3,), (1,), (2,)] and pictures.used() == [1, 2, 3]
    assert [mask and mask.name for mask in pictures.masks] == [None, "y.mask.png", None, "x.mask.png"]
    assert open_picture(pictures.pictures[3]).getpixel((0, 0))[1] > 240 and open_mask(pictures.masks[3]).size == (80, 40)
    with tarfile.open(path) as tar:
        assert y.picture.read_bytes() == tar.extractfile("deep/y.PNG").read()


@needs_webdataset
def test_samples_are_those_that_webdataset_reads(tmp_path):
    """Its own writer, and names of every kind."""
    from webdataset import TarWriter, tariterators

    with TarWriter(str(tmp_path / "0.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"{number:04}", "png": picture(), "txt": f"c{number}", "json": {"group": "g"}})
    write_shard(tmp_path / "1.tar", {
        "a.b/c.png": noise(1), "a.b/c.txt": "x", "./d.jpg": picture(kind="JPEG"), "./d.txt": "y", "e/f.g.png": b"",
        "E.JPEG": picture(kind="JPEG"), "E.TXT": "z", ".h.png": b"", "i": b"", f"{'long' * 60}.png": noise(2),
        f"{'long' * 60}.txt": "w"})
    for path in sorted(tmp_path.glob("*.tar")):
        with open(path, "rb") as stream:
            files = tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
            wanted = {sample["__key__"]: sample for sample in tariterators.group_by_keys(files)}
        samples, damage = index_shard(path)
        assert damage == "" and [sample.key for sample in samples] == list(wanted) and len(samples) >= 3
        for sample in samples:
            raw = wanted[sample.key]
            found = next((raw[ending] for ending in ("jpg", "jpeg", "png", "webp") if ending in raw), None)
            assert (sample.picture and sample.picture.read_bytes()) == found
            assert sample.captions == (raw.get("txt", b"").decode(),) and sample.faults == ()


def test_a_pattern_names_shards_in_its_order(shards, tmp_path):
    names = [tmp_path / f"{number}.tar" for number in range(4)]
    assert find_shards(shards) == (names, "") and find_shards(str(names[2])) == ([names[2]], "")
    assert find_shards(str(tmp_path / "{3..0}.tar")) == (names[::-1], "")
    assert find_shards(str(tmp_path / "{2,*}.tar")) == ([names[2], names[0], names[1], names[3]], "")
    odd = write_shard(tmp_path / "odd{0..3}[a].tar", {})
    assert find_shards(str(odd)) == ([odd], "")
    with pytest.raises(TrainingConfigError, match="Correct the braces"):
        find_shards(str(tmp_path / "{0..3.tar"))


@pytest.mark.parametrize(("pattern", "named"), [
    ("{2..5}.tar", "4.tar, .*5.tar; correct"), ("none/*.tar", r"none/\*.tar; correct"),
    ("pipe:touch run", "pipe:touch run; correct"),
    ("{4..99}.tar", "13.tar and 86 more; correct"),
])
def test_missing_shards_are_refused(shards, tmp_path, pattern, named):
    data = config(pattern if pattern.startswith("pipe:") else tmp_path / pattern)
    with pytest.raises(TrainingDataError, match=f"names shards that do not exist: .*{named} data.shards, or get these .tar"):
        require(*read_examples(data))


def test_without_braceexpand_the_way_to_it_is_told(monkeypatch, shards, tmp_path):
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(TrainingConfigError, match="pip install braceexpand, or use"):
        read_examples(config(tmp_path / "{0..3}.tar"))
    assert len(read_examples(config(shards))[0]) == 24, "nothing else needs it"


def test_bad_samples_are_all_told_and_the_others_found(tmp_path):
    path = write_shard(tmp_path / "0.tar", {
        "a.png": picture(), "a.txt": "good", "b.png": b"<html>", "b.txt": "x", "c.png": picture("blue"), "d.txt": "x",
        "e.png": picture(), "e.json": "{", "f.png": picture(), "f.json": '{"caption": 3, "group": []}', "g.png": picture(),
        "g.txt": b"\xff", "h.png": picture()[:90], "h.txt": "x", "i.png": picture(), "i.txt": "x",
        "i.mask.png": picture("white", (64, 32)), "j.png": picture(), "j.jpg": picture(), "j.txt": "x", "k.png": picture(),
        "k.txt": "x", "k.ref.png": b"", "l.png": picture(), "l.txt": "x", "l.ref.png": picture("lime"),
        "l.mask.png": picture("white", (32, 64)), "m.png": picture(), "m.txt": "x", "n.png": picture(), "n.json": "[]",
        "o.png": picture(), "o.json": '{"caption": "x", "captions": ["y"]}', "p.png": picture(), "p.json": '{"captions": "x"}'})
    with tarfile.open(path, "a") as tar:
        again = tarfile.TarInfo("m.png")
        tar.addfile(again)
        link = tarfile.TarInfo("q.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
    examples, problems = read_examples(config(path))
    found = {where.removeprefix("0.tar/"): text for where, text in texts(problems).items()}
    assert [example.name for example in examples] == ["0.tar/a", "0.tar/c"] and set(found) == set("bcdefghijklmnopq")
    assert found["b"].startswith("! is no picture that can be read") and found["h"].startswith("! cannot be decoded")
    assert found["c"] == "has no caption: the empty caption is used" and found["d"] == "has no picture (jpg, jpeg, png, webp)"
    assert found["e"].startswith("! its json is not JSON (Expecting property name")
    assert Counter(problem.text for problem in problems if problem.where == "0.tar/f") == Counter(
        ["its json has caption = 3; wanted text", "its json has group = []; wanted text"])
    assert found["g"] == "! its txt is not UTF-8 (byte 0); save it as UTF-8"
    assert found["i"] == "! its mask is 64 x 32 px, another shape than the picture's 64 x 64; draw it on the picture"
    assert found["j"] == "! has several pictures (jpg, png); wanted one"
    assert found["k"] == "! its reference k.ref.png is empty (0 bytes); get the file again"
    assert found["l"].startswith("! its reference's mask is 32 x 64 px, another shape than the reference's 64 x 64")
    assert found["m"] == "! has 2 files png; wanted one" and found["n"] == "! its json is []; wanted an object"
    assert "both caption and captions" in found["o"] and "wanted a list of texts" in found["p"]
    assert found["q"] == "! its png is a link, or sparse; pack plain files"


SOUND = {f"{key}.{ending}": content for key in "abc" for ending, content in (("png", noise(ord(key))), ("txt", key))}
BLOCKS = (len(noise(97)) + 511) // 512 + 3  # of a sample: two headers, a picture, a caption


@pytest.mark.parametrize(("damage", "left", "told"), [
    (lambda content: content[:(BLOCKS + 2) * 512 + 9], "a", r"is damaged at byte .* \(unexpected end of data\); 1 samples"),
    (lambda content: content[:(3 * BLOCKS - 2) * 512], "ab", r"\(it is cut off\); 2 samples"),  # c has lost its caption
    (lambda content: content[:2 * BLOCKS * 512 + 100], "a", r"\(it is cut off\)"),
    (lambda content: content[:BLOCKS * 512] + b"x" + content[BLOCKS * 512 + 1:], "", r"\(something else follows\); 0 samples"),
    (lambda content: content + content, "ab", r"\(something else follows\)"),
    (lambda content: content[:2 * BLOCKS * 512] + bytes(1 << 21), "a", "empty bytes follow"),
    (lambda content: b"no tar", "", r"is no tar file that can be read \(truncated header\); get it again"),
    (lambda content: b"", "", "is no tar file"),
    (gzip.compress, "", r"is compressed \(gzip\).* unpack it to a plain .tar file"),
])
def test_a_damaged_shard_is_told_and_its_whole_samples_found(tmp_path, damage, left, told):
    sound, broken = write_shard(tmp_path / "0.tar", SOUND), tmp_path / "1.tar"
    broken.write_bytes(damage(sound.read_bytes()))
    examples, problems = read_examples(config(tmp_path / "*.tar"))
    assert [example.name for example in examples] == [f"0.tar/{key}" for key in "abc"] + [f"1.tar/{key}" for key in left]
    with pytest.raises(TrainingDataError, match=rf"1 problem in the training data:\n- 1.tar: .*{told}"):
        require(examples, problems)


def test_a_shard_that_cannot_be_opened_is_told(shards, tmp_path, monkeypatch):
    found = [tmp_path / "0.tar", tmp_path / "9.tar"]  # the last is lost since
    monkeypatch.setattr("emma_core.training.examples.find_shards", lambda pattern: (found, ""))
    examples, problems = read_examples(config(shards))
    assert len(examples) == 6
    with pytest.raises(TrainingDataError, match=r"- 9.tar: cannot be read \(No such file or directory\)"):
        require(examples, problems)


def test_samples_of_no_group_are_their_own_references(shards, tmp_path):
    write_shard(tmp_path / "more/0.tar", {"000.png": noise(70), "000.json": '{"group": "ann"}', "1.png": noise(71),
                                          "1.json": '{"group": "ann", "caption": "x"}'})
    data = config(tmp_path / "**/*.tar")
    examples, problems = read_examples(data)
    assert len(examples) == len({example.name for example in examples}) == 26, "shards of one name are told apart"
    assert [PictureSet.of(examples).references(index) for index in (0, 23, 24, 25)] == [(0,), (23,), (25,), (24,)]
    assert not [problem for problem in problems if "alone in its group" in problem.text]
    described = describe(examples, problems, data).splitlines()
    assert described[0] == "5 shards, 26 samples" and described[2] == "groups: 1 (ann: 2), 24 pictures in none"
    assert described[5] == "references: given for 0, others of the group for 2, the picture itself for 24"
    assert describe(*read_examples(config(shards)), config(shards)).splitlines()[2] == "groups: 0, 24 pictures in none"
    assert read_examples(config(write_shard(tmp_path / "one.tar", {"a.png": picture(), "a.txt": "x"})))[1] == []


def test_shards_are_the_same_set_as_files(tmp_path):
    """The same entries in the same cache, from a listing with references and masks: nothing is encoded again."""
    members, lines = {}, []
    for number in range(4):
        files = {f"{number}.png": noise(number), f"{number}.ref.png": noise(50 + number, (32, 48))}
        mask = Image.new("L", (32, 48), 0)
        mask.paste(255, (4, 4, 20, 30))
        mask.save(stream := io.BytesIO(), "PNG")
        for name, content in {**files, f"{number}.ref.mask.png": stream.getvalue()}.items():
            (tmp_path / name).write_bytes(content)
        members |= {**files, f"{number}.mask.png": stream.getvalue(), f"{number}.txt": f"caption {number}"}
        lines.append({"image": f"{number}.png", "caption": f"caption {number}", "reference": f"{number}.ref.png"})
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_shard(tmp_path / "set.tar", members)
    ways = {"masked": True, "flip": True}
    files = encode("", Frozen(Whole()), tmp_path / "cache", jsonl=str(tmp_path / "set.jsonl"), **ways)
    again = Frozen(Whole())
    packed = encode(tmp_path / "set.tar", again, tmp_path / "cache", **ways)
    assert (again.latents, again.texts, again.reference.pictures) == (0, [], 0)
    assert packed.latent_keys == files.latent_keys and packed.variant_keys == files.variant_keys and packed.variants(5) == 4
    anew = encode(tmp_path / "set.tar", Frozen(Whole()), tmp_path / "other", workers=2, **ways)
    for index in range(4):
        assert torch.equal(anew.latent(index, True), files.latent(index, True)) and anew.references(index) == (4 + index,)
        for variant in range(4):
            assert torch.equal(anew.features(4 + index, variant)["global"], files.features(4 + index, variant)["global"])


def test_reading_processes_change_nothing(shards, tmp_path):
    alone, many = (encode(shards, Frozen(Whole()), tmp_path / str(workers), workers=workers) for workers in (0, 2))
    assert alone.examples == many.examples and alone.latent_keys == many.latent_keys
    assert all(torch.equal(alone.features(index, 2)["global"], many.features(index, 2)["global"]) for index in range(24))


def test_of_a_changed_shard_what_changed_is_encoded_alone(shards, tmp_path):
    encode(shards, Frozen(Whole()), tmp_path / "cache")
    samples = {f"new{sample}.{ending}": content for sample in range(6) for ending, content in (
        ("png", noise(99 if sample == 4 else 10 + sample, (40, 24 + 8 * sample))), ("txt", f"1 {sample}" if sample else "new"))}
    write_shard(tmp_path / "1.tar", {"first.png": noise(0, (40, 24)), "first.txt": "0 0", **samples})
    again = Frozen(Whole())
    assert len(encode(shards, again, tmp_path / "cache")) == 25
    assert (again.latents, again.texts, again.reference.pictures) == (1, ["new"], 4)


def test_a_shard_that_is_cut_meanwhile_is_told(shards, tmp_path):
    data = config(shards)
    examples, _ = read_examples(data)
    (tmp_path / "3.tar").write_bytes((tmp_path / "3.tar").read_bytes()[:600])
    with pytest.raises(TrainingDataError, match=r"6 problems .*\n- 000.png: cannot be read any more \(3.tar ends inside 0"):
        prepare(examples, data, EncoderConfig(), Frozen().encoders(), None, tmp_path / "cache")
    with pytest.raises(OSError, match="3.tar ends inside x"):
        ShardMember(tmp_path / "3.tar", "x", 500, 101).read_bytes()


def entries(folder: Path) -> Counter:
    """How often each entry of a cache was written."""
    from safetensors import safe_open

    found = Counter()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            found.update(list(json.loads(opened.metadata()["entries"])))
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_processes_encode_each_entry_once_and_see_all(shards, tmp_path, count):
    alone = encode(shards, Frozen(Whole()), tmp_path / "alone", flip=True)
    frozen = [Frozen(Whole()) for _ in range(count)]
    found = in_processes(count, lambda mine: encode(shards, frozen[mine.rank], tmp_path / "shared", mine, flip=True))
    assert entries(tmp_path / "shared") == entries(tmp_path / "alone") and set(entries(tmp_path / "alone").values()) == {1}
    assert [one.latents for one in frozen] == [48 // count] * count and [len(one.texts) for one in frozen] == {
        2: [12, 13], 3: [8, 8, 9]}[count]
    for prepared in found:
        assert prepared.examples == alone.examples and prepared.variant_keys == alone.variant_keys
        assert all(torch.equal(prepared.latent(index, True), alone.latent(index, True)) for index in range(24))
        assert prepared.features(23, 3).keys() == {"global"} and prepared.text("3 5").shape == (1, 4, 2)
    again = [Frozen(Whole()) for _ in range(count)]
    in_processes(count, lambda mine: encode(shards, again[mine.rank], tmp_path / "shared", mine, flip=True))
    assert [(one.latents, one.texts, one.reference.pictures) for one in again] == [(0, [], 0)] * count


def test_each_process_reads_shards_of_its_own(shards, tmp_path, monkeypatch):
    read: dict[int, set[str]] = {0: set(), 1: set()}
    by_thread = threading.local()
    content = ShardMember.read_bytes
    monkeypatch.setattr(ShardMember, "read_bytes", lambda self: read[by_thread.rank].add(self.shard.name) or content(self))

    def work(mine):
        by_thread.rank = mine.rank
        return encode(shards, Frozen(Whole()), tmp_path / "cache", mine, reference_crops=0)

    in_processes(2, work)
    assert read == {0: {"0.tar", "1.tar"}, 1: {"2.tar", "3.tar"}}


def test_problems_of_any_process_are_raised_in_all(shards, tmp_path):
    """Those of the listing, and those that show when encoding."""
    def dark(pixels_B3HW):
        made = right(pixels_B3HW)
        made[pixels_B3HW.mean((1, 2, 3)) < -0.5] = float("nan")
        return made

    for number in (0, 3):
        write_shard(tmp_path / f"{number}.tar", {"dark.png": picture(f"#{number}00000", (40, 24)), "dark.txt": "x",
                                                 "light.png": noise(number), "light.txt": "x"})
    frozen = Frozen()
    right, frozen._latents = frozen._latents, dark
    for found in in_processes(2, lambda mine: encode(shards, frozen, tmp_path / "cache", mine, None)):
        assert isinstance(found, TrainingDataError) and str(found).startswith("2 problems"), found
        assert all(f"\n- {number}.tar/dark: its latents hold NaN" in str(found) for number in (0, 3))
    write_shard(tmp_path / "0.tar", {"a.png": b"x", "a.txt": "x"})
    (tmp_path / "3.tar").write_bytes(b"x")
    for found in in_processes(2, lambda mine: encode(shards, Frozen(), tmp_path / "cache", mine, None)):
        assert isinstance(found, TrainingDataError) and "\n- 3.tar: is no tar file" in str(found)
        assert "\n- 0.tar/a: is no picture" in str(found)


def test_variants_that_one_process_leaves_out_are_left_out_by_all(shards, tmp_path):
    levels = np.full((24, 40, 3), 200, np.uint8)
    levels[:, -1] = 0  # mirrored, it is no face
    Image.fromarray(levels).save(stream := io.BytesIO(), "PNG")
    write_shard(tmp_path / "3.tar", {"a.png": stream.getvalue(), "a.txt": "x"})
    for prepared in in_processes(2, lambda mine: encode(shards, Frozen(Faces()), tmp_path / "cache", mine, FACE)):
        assert [prepared.variants(index) for index in (0, 18)] == [2, 1] and prepared.left_out == 1


@pytest.mark.parametrize("part", ["_texts", "_latents"])
def test_a_failure_in_one_process_ends_all(shards, tmp_path, part):
    frozen = [Frozen(Whole()), Frozen(Whole())]

    def fail(batch):
        raise RuntimeError("out of memory.")

    setattr(frozen[1], part, fail)
    with pytest.warns(EmmaWarning, match="process 2 of 2 failed and waits for the others to end: RuntimeError: out of memory"):
        first, second = in_processes(2, lambda mine: encode(shards, frozen[mine.rank], tmp_path / "cache", mine))
    assert isinstance(first, TrainingError) and isinstance(second, RuntimeError)
    assert str(first).startswith("process 2 of 2 failed, which ends the others: RuntimeError: out of memory. Correct that")
    again = [Frozen(Whole()), Frozen(Whole())]
    in_processes(2, lambda mine: encode(shards, again[mine.rank], tmp_path / "cache", mine))
    assert sum(len(one.texts) for one in again) == {"_texts": 13, "_latents": 0}[part], "what the first has done is kept"


def test_processes_without_a_common_cache_or_set_are_refused(shards, tmp_path):
    with pytest.warns(EmmaWarning, match="failed and waits"):
        found = in_processes(2, lambda mine: encode(shards, Frozen(), tmp_path / f"cache {mine.rank}", mine, None))
    assert all(isinstance(one, TrainingError) for one in found)
    assert "lacks 13 texts that other processes wrote. Name a folder in data.cache" in str(found[0])
    data = [config(""), config("")]
    for rank in range(2):
        (tmp_path / f"set {rank}").mkdir()
        for number in range(3 + rank):
            (tmp_path / f"set {rank}" / f"{number}.png").write_bytes(noise(number))
        data[rank] = DataConfig(folder=str(tmp_path / f"set {rank}"), workers=0)
    for one in in_processes(2, lambda mine: read_examples(data[mine.rank], mine)):
        assert isinstance(one, TrainingError) and "the processes see [3, 4] files; wanted the same number" in str(one)


def test_damage_that_one_process_finds_is_repaired_by_all(shards, tmp_path):
    encode(shards, Frozen(Whole()), tmp_path / "cache")
    for path in (tmp_path / "cache" / "latents").rglob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    frozen = [Frozen(Whole()), Frozen(Whole())]
    with pytest.warns(EmmaWarning, match="checksum"):
        found = in_processes(2, lambda mine: encode(shards, frozen[mine.rank], tmp_path / "cache", mine))
    assert [one.latents for one in frozen] == [12, 12] and all(one.latent(23).isfinite().all() for one in found)


def test_alone_nothing_is_exchanged():
    assert Processes.of_run() == Processes() and list(Processes().part("abc")) == ["a", "b", "c"]
    parts = [Processes(rank, 3).part(range(8)) for rank in range(3)]
    assert [list(part) for part in parts] == [[0, 1], [2, 3, 4], [5, 6, 7]]


@pytest.mark.filterwarnings("error")
def test_on_one_core_nothing_warns_of_too_many_readers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    assert list(in_workers(range(5), abs, 2, fewest=1)) == [0, 1, 2, 3, 4]


def test_a_signal_to_the_whole_group_is_answered_by_the_parent_alone(tmp_path):
    """`timeout` and clusters end readers and parent together: the reader's end is no fault of its own to be told."""
    script = tmp_path / "reads.py"
    script.write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from emma_core.commands.flags import end_as_interrupt
from emma_core.training.shards import in_workers

def slow(number):
    time.sleep(0.2)
    return number

if __name__ == "__main__":
    end_as_interrupt()
    try:
        for number in in_workers(range(40), slow, 2, fewest=1):
            print(number, flush=True)
    except KeyboardInterrupt:
        print("interrupted")
""")
    ran = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True)
    assert ran.stdout.readline() == "0\n"
    os.killpg(ran.pid, signal.SIGTERM)
    told, faults = ran.communicate(timeout=60)
    assert told.splitlines()[-1] == "interrupted" and faults == ""
