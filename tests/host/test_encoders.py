"""Reference encoders in the host: its CLIP_VISION and ours agree, files and folders, options of the node, files on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import fill_, noise

TINY = {"hidden_act": "gelu", "hidden_size": 32, "image_size": 28, "intermediate_size": 64, "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model", "num_attention_heads": 4, "num_channels": 3, "num_hidden_layers": 3,
        "patch_size": 14, "projection_dim": 16}
BOUND = 1e-4  # of the largest value


@pytest.fixture
def core(pack_import, monkeypatch):
    """The pack's own loader, knowing the tiny tower as a family."""
    families = pack_import("emma_core.encoders.families")
    tower = families.ClipTower("CLIP ViT-tiny", 32, 3, 14, 28, 16, 4, 64, "gelu")
    monkeypatch.setitem(families.CLIP_TOWERS, "clip-tiny", tower)
    return pack_import("emma_core.encoders.clip_vision")


@pytest.fixture
def clip_vision(tmp_path, core):
    """The host's CLIP_VISION with random weights."""
    import comfy.clip_vision

    (tmp_path / "config.json").write_text(json.dumps(TINY))
    clip_vision = comfy.clip_vision.ClipVisionModel(str(tmp_path / "config.json"))
    fill_(clip_vision.model, 75)
    return clip_vision


@pytest.fixture
def tower_file(tmp_path, clip_vision):
    save_file({key: value.contiguous() for key, value in clip_vision.get_sd().items()}, tmp_path / "tower.safetensors")
    return tmp_path / "tower.safetensors"


def clip_module(tiny, **encoder):
    return tiny.module("object", {"global": (16, 1), "local": (32, 1)}, encoder={"family": "clip-tiny", **encoder})


def assert_close(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= BOUND * wanted.abs().max()


@pytest.mark.parametrize("layer", [None, "last", "penultimate"])
def test_clip_vision_of_the_host_gives_the_features_of_the_core(tiny, run_node, core, clip_vision, tower_file, layer):
    alone = core.load_clip_vision(tower_file)
    module = clip_module(tiny, fingerprint=alone.description["fingerprint"], **({"layer": layer} if layer else {}))
    picture = noise((2, 40, 56, 3), 76).sigmoid()
    reference, seen = run_node("EMMAEncodeReference", module=module, encoder=clip_vision, image=picture, combine="per frame")
    layers = {"last": "last_hidden_state", "penultimate": "penultimate_hidden_states"}
    direct = clip_vision.encode_image(seen, crop=True)
    assert torch.equal(reference.features["global"], direct["image_embeds"][:, None])
    assert torch.equal(reference.features["local"], direct[layers[layer or "last"]])
    options = core.EncodeOptions(("global", "local"), layer or "last")
    for index, wanted in enumerate(alone.encode(picture, None, options)):
        assert torch.equal(seen[index:index + 1], wanted.seen_RSS3)
        for name in ("global", "local"):
            assert_close(reference.features[name][index:index + 1], wanted.features[name])
    assert reference.encoder == {**alone.description, "layer": layer or "last"}


def test_host_and_core_prepare_pictures_alike(run_node, tiny, clip_vision):
    """Our preparation is within a level or two of the host's own."""
    import comfy.clip_vision

    picture = (noise((1, 60, 90, 3), 77).sigmoid() * 255).round() / 255
    _, seen = run_node("EMMAEncodeReference", module=clip_module(tiny), encoder=clip_vision, image=picture, combine="concat")
    theirs = comfy.clip_vision.clip_preprocess(picture, 28, [0, 0, 0], [1, 1, 1], crop=True)
    assert (seen.movedim(-1, 1) - theirs).abs().max() < 4 / 255


def test_nothing_is_left_on_the_hosts_clip_vision(run_node, tiny, clip_vision):
    before = {key: value.clone() for key, value in clip_vision.get_sd().items()}
    attributes = set(vars(clip_vision))
    settings = {"module": clip_module(tiny), "image": torch.rand(1, 28, 28, 3), "combine": "concat"}
    run_node("EMMAEncodeReference", encoder=clip_vision, **settings)
    assert set(vars(clip_vision)) == attributes
    assert all(torch.equal(before[key], value) for key, value in clip_vision.get_sd().items())


@pytest.fixture
def calls(monkeypatch, clip_vision):
    """The number of pictures of each call of the host's encoder."""
    encode_image, calls = clip_vision.encode_image, []
    monkeypatch.setattr(clip_vision, "encode_image", lambda image, crop: calls.append(len(image)) or encode_image(image, crop))
    return calls


def test_same_pictures_are_encoded_once(run_node, tiny, clip_vision, calls):
    settings = {"module": clip_module(tiny), "encoder": clip_vision, "combine": "average"}
    pictures = noise((3, 30, 30, 3), 78).sigmoid()
    first = run_node("EMMAEncodeReference", image=pictures, **settings)[0]
    again = run_node("EMMAEncodeReference", image=pictures.clone(), **settings)[0]
    assert calls == [3] and torch.equal(first.features["local"], again.features["local"])
    run_node("EMMAEncodeReference", image=pictures[[1, 0]], **settings)
    assert calls == [3]
    run_node("EMMAEncodeReference", image=pictures, mask=torch.ones(1, 30, 30) / 2, **settings)
    assert calls == [3, 3]


def test_little_memory_means_small_chunks(monkeypatch, run_node, tiny, clip_vision, calls, pack_import):
    import comfy.model_management

    each = pack_import("emma_core.encoders.clip_vision").bytes_per_picture(
        pack_import("emma_core.encoders.families").CLIP_TOWERS["clip-tiny"])
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *rest, **more: 5 * each)
    run_node("EMMAEncodeReference", module=clip_module(tiny), encoder=clip_vision, image=torch.rand(5, 28, 28, 3),
             combine="average")
    assert calls == [2, 2, 1]


def test_out_of_memory_halves_the_chunk(monkeypatch, run_node, tiny, clip_vision):
    encode_image = clip_vision.encode_image
    chunks = []

    def full(image, crop):
        chunks.append(len(image))
        if len(image) > 2:
            raise torch.cuda.OutOfMemoryError("no room")
        return encode_image(image, crop=crop)

    pictures = noise((5, 28, 28, 3), 79).sigmoid()
    settings = {"module": clip_module(tiny), "encoder": clip_vision, "combine": "per frame"}
    with monkeypatch.context() as patch:
        patch.setattr(clip_vision, "encode_image", full)
        found = run_node("EMMAEncodeReference", image=pictures, **settings)[0]
    assert chunks == [5, 2, 3, 1, 2]
    for index in range(5):
        direct = encode_image(pictures[index:index + 1], crop=True)["image_embeds"]
        assert_close(found.features["global"][index], direct)


@pytest.mark.parametrize("layout", ["file", "folder", "open_clip folder"])
def test_encoder_files_and_folders_load_by_any_name(base_directory, run_node, pack_import, layout):
    """The shipped encoder's weights under other names: a file, a folder with a config.json, a folder in open_clip's manner."""
    shipped = pack_import("emma_core.playground").PLAYGROUND_DIR / "encoder.safetensors"
    folder = base_directory / "models" / "clip_vision"
    target = folder / "renamed.safetensors" if layout == "file" else folder / layout / "model.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(shipped.read_bytes())
    if layout != "file":
        (target.parent / "config.json").write_text("{}")
    name = target.name if layout == "file" else layout
    encoder = run_node("EMMALoadReferenceEncoder", encoder_name=name)[0]
    assert encoder.encoder.description["family"] == "clip-miniature"


def clip_file(tmp_path, monkeypatch, core, layers: int):
    """A CLIP of few numbers in a file, as the core and the host read it; the host tells CLIPs apart by their layers."""
    import comfy.clip_vision

    config, made = tmp_path / "config.json", comfy.clip_vision.ClipVisionModel
    config.write_text(json.dumps({**TINY, "num_hidden_layers": layers}))
    clip_vision = made(str(config))
    fill_(clip_vision.model, 75)
    save_file({key: value.contiguous() for key, value in clip_vision.get_sd().items()}, tmp_path / "clip.safetensors")
    monkeypatch.setattr(comfy.clip_vision, "ClipVisionModel", lambda json_config: made(str(config)))
    towers = core.CLIP_TOWERS
    monkeypatch.setitem(towers, "clip-few", dataclasses.replace(towers["clip-tiny"], layers=layers))
    return tmp_path / "clip.safetensors"


@pytest.mark.parametrize("layers", [32, 3], ids=["of a size that the host knows", "of another size"])
def test_a_clip_in_a_file_is_the_encoder_that_the_command_line_trains_with(tmp_path, monkeypatch, pack_import, core, layers):
    """Module files name it by its weights: one fingerprint, whoever loads it."""
    path = clip_file(tmp_path, monkeypatch, core, layers)
    alone, here = core.load_clip_vision(path), pack_import("host.encoders").load_reference_encoder(str(path)).encoder
    assert here.description.items() <= alone.description.items() and "fingerprint" in here.description
    picture, options = noise((1, 28, 28, 3), 76).sigmoid(), core.EncodeOptions(("global", "local"))
    found, wanted = (one.encode(picture, None, options)[0].features for one in (here, alone))
    for name in ("global", "local"):
        assert_close(found[name], wanted[name])


def test_framing_reaches_the_encoder(run_node, tiny, clip_vision):
    """The second output shows it: position, padding, background, crop to the mask."""
    picture, mask = torch.zeros(1, 28, 56, 3), torch.zeros(1, 28, 56)
    picture[..., 28:, :], mask[:, 7:21, 35:49] = 1, 1
    settings = {"module": clip_module(tiny), "encoder": clip_vision, "image": picture, "combine": "concat"}
    show = lambda **more: run_node("EMMAEncodeReference", **settings, **more)[1][0]  # noqa: E731
    assert show(frame="left").max() == 0 and show(frame="right").min() == 1
    padded = show(frame="pad", background="white")
    assert padded[:6].min() == 1 and padded[8:20, :13].max() == 0
    assert show(frame="right", mask=mask, background="black")[:6].max() == 0
    cropped = show(mask=mask, background="black", crop_to_mask=True, margin=0.5)
    assert cropped[10:18, 10:18].min() == 1 and cropped[:6].max() == 0 and cropped[:, :6].max() == 0


def test_module_says_how_its_pictures_are_framed(run_node, tiny, clip_vision):
    picture = torch.zeros(1, 28, 56, 3)
    settings = {"module": clip_module(tiny, frame="pad", background="white"), "encoder": clip_vision, "combine": "concat"}
    assert run_node("EMMAEncodeReference", image=picture, **settings)[1][0, :6].min() == 1
    assert run_node("EMMAEncodeReference", image=picture, frame="center", **settings)[1].max() == 0


def test_module_trained_on_masked_objects_asks_for_a_mask(caplog, run_node, tiny, clip_vision):
    settings = {"module": clip_module(tiny, masked=True), "encoder": clip_vision, "image": torch.rand(1, 28, 28, 3),
                "combine": "concat"}
    run_node("EMMAEncodeReference", mask=torch.ones(1, 28, 28), **settings)
    assert "connect a MASK" not in caplog.text
    run_node("EMMAEncodeReference", **settings)
    assert "connect a MASK" in caplog.text


@pytest.fixture
def reference(run_node, tiny, clip_vision):
    return run_node("EMMAEncodeReference", module=clip_module(tiny), encoder=clip_vision, image=torch.rand(2, 28, 28, 3),
                    combine="per frame")[0]


def test_saved_reference_loads_and_names_count_up(run_node, reference, base_directory):
    folder = base_directory / "models" / "emma_references"
    for name, file in (("people/ada", "ada"), ("people/ada.safetensors", "ada_2"), ("people\\ada", "ada_3")):
        run_node("EMMASaveReference", reference=reference, name=name)
        assert (folder / "people" / f"{file}.safetensors").is_file()
    loaded = run_node("EMMALoadReference", reference_name=str(Path("people") / "ada_2.safetensors"))[0]
    assert loaded.per_frame and loaded.encoder == reference.encoder
    assert all(torch.equal(loaded.features[name], value) for name, value in reference.features.items())


@pytest.mark.parametrize("name", ["", "  ", "../outside", "people/", ".", "/"])
def test_names_that_lead_elsewhere_are_refused(run_node, reference, pack_import, base_directory, name):
    before = sorted((base_directory / "models").rglob("*"))
    with pytest.raises(pack_import("emma_core.errors").FileError, match="cannot be a name in .*emma_references"):
        run_node("EMMASaveReference", reference=reference, name=name)
    assert sorted((base_directory / "models").rglob("*")) == before


def test_loaded_reference_is_refused_by_a_module_of_another_encoder(run_node, reference, tiny, pack_import):
    run_node("EMMASaveReference", reference=reference, name="bob")
    loaded = run_node("EMMALoadReference", reference_name="bob.safetensors")[0]
    settings = {"reference": loaded, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    assert run_node("EMMAAssembleModules", module=clip_module(tiny), **settings)
    mismatch = pack_import("emma_core.errors").ReferenceMismatchError
    with pytest.raises(mismatch, match="encoded by clip-32-16|encoded by CLIP ViT-tiny.*needs clip-vit|needs CLIP ViT-H/14"):
        run_node("EMMAAssembleModules", module=clip_module(tiny, family="clip-vit-h-14"), **settings)
    with pytest.raises(mismatch, match="fingerprint .*needs .*fingerprint 012345678901"):
        run_node("EMMAAssembleModules", module=clip_module(tiny, fingerprint="0123456789012345"), **settings)


def test_replaced_reference_file_is_read_again(run_node, reference, host_nodes, base_directory):
    run_node("EMMASaveReference", reference=reference, name="changing")
    fingerprint = host_nodes.NODE_CLASS_MAPPINGS["EMMALoadReference"].fingerprint_inputs
    first = fingerprint(reference_name="changing.safetensors")
    path = base_directory / "models" / "emma_references" / "changing.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    assert fingerprint(reference_name="changing.safetensors") != first


FACES = Path(__file__).resolve().parents[1] / "core" / "data" / "faces"


@pytest.fixture(scope="module")
def adaface(base_directory, pack_import, run_node):
    """AdaFace IR-18 with random weights, laid out as the published checkpoints, through the loader node."""
    model = pack_import("emma_core.encoders.adaface").AdaFace(18)
    fill_(model, 80)
    path = base_directory / "models" / "adaface" / "any name.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {f"model.{key}": value for key, value in model.state_dict().items()}}, path)
    return run_node("EMMALoadReferenceEncoder", encoder_name="any name.ckpt")[0]


def face_module(tiny):
    return tiny.module("face", {"face": (512, 2)}, encoder={"family": "adaface-ir-18"})


def photo(name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(FACES / f"{name}.jpg").convert("RGB"), dtype=np.float32) / 255)[None]


def test_a_face_is_found_aligned_and_encoded(run_node, tiny, adaface):
    picture = torch.nn.functional.pad(photo("collins"), (0, 0, 60, 40, 30, 50), value=0.5)
    settings = {"module": face_module(tiny), "encoder": adaface, "combine": "concat"}
    reference, seen = run_node("EMMAEncodeReference", image=picture, **settings)
    assert seen.shape == (1, 112, 112, 3) and reference.features["face"].shape == (1, 1, 512)
    assert reference.features["face"].norm().item() == pytest.approx(1, abs=1e-4)
    assert reference.encoder["family"] == "adaface-ir-18"


def test_faces_of_a_picture_are_chosen(run_node, tiny, adaface):
    """Two people side by side: the largest, one by its index, all."""
    small = torch.nn.functional.interpolate(photo("collins").movedim(-1, 1), (180, 180)).movedim(1, -1)
    picture = torch.full((1, 360, 560, 3), 0.5)
    picture[:, 90:270, :180], picture[:, :, 200:540] = small, photo("hopper")
    settings = {"module": face_module(tiny), "encoder": adaface, "image": picture}
    everyone, seen = run_node("EMMAEncodeReference", combine="per frame", face="all", **settings)
    assert len(seen) == 2 and everyone.rows == 2
    for choice, index in (({"face": "largest"}, 1), ({"face": "by index", "face_index": 0}, 0)):
        one = run_node("EMMAEncodeReference", combine="concat", **choice, **settings)[0]
        torch.testing.assert_close(one.features["face"][0], everyone.features["face"][index], rtol=1e-4, atol=1e-4)
    together = run_node("EMMAEncodeReference", combine="normalised average", face="all", **settings)[0]
    assert together.features["face"].shape == (1, 1, 512)


def test_no_face_names_the_picture_and_mask_or_keypoints_help(run_node, tiny, adaface, pack_import):
    pictures = torch.cat([torch.nn.functional.interpolate(photo("collins").movedim(-1, 1), (200, 200)).movedim(1, -1),
                          torch.full((1, 200, 200, 3), 0.4)])
    settings = {"module": face_module(tiny), "encoder": adaface, "combine": "per frame"}
    with pytest.raises(pack_import("emma_core.errors").ImageInputError, match="picture 2 of 2: no face found"):
        run_node("EMMAEncodeReference", image=pictures, **settings)
    mask = torch.zeros(1, 200, 200)
    mask[:, 50:150, 60:140] = 1
    masked = run_node("EMMAEncodeReference", image=pictures, mask=mask, **settings)
    assert masked[0].rows == 2 and masked[1].shape == (2, 112, 112, 3)
    pointed = run_node("EMMAEncodeReference", image=pictures[1:], keypoints="80 90 120 90 100 110 85 130 115 130", **settings)
    assert pointed[0].rows == 1


def test_wrong_size_of_clip_is_refused_by_name_and_size(run_node, tiny, clip_vision, pack_import, monkeypatch):
    families = pack_import("emma_core.encoders.families")
    monkeypatch.setitem(families.CLIP_TOWERS, "clip-vit-l-14", families.CLIP_TOWERS["clip-tiny"])
    monkeypatch.delitem(families.CLIP_TOWERS, "clip-tiny")
    module = tiny.module("style", {"global": (1024, 4)}, encoder={"family": "clip-vit-h-14"})
    found = r"this encoder is CLIP ViT-tiny \(hidden 32, projected 16.*needs CLIP ViT-H/14 \(hidden 1280, projected 1024"
    with pytest.raises(pack_import("emma_core.errors").ReferenceMismatchError, match=found):
        run_node("EMMAEncodeReference", module=module, encoder=clip_vision, image=torch.rand(1, 28, 28, 3), combine="concat")


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 20000)])
@pytest.mark.parametrize("kind", ["clip", "playground"])
def test_pictures_of_any_shape_are_encoded(run_node, tiny, clip_vision, pack_import, size, kind):
    """A mask of another size with them, as a careless graph would have it."""
    encoder, module = clip_vision, clip_module(tiny)
    if kind == "playground":
        encoder = pack_import("host.encoders").load_playground_reference_encoder()
        module = tiny.module("style", {"global": (128, 4)}, encoder=dict(encoder.encoder.description))
    for settings in ({}, {"mask": torch.ones(1, 7, 5)}, {"mask": torch.ones(1, 7, 5), "crop_to_mask": True}):
        picture = torch.full((1, *size, 3), 0.5)
        inputs = {"module": module, "encoder": encoder, "image": picture, "combine": "concat", **settings}
        reference, seen = run_node("EMMAEncodeReference", **inputs)
        assert all(torch.isfinite(value).all() for value in reference.features.values())
        assert (seen - 0.5).abs().min() < 0.01


def test_sixty_four_faces_are_all_encoded(run_node, tiny, adaface):
    """Eight by eight of two people; the batch of faces goes through in chunks."""
    resize = {"size": (96, 96), "mode": "bilinear", "antialias": True}
    tiles = [torch.nn.functional.interpolate(photo(name).movedim(-1, 1), **resize).movedim(1, -1)[0]
             for name in ("collins", "hopper")]
    rows = [torch.cat([tiles[(row + column) % 2] for column in range(8)], 1) for row in range(8)]
    settings = {"module": face_module(tiny), "encoder": adaface, "image": torch.cat(rows)[None], "face": "all"}
    reference, seen = run_node("EMMAEncodeReference", combine="concat", **settings)
    assert len(seen) == 64 and reference.features["face"].shape == (1, 64, 512)
