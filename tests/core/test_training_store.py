"""The cache of tensors: what goes in comes out, damage is found, several processes may write."""

import errno
import json
import multiprocessing
import re
from pathlib import Path

import pytest
import torch

from emma_core.errors import EmmaWarning, TrainingError
from emma_core.training.store import FeatureStore, Filling


def entries(first: int, last: int, dtype=torch.float32) -> dict:
    return {f"key{n}": {"latent": torch.full((4, 8, 8), n, dtype=dtype), "one": torch.tensor(float(n))}
            for n in range(first, last)}


def shards(store: FeatureStore) -> list[Path]:
    return sorted(store.folder.glob("*.safetensors"))


@pytest.fixture
def filled(tmp_path):
    FeatureStore(tmp_path, {"vae": "a"}).put_many(entries(0, 3))
    FeatureStore(tmp_path, {"vae": "a"}).put_many(entries(3, 5))
    return FeatureStore(tmp_path, {"vae": "a"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_entries_come_back_bit_for_bit(tmp_path, dtype):
    row = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    FeatureStore(tmp_path, {"vae": "a"}).put_many({str(n): {"latent": row[n]} for n in range(6)})
    again = FeatureStore(tmp_path, {"vae": "a"})
    assert again.missing(["4", "new", "4", "5", "new"]) == ["new"] and again.nbytes(["4", "5", "new"]) == 2 * row[0].nbytes
    found = again.get("4")["latent"]
    assert found.dtype == dtype and torch.equal(found, row[4])


def test_other_settings_are_another_cache(filled, tmp_path):
    other = FeatureStore(tmp_path, {"vae": "b"})
    assert other.folder != filled.folder and other.missing(["key0"]) == ["key0"]
    assert json.loads((other.folder / "settings.json").read_text()) == {"vae": "b"}


@pytest.mark.parametrize("content", ['{"vae": "b"}', "{", ""])
def test_changed_or_damaged_settings_are_refused(filled, tmp_path, content):
    (filled.folder / "settings.json").write_text(content)
    with pytest.raises(TrainingError, match=r"settings.json is damaged or was changed.*Delete this folder"):
        FeatureStore(tmp_path, {"vae": "a"})


def test_what_others_write_is_seen(filled, tmp_path):
    FeatureStore(tmp_path, {"vae": "a"}).put_many(entries(7, 8))
    assert filled.missing(["key7", "key8"]) == ["key8"] and filled.get("key7")["one"] == 7


@pytest.mark.parametrize("damage", [
    lambda content: content[:len(content) // 2], lambda content: content[:5], lambda content: b"<html>" * 100,
    lambda content: b""])
def test_a_truncated_or_foreign_shard_is_set_aside_alone(filled, tmp_path, damage):
    broken = filled._index["key0"].shard
    broken.write_bytes(damage(broken.read_bytes()))
    with pytest.warns(EmmaWarning, match="is damaged .* set aside"):
        again = FeatureStore(tmp_path, {"vae": "a"})
    assert again.missing([f"key{n}" for n in range(5)]) == ["key0", "key1", "key2"] and again.get("key4")["one"] == 4
    assert broken.with_name(broken.name + ".damaged").exists() and not broken.exists()
    again.put_many(entries(0, 3))
    assert again.get("key1")["one"] == 1


def test_changed_bytes_are_found_by_the_checksum(filled, tmp_path):
    path = filled._index["key3"].shard
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = FeatureStore(tmp_path, {"vae": "a"})
    assert again.missing(["key3", "key4"]) == []
    with pytest.warns(EmmaWarning, match="checksum"), pytest.raises(TrainingError, match="was set aside. Start the run again"):
        for key in ("key3", "key4"):
            again.get(key)
    assert again.missing(["key0", "key3", "key4"]) == ["key3", "key4"]


def test_an_unknown_entry_is_refused(filled):
    with pytest.raises(TrainingError, match="has no entry key9"):
        filled.get("key9")


def test_no_more_shards_are_open_than_wanted(tmp_path):
    store = FeatureStore(tmp_path, {}, most_open=2)
    for n in range(6):
        store.put_many(entries(n, n + 1))
    assert [store.get(f"key{n}")["one"].item() for n in (0, 5, 1, 4, 0)] == [0, 5, 1, 4, 0] and len(store._open) == 2


def test_an_entry_is_read_without_the_others_of_its_shard(tmp_path):
    """Of a shard with damage in one entry, the other can be read, and keeps no more memory than its own."""
    FeatureStore(tmp_path, {}).put_many({name: {"x": torch.full((1000,), 3.0)} for name in "ab"})
    path, = shards(store := FeatureStore(tmp_path, {}))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    sound, damaged = ("a", "b") if store.get("a")["x"][-1] == 3 else ("b", "a")
    assert store.get(sound)["x"].untyped_storage().nbytes() == 4000
    with pytest.warns(EmmaWarning, match="checksum"), pytest.raises(TrainingError):
        store.get(damaged)


def test_a_full_disk_tells_the_need_and_loses_nothing(filled, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = shards(filled)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TrainingError, match="is full: .* free, about (.*) MB needed.*before is kept") as found:
        filled.put_many({"big": {"x": torch.zeros(1_000_000)}}, still_to_come=9)
    assert float(re.search(r"about ([\d.]+) MB", str(found.value))[1]) == pytest.approx(40, rel=0.01)
    assert shards(filled) == before and not list(filled.folder.glob(".*")) and filled.get("key0")["one"] == 0


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(TrainingError, match="cannot be written .*data.cache"):
        FeatureStore(tmp_path / "cache", {})


def write_all(folder: str, start: int) -> None:
    store = FeatureStore(folder, {"vae": "a"})
    for n in range(start, start + 20):
        store.put_many(entries(n, n + 2))


def test_two_processes_may_write_the_same_at_once(tmp_path):
    """Shards of the same keys and of overlapping ones."""
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    writers = [context.Process(target=write_all, args=(str(tmp_path), start)) for start in (0, 0, 10)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    store = FeatureStore(tmp_path, {"vae": "a"})
    keys = [f"key{n}" for n in range(31)]
    assert store.missing(keys) == [] and [store.get(key)["one"].item() for key in keys] == list(range(31))
    assert not list(store.folder.glob("*.damaged")) and not list(store.folder.glob(".*"))


def test_what_was_collected_is_written_when_work_is_interrupted(tmp_path):
    store, seen = FeatureStore(tmp_path, {}), []
    with pytest.raises(KeyboardInterrupt), Filling("latents", store, 200, lambda *told: seen.append(told)) as filling:
        for key, tensors in entries(0, 70).items():
            filling.add(key, tensors)
        assert len(shards(store)) == 1
        raise KeyboardInterrupt
    assert FeatureStore(tmp_path, {}).missing(entries(0, 71)) == ["key70"]
    assert seen[0] == ("latents", 1, 200) and seen[-1] == ("latents", 70, 200)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_never_cached(tmp_path, value):
    store = FeatureStore(tmp_path, {"of": "latents"})
    with pytest.raises(TrainingError, match=r"one of the latents came out with NaN or infinite values \(latent\)"), \
            Filling("latents", store, 2, lambda *told: None) as filling:
        filling.add("good", {"latent": torch.ones(2)})
        filling.add("bad", {"latent": torch.tensor([1.0, value])})
    assert store.missing(["good", "bad"]) == ["bad"]
