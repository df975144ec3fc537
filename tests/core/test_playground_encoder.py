"""The playground's reference encoder: what it sees, what it gives, what it refuses."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from emma_core.encoders.base import encode_pictures
from emma_core.encoders.options import EncodeOptions
from emma_core.encoders.pictures import prepare_pictures
from emma_core.encoders.playground import PlaygroundEncoder, PlaygroundReferenceEncoder, load_playground_encoder
from emma_core.errors import EncoderFileError


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "encoder.safetensors"
    save_file({name: value.contiguous() for name, value in PlaygroundEncoder().state_dict().items()}, path)
    return path


def encode(encoder: PlaygroundReferenceEncoder, image, mask=None):
    return encode_pictures(encoder, image, mask, EncodeOptions(encoder.feature_names))


def test_features_have_their_declared_shapes_and_unit_mean_square(saved):
    features, seen = encode(load_playground_encoder(saved), pictures(2, 50, 70, 3))
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "global": (2, 1, 256), "local": (2, 16, 128), "face": (2, 1, 128)}
    assert seen.shape == (2, 64, 64, 3)
    for value in features.values():
        torch.testing.assert_close(value.square().mean(-1), torch.ones(value.shape[:-1]))


def test_what_the_mask_hides_does_not_matter(saved):
    encoder = load_playground_encoder(saved)
    mask = torch.zeros(1, 40, 40)
    mask[:, 10:30, 10:30] = 1
    first, second = pictures(1, 40, 40, 3), pictures(1, 40, 40, 3, seed=1)
    second[:, 10:30, 10:30] = first[:, 10:30, 10:30]
    masked, same = (encode(encoder, image, mask)[0]["global"] for image in (first, second))
    torch.testing.assert_close(masked, same, rtol=0, atol=0)
    assert not torch.equal(encode(encoder, first)[0]["global"], masked)


def test_hidden_parts_and_what_lies_beside_the_picture_are_white(saved):
    preparation, framing = load_playground_encoder(saved).preparation, EncodeOptions(()).framing
    mask = torch.zeros(1, 64, 64)
    mask[:, 60:, 60:] = 1
    seen = prepare_pictures(torch.zeros(1, 64, 64, 3), mask, preparation, framing)
    torch.testing.assert_close(seen, 1 - mask[:, None].expand(1, 3, 64, 64))
    seen = prepare_pictures(torch.zeros(1, 32, 64, 3), None, preparation, framing)
    torch.testing.assert_close(seen[:, :, :15], torch.ones(1, 3, 15, 64))
    torch.testing.assert_close(seen[:, :, 18:46], torch.zeros(1, 3, 28, 64))


def test_the_fingerprint_names_the_weights_not_the_file(saved, tmp_path):
    tensors = {name: value.half() for name, value in load_file(saved).items()}
    half, full = tmp_path / "half.safetensors", tmp_path / "full.safetensors"
    save_file(tensors, half, {"note": "float16"})
    save_file({name: value.float() for name, value in tensors.items()}, full)
    assert load_playground_encoder(half).description == load_playground_encoder(full).description
    tensors["global_out.bias"][0] += 1
    save_file(tensors, half)
    assert load_playground_encoder(half).description != load_playground_encoder(full).description


def test_a_file_with_a_missing_weight_is_refused(saved):
    tensors = load_file(saved)
    del tensors["face_out.weight"]
    save_file(tensors, saved)
    with pytest.raises(EncoderFileError, match=r"1 missing keys \(face_out.weight\)"):
        load_playground_encoder(saved)


def test_infinite_weights_are_refused(saved):
    tensors = load_file(saved)
    tensors["face_out.weight"][0, 0] = float("inf")
    save_file(tensors, saved)
    with pytest.raises(EncoderFileError, match="face_out.weight holds NaN or infinite"):
        load_playground_encoder(saved)


def test_something_else_is_refused(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(EncoderFileError, match="the playground's reference encoder"):
        load_playground_encoder(path)
