"""Load Training Folder: the command line's checks, groups, masks and cache in the graph, and pictures that are wired."""

from __future__ import annotations

import dataclasses

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny_models import TEXT_DIM, WIDTH

CAPTIONS = {"ada/1": "a red cat\na cat", "ada/2": "a red dog", "bob/1": "a blue house", "bob/2": ""}


class Many(list):
    """Several values on one input, as a list output of another node gives them."""


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The folder `people` of the input folder: two groups of two pictures, one of them wide, with masks."""
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    for index, (name, caption) in enumerate(CAPTIONS.items()):
        path = tmp_path / "input" / "people" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (96, 64) if index == 3 else (64, 64), (40 * index, 90, 200))
        ImageDraw.Draw(picture).ellipse((10, 10, 50, 50), fill=(250, 60 * index, 0))
        picture.save(path)
        Image.new("L", picture.size, 255).save(path.with_suffix(".mask.png"))
        if caption:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return tmp_path / "input" / "people"


@pytest.fixture(scope="module")
def encoder(pack_import):
    return pack_import("host.encoders").load_playground_reference_encoder()


@pytest.fixture
def load(run_node, vae, clips):
    def run(**changes):
        settings = {"folder": "people", "vae": vae, "clip": clips[0], "resolution": 64, "use_masks": False, "flip": False,
                    "reference_crops": 1, "own_reference": False, **changes}
        return run_node("EMMALoadTrainingFolder", **{key: list(value) if isinstance(value, Many) else [value]
                                                     for key, value in settings.items()})
    return run


@pytest.fixture
def train(run_node, tiny, encoder):
    def run(**changes):
        settings = {"model": tiny.model(), "encoder": encoder, "name": "run", "condition": "style", "steps": 3, "batch": 2,
                    "accumulate": 1, "rate": 1e-3, "gate_rate": 5.0, "seed": 3, "precision": "fp32", "timestep_power": 1.0,
                    "inverse_snr": 0.0, "average": 0.0, "checkpoint_every": 100, **changes}
        return run_node("EMMATrainModule", **{key: [value] for key, value in settings.items()})
    return run


def test_a_folder_is_described_as_on_the_command_line(folder, load):
    loaded, report = load()
    assert "pictures: 4 to learn from, 0 that are references alone, 4 with a mask" in report
    assert "groups: 2 (ada: 2, bob: 2)" in report and "bob/2.png: has no caption: the empty caption is used" in report
    assert loaded.captions() == ["", "a red cat", "a cat", "a red dog", "a blue house"]


def test_a_module_learns_from_a_folder_with_its_groups_and_drops_texts_too(folder, load, train, tiny, pack_import, monkeypatch):
    beginning, seen = pack_import("emma_core.training.beginning"), []
    real = beginning.Trainer
    monkeypatch.setattr(beginning, "Trainer", lambda *parts: seen.append(real(*parts)) or seen[-1])
    module, loss_map, report = train(ella=tiny.ella(), training_set=load(flip=True)[0])
    data, config = seen[0].data, seen[0].config
    assert len(loss_map["loss"]) == 3 and "3 updates" in report
    assert [data.references(index) for index in range(4)] == [(1,), (0,), (3,), (2,)] and data.variants(0) == 3
    assert data.bucket(0) == (64, 64) and data.text("a red cat").shape[2] == TEXT_DIM
    assert config.objective.drop_text == config.objective.drop_both == 0.05 and config.data.flip
    assert seen[0].student.places is not None
    described = module.module.config.training["data"]
    assert (described["pictures"], described["groups"], described["distinct_captions"]) == (4, 2, 5)
    assert not any(str(folder.parent) in str(value) for value in module.module.config.training.values())


def test_latents_are_those_of_vae_encode_as_the_unet_reads_them(folder, load, train, tiny, vae, pack_import, monkeypatch):
    training, seen = pack_import("host.training"), []
    real = training.training_set
    monkeypatch.setattr(training, "training_set", lambda *parts: seen.append(real(*parts)) or seen[-1])
    train(ella=tiny.ella(), training_set=load()[0])
    pixels = torch.from_numpy(np.array(Image.open(folder / "ada" / "1.png"), dtype=np.float32) / 255)[None]
    with torch.inference_mode():
        wanted = 0.18215 * vae.encode(pixels)[0]
    assert (seen[0].latent(0) - wanted).abs().max() <= 1e-5
    images = list(seen[0].reference_images())
    assert [tuple(image.shape) for image in images] == [(1, 64, 64, 3)] * 3 + [(1, 64, 96, 3)]
    assert torch.equal(images[0], pixels), "a teacher sees the references by their indices"


def test_the_cache_is_used_again_and_only_what_changed_is_encoded(folder, load, train, tiny, vae, monkeypatch):
    ella, encoded = tiny.ella(), []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    first = train(ella=ella, training_set=load()[0])[1]
    assert sum(encoded) == 4
    assert train(ella=ella, training_set=load()[0])[1] == first and sum(encoded) == 4, "the same run, and nothing to encode"
    Image.new("RGB", (64, 64), "green").save(folder / "ada" / "1.png")
    train(ella=ella, training_set=load()[0])
    assert sum(encoded) == 5
    runs = sorted(path.name for path in (folder.parents[1] / "output" / "emma_training").iterdir())
    assert runs == ["cache", "run", "run_2"], "other pictures are another run"


def test_the_node_is_run_again_when_a_file_changes(folder, host_nodes):
    node = host_nodes.NODE_CLASS_MAPPINGS["EMMALoadTrainingFolder"]
    before = node.fingerprint_inputs(folder=["people"], resolution=[64])
    assert node.fingerprint_inputs(folder=["people"], resolution=[64]) == before
    (folder / "ada" / "1.txt").write_text("a cat that was red")
    assert node.fingerprint_inputs(folder=["people"], resolution=[64]) != before


def test_folders_of_pictures_are_listed_and_no_others(folder, pack_import):
    (folder.parent / "empty").mkdir()
    (folder.parent / ".hidden").mkdir()
    Image.new("RGB", (64, 64)).save(folder.parent / ".hidden" / "1.png")
    assert pack_import("host.picture_folders").folder_names() == ["wired pictures", "people", "people/ada", "people/bob"]


def test_a_module_on_the_models_own_tokens_learns_from_a_folder(folder, load, train, clips):
    module, loss_map, _ = train(training_set=load(clip=clips[1])[0])
    assert module.module.config.source.width == WIDTH and len(loss_map["loss"]) == 3
    assert train(training_set=load(clip=clips[1])[0])[1] == loss_map


def test_wired_pictures_are_a_folder_of_one_group(folder, load, train, tiny):
    pictures = Many(torch.rand(1, side, 64, 3, generator=torch.Generator().manual_seed(side)) for side in (64, 96, 64))
    loaded, report = load(folder="wired pictures", images=pictures, texts=Many(["a cat", "a dog", ""]))
    assert "pictures: 3 to learn from" in report and loaded.captions() == ["", "a cat", "a dog"]
    assert len(train(ella=tiny.ella(), training_set=loaded)[1]["loss"]) == 3
    again = load(folder="wired pictures", images=pictures, texts=Many(["a cat", "a dog", ""]))[0]
    assert [example.picture for example in again.examples] == [example.picture for example in loaded.examples]


def test_what_the_hosts_dataset_node_gives_is_taken(folder, load, run_node, host_nodes):
    if "LoadImageTextDataSetFromFolder" not in host_nodes.NODE_CLASS_MAPPINGS:
        pytest.skip("this ComfyUI has no such node")
    for mask in folder.rglob("*.mask.png"):
        mask.unlink()
    images, texts = run_node("LoadImageTextDataSetFromFolder", folder="people")
    loaded, report = load(folder="wired pictures", images=Many(images), texts=Many(texts))
    assert "pictures: 4 to learn from" in report
    assert sorted(text for example in loaded.examples for text in example.captions) == sorted(
        ["a red cat", "a cat", "a red dog", "a blue house", ""])


def test_masks_are_used_if_wanted_and_missed(folder, load, train, tiny, pack_import):
    module = train(ella=tiny.ella(), training_set=load(use_masks=True)[0])[0]
    assert module.module.config.encoder["masked"]
    (folder / "ada" / "1.mask.png").unlink()
    with pytest.raises(pack_import("emma_core.errors").TrainingDataError, match="ada/1.png: has no mask, but"):
        train(ella=tiny.ella(), training_set=load(use_masks=True)[0])


REFUSALS = {
    "damaged": (lambda folder: (folder / "ada" / "2.png").write_bytes(b"no picture"), {}, "1 problem in .*ada/2.png"),
    "no folder": (lambda folder: None, {"folder": "others"}, "no folder 'others' with pictures below"),
    "outside": (lambda folder: None, {"folder": "../.."}, "no folder '../..' with pictures below"),
    "nothing": (lambda folder: None, {"folder": "wired pictures"}, "no folder is chosen, and none are wired"),
    "both": (lambda folder: None, {"images": torch.rand(1, 64, 64, 3)}, "people is chosen, and pictures are wired too"),
    "texts": (lambda folder: None, {"folder": "wired pictures", "images": torch.rand(3, 64, 64, 3), "texts": Many("ab")},
              "2 texts for 3 pictures; wanted one for each, one for all, or none"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_of_a_folder(folder, load, pack_import, case):
    change, settings, message = REFUSALS[case]
    change(folder)
    with pytest.raises(pack_import("emma_core.errors").TrainingDataError, match=f"(?s){message}"):
        load(**settings)


def test_a_set_beside_latents_and_nothing_at_all_are_refused(folder, load, train, tiny, pack_import):
    error = pack_import("emma_core.errors").TrainingDataError
    with pytest.raises(error, match="training_set and latents are wired; wanted training_set alone"):
        train(ella=tiny.ella(), training_set=load()[0], latents={"samples": torch.zeros(1, 4, 8, 8)})
    with pytest.raises(error, match="nothing to learn from: latents, positive, reference_image not wired. Wire Load Training"):
        train(ella=tiny.ella())


def test_a_clip_that_is_not_ellas_is_refused_before_a_picture_is_encoded(folder, load, train, tiny, clips, pack_import,
                                                                         vae, monkeypatch):
    monkeypatch.setattr(vae, "encode", lambda pixels: pytest.fail("a picture was encoded"))
    with pytest.raises(pack_import("emma_core.errors").ConnectorMismatchError, match="width 64, the ELLA reads"):
        train(ella=tiny.ella(), training_set=load(clip=clips[1])[0])


def test_another_text_encoder_is_another_cache(folder, load, pack_import, clips):
    mark = pack_import("host.training_folder")._mark_of
    assert mark(clips[0]) == mark(clips[0]) != mark(clips[1])
    padded = clips[0].clone()
    padded.set_tokenizer_option("ella_t5_empty_prompt_length", 128)
    assert mark(padded) != mark(clips[0])


def test_a_set_travels_with_its_settings(folder, load):
    loaded = load(flip=True, reference_crops=3, own_reference=True, resolution=128)[0]
    wanted = {"flip": True, "reference_crops": 3, "own_reference": True, "resolution_px": 128, "workers": 0}
    assert wanted.items() <= dataclasses.asdict(loaded.data).items() and "4 pictures" in repr(loaded)
