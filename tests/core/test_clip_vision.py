"""CLIP vision towers: parity with transformers and open_clip, key layouts, recognition by shapes, refusals."""

import open_clip
import pytest
import torch
from bad_files import NOT_SAFETENSORS
from clip_towers import TINY, open_clip_tower, random_tower, to_open_clip, transformers_model, with_text_tower
from safetensors.torch import save_file

from emma_core.encoders import clip_vision
from emma_core.encoders.base import encode_pictures
from emma_core.encoders.clip_vision import load_clip_vision, read_clip_vision, recognise_clip
from emma_core.encoders.families import CLIP_TOWERS
from emma_core.encoders.options import LAYERS, EncodeOptions
from emma_core.errors import EncoderFileError

BOUND = 1e-5  # of the largest value; the full size has its own test
OPTIONS = EncodeOptions(("global", "local"))


@pytest.fixture(autouse=True)
def tiny_family(monkeypatch):
    monkeypatch.setitem(CLIP_TOWERS, "clip-tiny", TINY)


@pytest.fixture(scope="module")
def weights():
    return random_tower(TINY)


@pytest.fixture
def saved(tmp_path, weights):
    save_file(weights, tmp_path / "renamed by its user.safetensors")
    return tmp_path / "renamed by its user.safetensors"


def pictures(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 40, 56, 3, generator=torch.Generator().manual_seed(3))


def assert_close(found: torch.Tensor, wanted: torch.Tensor):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= BOUND * wanted.abs().max()


@pytest.mark.parametrize("layer", LAYERS)
def test_features_are_those_of_transformers(saved, weights, layer):
    encoder = load_clip_vision(saved)
    features, seen = encode_pictures(encoder, pictures(), None, EncodeOptions(("global", "local"), layer))
    pixels = encoder.preparation.normalise(seen.permute(0, 3, 1, 2))
    with torch.no_grad():
        wanted = transformers_model(TINY, weights)(pixel_values=pixels, output_hidden_states=True)
    assert_close(features["global"], wanted.image_embeds[:, None])
    assert_close(features["local"], wanted.hidden_states[-1 if layer == "last" else -2])
    assert features["local"].shape == (2, TINY.vectors, TINY.hidden)


def test_features_are_those_of_open_clip(saved, weights):
    encoder = load_clip_vision(saved)
    features, seen = encode_pictures(encoder, pictures(), None, OPTIONS)
    tower = open_clip_tower(TINY, weights)
    states = []
    tower.transformer.resblocks[-1].register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.no_grad():
        wanted = tower(encoder.preparation.normalise(seen.permute(0, 3, 1, 2)))
    assert isinstance(tower, open_clip.transformer.VisionTransformer)
    assert_close(features["global"], wanted[:, None])
    assert_close(features["local"], states[0])


@pytest.mark.parametrize("layout", [
    pytest.param(lambda weights: weights, id="vision alone"),
    pytest.param(with_text_tower, id="whole CLIP"),
    pytest.param(lambda weights: {**weights, "vision_model.embeddings.position_ids": torch.arange(TINY.vectors)[None]},
                 id="position ids"),
    pytest.param(to_open_clip, id="open_clip"),
    pytest.param(lambda weights: {f"module.{key}": value for key, value in to_open_clip(weights).items()}, id="wrapped"),
])
def test_every_layout_gives_the_same_encoder(tmp_path, saved, weights, layout):
    save_file({key: value.contiguous() for key, value in layout(weights).items()}, tmp_path / "model.safetensors")
    torch.save(layout(weights), tmp_path / "open_clip_pytorch_model.bin")
    wanted = load_clip_vision(saved)
    features, _ = encode_pictures(wanted, pictures(), None, OPTIONS)
    for name in ("model.safetensors", "open_clip_pytorch_model.bin"):
        encoder = load_clip_vision(tmp_path / name)
        assert encoder.description == wanted.description
        again, _ = encode_pictures(encoder, pictures(), None, OPTIONS)
        assert torch.equal(again["global"], features["global"]) and torch.equal(again["local"], features["local"])


def test_float16_file_has_the_fingerprint_of_the_float32_file(tmp_path, saved, weights):
    save_file({key: value.half() for key, value in weights.items()}, tmp_path / "half.safetensors")
    assert load_clip_vision(tmp_path / "half.safetensors").description == load_clip_vision(saved).description
    changed = {**weights, "visual_projection.weight": weights["visual_projection.weight"] * 1.01}
    save_file(changed, tmp_path / "changed.safetensors")
    assert load_clip_vision(tmp_path / "changed.safetensors").description != load_clip_vision(saved).description


@pytest.mark.parametrize("family", ["clip-vit-h-14", "clip-vit-l-14", "clip-vit-l-14-336", "clip-vit-bigg-14"])
def test_published_towers_are_told_apart_by_shapes(family):
    shapes = clip_vision.clip_shapes(CLIP_TOWERS[family])
    assert recognise_clip({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}) == family


@pytest.mark.parametrize("family", ["clip-vit-h-14", "clip-vit-l-14", "clip-vit-bigg-14"])
def test_published_sizes_are_open_clips(family):
    """Widths, depth, patch and projection against open_clip's own configurations."""
    names = {"clip-vit-h-14": "ViT-H-14", "clip-vit-l-14": "ViT-L-14", "clip-vit-bigg-14": "ViT-bigG-14"}
    with torch.device("meta"):
        tower = open_clip.create_model(names[family], device="meta").visual
    theirs = clip_vision.canonical_names({f"visual.{key}": value for key, value in tower.state_dict().items()})
    assert {key: tuple(value.shape) for key, value in theirs.items()} == clip_vision.clip_shapes(CLIP_TOWERS[family])


def without(weights, *keys):
    return {key: value for key, value in weights.items() if not key.startswith(keys)}


@pytest.mark.parametrize(("change", "found"), [
    (lambda weights: without(weights, "visual_projection"), "projected 0. Wanted one of CLIP ViT-H/14 .hidden 1280"),
    (lambda weights: without(weights, "vision_model.encoder.layers.2"), "hidden 32, 2 layers, patches of 14 px, 5 vectors"),
    (lambda weights: {"text_model.embeddings.weight": torch.zeros(3)}, "holds no CLIP vision transformer"),
    (lambda weights: without(weights, "vision_model.post_layernorm.bias"), r"1 missing keys \(vision_model.post_layernorm"),
    (lambda weights: {**weights, "vision_model.extra": torch.zeros(1)}, r"1 unexpected keys \(vision_model.extra"),
    (lambda weights: {**weights, "vision_model.post_layernorm.bias": torch.zeros(3)}, r"has shape \(3,\), wanted \(32,\)"),
    (lambda weights: {**weights, "vision_model.post_layernorm.bias": torch.full((32,), torch.nan)}, "holds NaN or infinite"),
])
def test_files_that_are_no_such_tower_are_refused(tmp_path, weights, change, found):
    save_file(change(weights), tmp_path / "model.safetensors")
    with pytest.raises(EncoderFileError, match=found):
        read_clip_vision(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("write", "found"), NOT_SAFETENSORS)
def test_damaged_files_are_refused(tmp_path, saved, write, found):
    path = tmp_path / "model.safetensors"
    write(path, saved.read_bytes())
    with pytest.raises(EncoderFileError, match=found.format(name="model.safetensors")):
        read_clip_vision(path)


class Payload:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    torch.save({"weights": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EncoderFileError, match="cannot be opened as weights alone"):
        read_clip_vision(tmp_path / "pytorch_model.bin")
    assert "run" not in capsys.readouterr().out.split()
