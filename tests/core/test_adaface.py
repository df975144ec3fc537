"""AdaFace backbones against answers of the published code, and their files."""

import argparse
import json
import sys
import types

import pytest
import torch
from reference_answers import filled, read
from safetensors.torch import save_file

from emma_core.encoders.adaface import AdaFace, load_adaface
from emma_core.encoders.loading import encoder_kind
from emma_core.errors import EmmaWarning, EncoderFileError, ImageInputError

LEAST_COSINE = 0.9999


def weights_of(layers: int) -> dict[str, torch.Tensor]:
    """By the fill rule; counters keep 0."""
    shapes = json.loads(read(f"adaface_ir_{layers}")[1]["keys"])
    counters = {key for key in shapes if key.endswith("num_batches_tracked")}
    weights = filled({key: shape for key, shape in shapes.items() if key not in counters})
    return weights | {key: torch.tensor(0) for key in counters}


@pytest.fixture(scope="module")
def ir18():
    return weights_of(18)


@pytest.mark.parametrize("layers", [18, 50, 101])
def test_backbone_gives_the_reference_embedding(tmp_path, layers):
    answers, _ = read(f"adaface_ir_{layers}")
    save_file(weights_of(layers), str(tmp_path / "face.safetensors"))
    embedding_BD, norm_B1, map_BChw = load_adaface(tmp_path / "face.safetensors")(answers["image_bgr"])
    assert torch.nn.functional.cosine_similarity(embedding_BD, answers["embedding"]).min() >= LEAST_COSINE
    torch.testing.assert_close(norm_B1, answers["norm"], rtol=1e-3, atol=1e-4)
    assert map_BChw.shape == (2, 512, 7, 7)
    assert torch.nn.functional.cosine_similarity(*answers["embedding"].unsqueeze(1)).item() < LEAST_COSINE


def test_published_checkpoint_layout_gives_the_same_weights(tmp_path, ir18):
    state = {f"model.{key}": value for key, value in ir18.items()} | {"head.kernel": torch.zeros(512, 10)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "adaface.ckpt")
    save_file(ir18, str(tmp_path / "adaface.safetensors"))
    first, second = load_adaface(tmp_path / "adaface.ckpt"), load_adaface(tmp_path / "adaface.safetensors")
    assert first.fingerprint == second.fingerprint and first.layers == 18


@pytest.mark.parametrize("prefix", ["model.net.", "net.", "model.", "module.model.", ""])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_the_authors_names_of_all_times_give_the_same_encoder(tmp_path, ir18, prefix, name):
    state = {f"{prefix}{key}": value for key, value in ir18.items()}
    state |= {"head.kernel": torch.zeros(512, 10)} if prefix else {}
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    save_file(ir18, tmp_path / "plain.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"conf": {"color_space": "BGR"}, "model_type": "cvlface"}))
    assert encoder_kind(tmp_path / name).name == "adaface"
    plain, found = load_adaface(tmp_path / "plain.safetensors"), load_adaface(tmp_path / name)
    assert found.fingerprint == plain.fingerprint
    faces = torch.rand(2, 3, 112, 112)
    assert all(torch.equal(a, b) for a, b in zip(found(faces), plain(faces), strict=True))


@pytest.mark.parametrize(("file", "text"), [("config.json", '{"conf": {"color_space": "RGB"}}'),
                                            ("model.yaml", "color_space: RGB\n")])
def test_a_cvlface_model_of_red_first_is_turned_round(tmp_path, ir18, file, text):
    save_file({f"model.net.{key}": value for key, value in ir18.items()}, tmp_path / "a.safetensors")
    save_file(ir18, tmp_path / "plain.safetensors")
    (tmp_path / file).write_text(text)
    plain, found = load_adaface(tmp_path / "plain.safetensors"), load_adaface(tmp_path / "a.safetensors")
    faces = torch.rand(2, 3, 112, 112)
    torch.testing.assert_close(found(faces)[0], plain(faces.flip(1))[0], rtol=1e-4, atol=1e-5)
    assert found.fingerprint != plain.fingerprint


def test_a_cvlface_file_alone_says_what_it_lacks(tmp_path, ir18):
    save_file({f"net.{key}": value for key, value in ir18.items()}, tmp_path / "a.safetensors")
    save_file(ir18, tmp_path / "plain.safetensors")
    with pytest.warns(EmmaWarning, match=r"stands in the config.json .* blue-green-red is taken"):
        found = load_adaface(tmp_path / "a.safetensors")
    assert found.fingerprint == load_adaface(tmp_path / "plain.safetensors").fingerprint


def test_what_a_trainer_left_in_a_checkpoint_is_passed_over(tmp_path, ir18, monkeypatch):
    """Published checkpoints hold classes of PyTorch Lightning, which users do not have installed."""
    lightning = types.ModuleType("pytorch_lightning.callbacks")
    lightning.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": lightning.__name__})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, lightning.__name__, lightning)
    content = {"state_dict": {f"model.{key}": value for key, value in ir18.items()},
               "callbacks": {lightning.ModelCheckpoint: {"best": 0.9}}, "hyper_parameters": argparse.Namespace(arch="ir_18")}
    torch.save(content, tmp_path / "adaface.ckpt")
    monkeypatch.delitem(sys.modules, lightning.__name__)
    assert load_adaface(tmp_path / "adaface.ckpt").layers == 18


class Payload:
    def __reduce__(self):
        return print, ("run",)


def test_a_checkpoint_that_runs_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": Payload()}, tmp_path / "bad.ckpt")
    with pytest.raises(EncoderFileError, match="weights alone"):
        load_adaface(tmp_path / "bad.ckpt")
    assert "run" not in capsys.readouterr().out.split()


def test_wrong_files_are_refused(tmp_path, ir18):
    save_file({"a": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(EncoderFileError, match="0 residual blocks"):
        load_adaface(tmp_path / "other.safetensors")
    save_file({key: value for key, value in ir18.items() if key != "input_layer.0.weight"}, str(tmp_path / "less.safetensors"))
    with pytest.raises(EncoderFileError, match=r"input_layer\.0\.weight"):
        load_adaface(tmp_path / "less.safetensors")
    with pytest.raises(EncoderFileError, match="does not exist"):
        load_adaface(tmp_path / "none.ckpt")


def test_unaligned_pictures_are_refused():
    with pytest.raises(ImageInputError, match="align the face"):
        AdaFace(18).eval()(torch.zeros(1, 3, 128, 128))
