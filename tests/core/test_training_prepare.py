"""Latents, texts and features computed once: the right numbers, the right work, nothing lost, every problem told."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from emma_core.encoders.base import Encoded, PictureEncoder
from emma_core.encoders.options import EncodeOptions, Framing
from emma_core.encoders.pictures import Preparation
from emma_core.errors import EmmaWarning, ImageInputError, ReferenceMismatchError, TrainingDataError
from emma_core.training.config import DataConfig, EncoderConfig
from emma_core.training.examples import read_examples
from emma_core.training.prepare import Encoders, prepare

GLOBAL = EncodeOptions(("global",))


class Whole(PictureEncoder):
    """Means of what is seen, with its calls counted."""

    feature_names = ("global", "local")
    bytes_per_picture = 1

    def __init__(self):
        self.model, self.description, self.pictures = torch.nn.Identity(), {"family": "means", "fingerprint": "1"}, 0
        self.preparation = Preparation(8, (0.5,) * 3, (0.5,) * 3, "bilinear", "pad", "white")

    def features_of(self, seen_B3SS, options):
        self.pictures += len(seen_B3SS)
        return {"global": seen_B3SS.mean((2, 3))[:, None], "local": seen_B3SS.flatten(2).transpose(1, 2)}


class Faces:
    """A face is a picture that is not dark; with a list of the sizes of its batches."""

    feature_names = ("face",)
    bytes_per_picture = 1

    def __init__(self, per_picture: int = 1):
        self.model, self.description = torch.nn.Identity(), {"family": "faces", "fingerprint": "1"}
        self.batches, self.per_picture = [], per_picture

    def encode(self, image_BHW3, mask_BHW, options, labels=()):
        self.batches.append(len(image_BHW3))
        for image_HW3, label in zip(image_BHW3, labels, strict=True):
            if image_HW3[:, 0].mean() < 0.1:  # the left column decides: mirroring matters
                raise ImageInputError(f"no face found in {label}. Crop nearer.")
        rows = self.per_picture
        return [Encoded({"face": image_HW3.mean((0, 1)).expand(rows, 1, 3)}, image_HW3[None]) for image_HW3 in image_BHW3]


class Frozen:
    """Fake models that count what they are given."""

    def __init__(self, reference_encoder=None):
        self.reference, self.latents, self.texts = reference_encoder, 0, []

    def encoders(self, **changes) -> Encoders:
        return Encoders(self._latents, self._texts, self.reference, "vae", "t5", **changes)

    def _latents(self, pixels_B3HW):
        assert pixels_B3HW.min() >= -1 and pixels_B3HW.max() <= 1
        self.latents += len(pixels_B3HW)
        pooled_B3hw = torch.nn.functional.avg_pool2d(pixels_B3HW, 8)
        return torch.cat([pooled_B3hw, pooled_B3hw.mean(1, keepdim=True)], 1).half()

    def _texts(self, captions):
        self.texts += captions
        return [torch.full((1, 1 + len(caption), 2), float(len(caption))) for caption in captions]


def draw(path: Path, seed: int, size: tuple[int, int] = (40, 24), caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(100, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    path.with_suffix(".txt").write_text(caption or path.stem)


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        draw(tmp_path / f"set/ann/{number}.png", number)
    draw(tmp_path / "set/bob/3.png", 3, (32, 64))
    return tmp_path / "set"


def run(folder: Path, frozen: Frozen, options=GLOBAL, masked=False, cache="cache", progress=None, **data):
    config = DataConfig(**{"folder": str(folder), "resolution_px": 32, "bucket_step_px": 8, "workers": 0} | data)
    examples, _ = read_examples(config)
    return prepare(examples, config, EncoderConfig(masked=masked), frozen.encoders(), options, folder.parent / cache, progress)


def test_everything_is_there_under_the_right_index(folder):
    frozen, told = Frozen(Whole()), []
    prepared = run(folder, frozen, flip=True, progress=lambda *seen: told.append(seen))
    assert len(prepared) == 4 and [prepared.bucket(index) for index in (0, 3)] == [(40, 24), (24, 40)]
    with Image.open(folder / "ann/1.png") as picture:
        resized = ImageOps.fit(picture, prepared.bucket(1), Image.Resampling.LANCZOS)
    for flipped in (False, True):
        levels = np.asarray(ImageOps.mirror(resized) if flipped else resized)
        pixels_13HW = torch.from_numpy(levels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        torch.testing.assert_close(prepared.latent(1, flipped)[:3], torch.nn.functional.avg_pool2d(pixels_13HW, 8)[0].half())
    assert prepared.captions(2) == ("2",) and prepared.text("2").shape == (1, 2, 2) and prepared.text("").shape == (1, 1, 2)
    assert prepared.references(1) == (0, 2) and prepared.references(3) == (3,)
    assert prepared.variants(0) == 4 and prepared.features(0, 3)["global"].shape == (1, 3)
    assert set(told) == {("texts", n, 5) for n in range(1, 6)} | {("latents", n, 8) for n in range(1, 9)} | {
        ("references", n, 16) for n in range(1, 17)}


def test_cached_features_are_those_of_the_encoder(folder):
    """Also where the reading processes resize for it."""
    prepared = run(folder, Frozen(Whole()), EncodeOptions(("global", "local")), workers=2, reference_crops=6)
    assert prepared.variants(0) == 8
    with Image.open(folder / "ann/0.png") as picture:
        shown = [np.array(picture), np.array(ImageOps.mirror(picture))]
    for variant, levels in enumerate(shown):
        image_1HW3 = torch.from_numpy(levels)[None].float() / 255
        wanted = Whole().encode(image_1HW3, None, EncodeOptions(("global", "local")))[0].features
        found = prepared.features(0, variant)
        assert torch.equal(found["local"], wanted["local"][0]) and found["local"].shape == (64, 3)
        torch.testing.assert_close(found["global"], wanted["global"][0])


def test_variants_differ_and_are_the_same_in_every_run(folder):
    first, second = run(folder, Frozen(Whole())), run(folder, Frozen(Whole()), cache="other")
    values = [first.features(0, variant)["global"] for variant in range(4)]
    assert all(torch.equal(value, second.features(0, variant)["global"]) for variant, value in enumerate(values))
    torch.testing.assert_close(values[0], values[1])  # means do not see mirroring
    assert not torch.allclose(values[0], values[2]) and not torch.allclose(values[2], values[3])
    assert run(folder, Frozen(Whole()), reference_crops=0, reference_flip=False).variants(0) == 1


def test_a_second_run_encodes_nothing(folder):
    run(folder, Frozen(Whole()))
    again = Frozen(Whole())
    prepared = run(folder, again)
    assert (again.latents, again.texts, again.reference.pictures) == (0, [], 0) and prepared.latent(3).dtype == torch.float16


def test_what_changed_is_encoded_alone(folder):
    run(folder, Frozen(Whole()), flip=True)
    draw(folder / "ann/1.png", 99)
    (folder / "bob/3.txt").write_text("new")
    again = Frozen(Whole())
    prepared = run(folder, again, flip=True)
    assert (again.latents, again.texts, again.reference.pictures) == (2, ["new"], 4) and len(prepared) == 4


def test_other_sizes_options_and_encoders_are_other_entries(folder):
    run(folder, Frozen(Whole()))
    larger, padded = Frozen(Whole()), Frozen(Whole())
    run(folder, larger, resolution_px=48)
    assert (larger.latents, larger.texts, larger.reference.pictures) == (4, [], 0)
    run(folder, padded, replace(GLOBAL, framing=Framing(frame="stretch")))
    assert (padded.latents, padded.reference.pictures) == (0, 16)
    other = Frozen(Whole())
    other.reference.description = {"family": "means", "fingerprint": "2"}
    run(folder, other)
    assert (other.latents, other.reference.pictures) == (0, 16)


def test_equal_pictures_are_encoded_once(folder):
    (folder / "ann/copy.png").write_bytes((folder / "ann/0.png").read_bytes())
    frozen = Frozen(Whole())
    prepared = run(folder, frozen)
    assert (frozen.latents, frozen.reference.pictures, len(prepared)) == (4, 16, 5)


def test_reading_processes_change_nothing(folder):
    for number in range(4, 24):
        draw(folder / f"ann/{number}.png", number, (24 + number, 24))
    alone, state = run(folder, Frozen(Whole())), torch.get_rng_state()
    many = run(folder, Frozen(Whole()), workers=2, cache="other")
    assert torch.equal(torch.get_rng_state(), state)
    for index in range(24):
        assert torch.equal(alone.latent(index), many.latent(index))
        torch.testing.assert_close(alone.features(index, 2)["global"], many.features(index, 2)["global"])


def test_reading_processes_can_be_started_anywhere(folder, monkeypatch):
    """As on Windows and macOS, where a new interpreter gets its work pickled."""
    for number in range(4, 20):
        draw(folder / f"ann/{number}.png", number)
    started = []

    def loader(dataset, num_workers, **settings):
        started.append(num_workers)
        return DataLoader(pickle.loads(pickle.dumps(dataset)), **settings)

    monkeypatch.setattr("emma_core.training.shards.DataLoader", loader)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)  # cores
    prepared = run(folder, Frozen(Whole()), workers=3)
    assert started == [3] * 4 and len(prepared) == 20, "looked at, digested, latents, references"


def test_masks_remove_the_background_of_references(folder):
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        with Image.open(path) as picture:
            mask = Image.new("L", picture.size, 255)
            if not number:
                mask.paste(0, (0, 0, picture.width // 2, picture.height))
        mask.save(path.with_name(path.stem + ".mask.png"))
    options = replace(GLOBAL, framing=Framing(background="black", frame="stretch"))
    prepared = run(folder, Frozen(Whole()), options, masked=True)
    whole = run(folder, Frozen(Whole()), options)
    assert all((prepared.features(0, variant)["global"] < whole.features(0, variant)["global"]).all() for variant in range(4))
    half, all_of_it = (one.features(0, 0)["global"] for one in (prepared, whole))
    assert (half - all_of_it / 2).abs().max() < 0.2 * all_of_it.max(), "the left half is black"
    assert all(whole.features(0, variant)["global"].min() > 0 for variant in range(4))
    assert all(torch.equal(prepared.features(1, variant)["global"], whole.features(1, variant)["global"]) for variant in (0, 1))


def test_a_changed_mask_is_encoded_alone(folder):
    for path in folder.rglob("*.png"):
        with Image.open(path) as picture:
            Image.new("L", picture.size, 255).save(path.with_name(path.stem + ".mask.png"))
    run(folder, Frozen(Whole()), masked=True)
    Image.new("L", (40, 24), 9).save(folder / "ann/2.mask.png")
    again = Frozen(Whole())
    run(folder, again, masked=True)
    assert (again.latents, again.reference.pictures) == (0, 4)


def test_references_without_a_mask_are_all_told(folder):
    Image.new("L", (40, 24), 255).save(folder / "ann/0.mask.png")
    with pytest.raises(TrainingDataError, match=r"3 problems(.*\n)- ann/1.png: has no mask, but encoder.masked is on(.*\n)+"):
        run(folder, Frozen(Whole()), masked=True)


def test_faces_are_mirrored_but_not_cropped_and_missing_ones_are_all_told(folder):
    for name in ("ann/dark", "bob/dark"):
        draw(folder / f"{name}.png", 0)
        Image.new("RGB", (40, 24), (name == "ann/dark" and "black") or "#050000").save(folder / f"{name}.png")
    frozen = Frozen(Faces())
    with pytest.raises(TrainingDataError) as found:
        run(folder, frozen, EncodeOptions(("face",)))
    assert str(found.value).splitlines()[:3] == [
        "2 problems in the training data:", "- ann/dark.png: no face found in ann/dark.png. Crop nearer.",
        "- bob/dark.png: no face found in bob/dark.png. Crop nearer."]
    assert max(frozen.reference.batches) > 1  # of one size: batched, and a batch with a dark one is taken apart
    for path in folder.rglob("dark.*"):
        path.unlink()
    again = Frozen(Faces())
    prepared = run(folder, again, EncodeOptions(("face",)))
    assert again.reference.batches == [] and again.latents == 0 and prepared.variants(0) == 2


def test_a_mirrored_face_that_is_not_found_is_left_out(folder):
    levels = np.full((24, 40, 3), 200, np.uint8)
    levels[:, -1] = 0
    Image.fromarray(levels).save(folder / "ann/0.png")
    prepared = run(folder, Frozen(Faces()), EncodeOptions(("face",)))
    assert [prepared.variants(index) for index in range(4)] == [1, 2, 2, 2]
    assert prepared.summary()["variants_left_out"] == 1


def test_several_faces_of_one_picture_are_refused(folder):
    with pytest.raises(TrainingDataError, match="ann/0.png: became 2 references; wanted one"):
        run(folder, Frozen(Faces(per_picture=2)), EncodeOptions(("face",)))


def test_a_feature_that_the_encoder_does_not_give_is_refused(folder):
    with pytest.raises(ReferenceMismatchError, match="the features face are needed"):
        run(folder, Frozen(Whole()), EncodeOptions(("face",)))


def test_latents_that_are_not_finite_are_refused(folder):
    frozen = Frozen(Whole())
    right = frozen._latents
    frozen._latents = lambda pixels_B3HW: right(pixels_B3HW) / (1 if pixels_B3HW.shape[2] == 24 else 0)
    with pytest.raises(TrainingDataError, match="1 problem in .*\n- bob/3.png: its latents hold NaN or infinity"):
        run(folder, frozen)


def test_pictures_that_vanish_meanwhile_are_told(folder, monkeypatch):
    monkeypatch.setattr(Frozen, "_texts", lambda self, captions: [(folder / "ann/1.png").write_bytes(b"x")] and [
        torch.zeros(1, 1, 2) for _ in captions])
    for number in range(20):
        draw(folder / f"cat/{number}.png", number + 50)
    with pytest.raises(TrainingDataError, match=r"1 problem .*\n- ann/1.png: cannot be read any more"):
        run(folder, Frozen(Whole()), workers=1)
    config = DataConfig(folder=str(folder), resolution_px=32, bucket_step_px=8)
    examples, _ = read_examples(config)
    for name in ("2.png", "0.png"):
        (folder / "ann" / name).unlink()
    with pytest.raises(TrainingDataError, match=r"2 problems .*\n- 0.png: cannot be read any more .*\n- 2.png: cannot"):
        prepare(examples, config, EncoderConfig(), Frozen().encoders(), None, folder.parent / "cache")


def test_interrupted_work_goes_on_where_it_was(folder):
    for number in range(70):
        draw(folder / f"cat/{number}.png", number + 50)
    broken = Frozen()
    right = broken._latents

    def fail_late(pixels_B3HW):
        if broken.latents >= 66:
            raise KeyboardInterrupt
        return right(pixels_B3HW)

    broken._latents = fail_late
    with pytest.raises(KeyboardInterrupt):
        run(folder, broken, None)
    again = Frozen()
    run(folder, again, None)
    assert again.texts == [] and again.latents + broken.latents == 74 and broken.latents >= 66


def test_damaged_shards_are_computed_again(folder):
    run(folder, Frozen(Whole()))
    shards = sorted((folder.parent / "cache").rglob("*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    again = Frozen(Whole())
    with pytest.warns(EmmaWarning, match="checksum"):
        prepared = run(folder, again)
    assert (again.latents, len(again.texts), again.reference.pictures) == (4, 5, 16)
    assert prepared.features(0, 0)["global"].isfinite().all()


def test_large_sets_are_read_when_needed(folder):
    held = run(folder, Frozen(Whole()))
    read = replace(held, memory={})
    assert read.hold(most_bytes=100) and read.memory == {} and held.memory
    assert torch.equal(read.latent(3), held.latent(3)) and torch.equal(read.text("2"), held.text("2"))
    assert torch.equal(read.features(2, 1)["global"], held.features(2, 1)["global"])


def test_without_a_reference_encoder_there_are_no_variants(folder):
    prepared = run(folder, Frozen(), None)
    assert prepared.variants(0) == 0 and prepared.latent(0).shape == (4, 3, 5)


def test_extra_references_follow_the_targets(folder, tmp_path):
    (tmp_path / "set.jsonl").write_text('{"image": "set/ann/0.png", "caption": "x", "reference": "set/bob/3.png"}')
    data = DataConfig(jsonl=str(tmp_path / "set.jsonl"), resolution_px=32, bucket_step_px=8, workers=0)
    frozen = Frozen(Whole())
    prepared = prepare(read_examples(data)[0], data, EncoderConfig(), frozen.encoders(), GLOBAL, tmp_path / "cache")
    assert len(prepared) == 1 and prepared.references(0) == (1,) and (prepared.variants(0), prepared.variants(1)) == (0, 4)
    assert (frozen.latents, frozen.reference.pictures) == (1, 4)
    with Image.open(folder / "bob/3.png") as picture:
        image_1HW3 = torch.from_numpy(np.array(picture))[None].float() / 255
    assert torch.equal(prepared.features(1)["global"], Whole().encode(image_1HW3, None, GLOBAL)[0].features["global"][0])


def test_the_summary_counts_and_names_nobody(folder):
    summary = run(folder, Frozen(Whole())).summary()
    assert summary == {"pictures": 4, "groups": 2, "captions": 4, "distinct_captions": 4, "references": 4,
                       "reference_variants": 16, "variants_left_out": 0, "sizes_px": {"24x40": 1, "40x24": 3}}


def test_an_empty_set_is_refused(tmp_path):
    with pytest.raises(TrainingDataError, match="no picture to learn from"):
        prepare([], DataConfig(), EncoderConfig(), Frozen().encoders(), None, tmp_path)
