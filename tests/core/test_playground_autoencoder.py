"""The playground's autoencoder: sizes, latent scale, what its file must hold."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.errors import FileError
from emma_core.playground import load_autoencoder
from emma_core.playground.autoencoder import Autoencoder


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "autoencoder.safetensors"
    save_file(Autoencoder(PLAYGROUND_SPEC.latent_scale).state_dict(), path)
    return path


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 96), (8, 8)])
def test_latents_are_an_eighth_of_the_picture_and_decode_to_its_size(height, width):
    autoencoder = Autoencoder(PLAYGROUND_SPEC.latent_scale)
    latent = autoencoder.encode(pictures(2, 3, height, width))
    assert latent.shape == (2, 4, height // 8, width // 8)
    assert autoencoder.decode(latent).shape == (2, 3, height, width)


def test_decoded_pictures_stay_in_range():
    torch.manual_seed(2)
    image = Autoencoder(PLAYGROUND_SPEC.latent_scale).decode(1000 * pictures(1, 4, 4, 4))
    assert image.min() >= -1 and image.max() <= 1 and image.abs().max() == 1


def test_a_saved_file_gives_the_same_pictures(saved):
    torch.manual_seed(0)
    original, loaded = Autoencoder(PLAYGROUND_SPEC.latent_scale), load_autoencoder(PLAYGROUND_SPEC.latent_scale, saved)
    image = pictures(1, 3, 32, 32)
    torch.testing.assert_close(loaded.decode(loaded.encode(image)), original.decode(original.encode(image)),
                               rtol=0, atol=0)


def test_a_file_without_a_weight_is_refused(saved):
    tensors = load_file(saved)
    del tensors["latent_mean"]
    save_file(tensors, saved)
    with pytest.raises(FileError, match=r"1 missing keys \(latent_mean\)"):
        load_autoencoder(PLAYGROUND_SPEC.latent_scale, saved)


def test_a_file_of_another_size_is_refused(saved):
    tensors = load_file(saved)
    tensors["latent_mean"] = torch.zeros(5)
    save_file(tensors, saved)
    with pytest.raises(FileError, match=r"latent_mean has shape \(5,\), wanted \(4,\)"):
        load_autoencoder(PLAYGROUND_SPEC.latent_scale, saved)


def test_nan_weights_are_refused(saved):
    tensors = load_file(saved)
    tensors["latent_mean"][0] = float("nan")
    save_file(tensors, saved)
    with pytest.raises(FileError, match="latent_mean holds NaN"):
        load_autoencoder(PLAYGROUND_SPEC.latent_scale, saved)
