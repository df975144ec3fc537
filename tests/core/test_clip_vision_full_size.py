"""CLIP ViT-H/14 at its full size (632 M parameters, random weights): parity with transformers and with open_clip."""

import gc
import json

import pytest
import torch
from clip_towers import open_clip_tower, random_tower, to_open_clip, transformers_model, with_text_tower
from safetensors.torch import save_file

from emma_core.encoders.base import encode_pictures
from emma_core.encoders.families import CLIP_TOWERS
from emma_core.encoders.loading import load_encoder
from emma_core.encoders.options import LAYERS, EncodeOptions

pytestmark = pytest.mark.slow

TOWER = CLIP_TOWERS["clip-vit-h-14"]
BOUND = 1e-4  # of the largest value
NAMES = ("global", "local")


@pytest.fixture(scope="module")
def weights():
    return {key: value.half() for key, value in random_tower(TOWER).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, weights):
    """The layouts users have: a renamed Hugging Face file, such a repository as a folder, and an open_clip file."""
    folder = tmp_path_factory.mktemp("vit-h")
    save_file(weights, folder / "clip_vision_h.safetensors")
    repository = folder / "CLIP-ViT-H-14-laion2B-s32B-b79K"
    repository.mkdir()
    (repository / "config.json").write_text(json.dumps({"model_type": "clip"}))
    save_file(with_text_tower(weights), repository / "model.safetensors")
    save_file(to_open_clip(weights), folder / "some name.safetensors")
    yield folder
    for file in folder.rglob("*.safetensors"):
        file.unlink()


@pytest.fixture(scope="module")
def answers(folder):
    """Features of both layers, what was seen, and the normalised pixels."""
    encoder = load_encoder(folder / "clip_vision_h.safetensors")
    picture = torch.rand(1, 300, 400, 3, generator=torch.Generator().manual_seed(1))
    found = {layer: encode_pictures(encoder, picture, None, EncodeOptions(NAMES, layer)) for layer in LAYERS}
    seen = found["last"][1]
    pixels = encoder.preparation.normalise(seen.permute(0, 3, 1, 2))
    description = encoder.description
    del encoder
    gc.collect()
    return {layer: features for layer, (features, _) in found.items()}, picture, pixels, description


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def test_full_size_equals_transformers(answers, weights):
    features, _, pixels, _ = answers
    model = transformers_model(TOWER, {key: value.float() for key, value in weights.items()})
    with torch.no_grad():
        wanted = model(pixel_values=pixels, output_hidden_states=True)
    found = {
        "global": difference(features["last"]["global"], wanted.image_embeds[:, None]),
        "last": difference(features["last"]["local"], wanted.hidden_states[-1]),
        "penultimate": difference(features["penultimate"]["local"], wanted.hidden_states[-2]),
    }
    print(f"against transformers: {found}")
    assert features["last"]["local"].shape == (1, 257, 1280) and features["last"]["global"].shape == (1, 1, 1024)
    assert max(found.values()) <= BOUND


def test_full_size_equals_open_clip(answers, weights):
    features, _, pixels, _ = answers
    tower = open_clip_tower(TOWER, {key: value.float() for key, value in weights.items()})
    states = []
    for block in tower.transformer.resblocks[-2:]:
        block.register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.no_grad():
        wanted = tower(pixels)
    found = {
        "global": difference(features["last"]["global"], wanted[:, None]),
        "last": difference(features["last"]["local"], states[1]),
        "penultimate": difference(features["penultimate"]["local"], states[0]),
    }
    print(f"against open_clip: {found}")
    assert max(found.values()) <= BOUND


@pytest.mark.parametrize("name", ["CLIP-ViT-H-14-laion2B-s32B-b79K", "some name.safetensors"])
def test_folder_and_open_clip_layout_are_the_same_encoder(folder, answers, name):
    features, picture, _, description = answers
    encoder = load_encoder(folder / name)
    assert encoder.description == description and description["family"] == "clip-vit-h-14"
    again, _ = encode_pictures(encoder, picture, None, EncodeOptions(NAMES))
    assert torch.equal(again["local"], features["last"]["local"])
