"""Which encoder a file holds is told by its tensors, whatever it is called; folders, and what is refused."""

import json

import pytest
import torch
from clip_towers import TINY, random_tower, to_open_clip
from safetensors.torch import save_file
from test_adaface import weights_of

from emma_core.encoders import adaface, clip_vision
from emma_core.encoders.families import CLIP_TOWERS
from emma_core.encoders.loading import check_gives, encoder_kind, load_encoder, load_encoders
from emma_core.encoders.miniature import FAMILY
from emma_core.encoders.options import EncodeOptions
from emma_core.encoders.playground import PlaygroundEncoder
from emma_core.encoders.weights import weights_path
from emma_core.errors import EncoderFileError


@pytest.fixture(autouse=True)
def tiny_family(monkeypatch):
    monkeypatch.setitem(CLIP_TOWERS, "clip-tiny", TINY)


def playground_weights():
    torch.manual_seed(0)
    return {name: value.contiguous() for name, value in PlaygroundEncoder().state_dict().items()}


KINDS = {
    "playground": (playground_weights, "playground"),
    "adaface": (lambda: {f"model.{key}": value for key, value in weights_of(18).items()}, "adaface-ir-18"),
    "clip": (lambda: random_tower(TINY), "clip-tiny"),
    "miniature": (lambda: random_tower(CLIP_TOWERS[FAMILY]), FAMILY),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["any.safetensors", "any.ckpt", "folder"])
def test_a_file_of_any_name_is_recognised(tmp_path, kind, name):
    make, family = KINDS[kind]
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "config.json").write_text("{}")
        save_file(make(), path / "model.safetensors")
    elif name.endswith(".ckpt"):
        torch.save({"state_dict": make()}, path)
    else:
        save_file(make(), path)
    assert encoder_kind(path).name == kind
    encoder = load_encoder(path)
    assert set(encoder.feature_names) == set(encoder_kind(path).features)
    assert encoder.description["family"] == family and len(encoder.description["fingerprint"]) == 64


def test_the_playgrounds_clip_gives_its_embedding_as_a_face_too(tmp_path):
    """It has no encoder of faces beside it, and modules of faces are trained on it."""
    save_file(random_tower(CLIP_TOWERS[FAMILY]), tmp_path / "any.safetensors")
    check_gives(tmp_path / "any.safetensors", ("face",))
    encoder = load_encoder(tmp_path / "any.safetensors")
    [encoded] = encoder.encode(torch.rand(1, 70, 50, 3), None, EncodeOptions(encoder.feature_names))
    assert torch.equal(encoded.features["face"], encoded.features["global"]) and encoded.features["local"].shape[1] == 65


@pytest.mark.parametrize(("kind", "features", "found"), [
    ("clip", ("face",), r"is CLIP ViT, which gives global, local; wanted .* that gives face. Choose AdaFace .*adaface_ir"),
    ("adaface", ("global", "local"), r"gives face, face_map, face_norm; .* gives global, local. Choose CLIP ViT \(CLIP-ViT-H"),
])
def test_an_encoder_that_cannot_give_what_is_needed_is_not_even_read(tmp_path, kind, features, found, monkeypatch):
    save_file(KINDS[kind][0](), tmp_path / "any.safetensors")
    for module, load in ((clip_vision, "load_clip_vision"), (adaface, "load_adaface")):
        monkeypatch.setattr(module, load, lambda path: pytest.fail("the weights were read"))
    with pytest.raises(EncoderFileError, match=found):
        check_gives(tmp_path / "any.safetensors", features)


def test_of_several_encoders_the_name_is_for_those_of_open_clip(tmp_path):
    for kind in ("playground", "clip"):
        save_file(KINDS[kind][0](), tmp_path / f"{kind}.safetensors")
    encoders = load_encoders([tmp_path / "clip.safetensors", tmp_path / "playground.safetensors"], "ViT-B-32")
    assert [encoder.description["family"] for encoder in encoders] == ["clip-tiny", "playground"]


def test_open_clip_layout_of_a_known_clip_is_that_clip(tmp_path):
    save_file({key: value.contiguous() for key, value in to_open_clip(random_tower(TINY)).items()}, tmp_path / "a.safetensors")
    assert encoder_kind(tmp_path / "a.safetensors").name == "clip"
    assert encoder_kind(tmp_path / "a.safetensors", "ViT-H-14").name == "open_clip", "a name that the user gives counts"


def test_other_towers_go_to_open_clip(tmp_path):
    for key in ("visual.trunk.blocks.0.attn.qkv.weight", "trunk.blocks.0.attn.qkv.weight", "conv1.weight"):
        save_file({key: torch.zeros(3, 3)}, tmp_path / "siglip.safetensors")
        assert encoder_kind(tmp_path / "siglip.safetensors").name == "open_clip"
    (tmp_path / "eva").mkdir()
    (tmp_path / "eva" / "open_clip_config.json").write_text(json.dumps({}))
    assert encoder_kind(tmp_path / "eva").name == "open_clip"


@pytest.mark.parametrize(("tensors", "found"), [
    ({"blocks.0.weight": torch.zeros(2)}, r"no encoder that is known here \(blocks.0.weight\). Wanted AdaFace .*CLIP ViT-H/14"),
    ({"vision_model.embeddings.patch_embedding.bias": torch.zeros(2)}, "get the open_clip version"),
    ({f"layer.{index}": torch.zeros(1) for index in range(5)}, "layer.0, layer.1, layer.2 and 2 more"),
])
def test_files_of_no_known_kind_are_refused(tmp_path, tensors, found):
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(EncoderFileError, match=found):
        load_encoder(tmp_path / "other.safetensors")


def test_the_usual_file_of_a_folder_is_taken(tmp_path):
    for name in ("pytorch_model.bin", "open_clip_model.safetensors", "model.fp16.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert weights_path(tmp_path).name == "open_clip_model.safetensors"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert weights_path(tmp_path).name == "model.safetensors"


@pytest.mark.parametrize(("names", "found"), [
    ((), "holds 0 weight files"), (("a.safetensors", "b.bin"), r"holds 2 weight files \(a.safetensors, b.bin\); wanted one"),
])
def test_folders_that_leave_it_open_are_refused(tmp_path, names, found):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(EncoderFileError, match=found):
        load_encoder(tmp_path)
