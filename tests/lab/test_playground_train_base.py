"""Training the playground's base, and from its checkpoint to the shipped files."""

import argparse
import json

import pytest
import torch
from emoji_people import small_data
from safetensors.torch import save_file

from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.encoders.playground import PlaygroundEncoder
from emma_core.errors import ImageInputError
from emma_core.files.connector_file import load_connector
from emma_core.playground.autoencoder import Autoencoder
from emma_core.playground.files import load_unet
from emma_core.text.encoder import load_text_encoder
from lab.playground import export, timed_run, train_base
from lab.playground.train_base import Base, base_of_files, saved_or_new_tokenizer

DATA_PICTURES = {"noto": ("man cook", "light")}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A folder with a checkpoint of a few steps of `train_base` on a small data set."""
    data = small_data()
    monkeypatch.setattr(train_base, "load", lambda folder: data)
    monkeypatch.setattr(train_base, "BATCH", 4)
    torch.manual_seed(0)
    save_file(Autoencoder(PLAYGROUND_SPEC.latent_scale).state_dict(), tmp_path / "autoencoder.safetensors")
    save_file({name: value.contiguous() for name, value in PlaygroundEncoder().state_dict().items()},
              tmp_path / "encoder.safetensors")
    options = argparse.Namespace(data=tmp_path, autoencoder=tmp_path / "autoencoder.safetensors", out=tmp_path / "base",
                                 encoder=tmp_path / "encoder.safetensors", start=None, minutes=0.02, rate=1e-3, threads=1,
                                 seed=0)
    train_base.train(options)
    return options


def test_a_run_goes_on_from_its_checkpoint_with_its_tokenizer(trained):
    before = torch.load(trained.out / "base.pt", weights_only=True)
    tokenizer = (trained.out / "tokenizer.json").read_bytes()
    trained.minutes = before["spent"] / 60 + 0.04
    train_base.train(trained)
    after = torch.load(trained.out / "base.pt", weights_only=True)
    assert after["step"] > before["step"] > 0 and after["spent"] > before["spent"]
    assert (trained.out / "tokenizer.json").read_bytes() == tokenizer
    assert not torch.equal(after["base"]["unet.conv_in.weight"], before["base"]["unet.conv_in.weight"])


def test_a_run_may_start_from_exported_files(trained, tmp_path):
    options = argparse.Namespace(**{**vars(trained), "base": trained.out, "out": tmp_path / "shipped"})
    export.export_base(options)
    began, averaged = base_of_files(options.out).state_dict(), export.averaged_base(trained.out / "base.pt").state_dict()
    assert all(torch.allclose(began[name], value, rtol=1e-3, atol=1e-6) for name, value in averaged.items())
    trained.start, trained.out = options.out, tmp_path / "further"
    train_base.train(trained)
    assert (trained.out / "tokenizer.json").read_bytes() == (options.out / "tokenizer.json").read_bytes()
    assert torch.load(trained.out / "base.pt", weights_only=True)["step"] > 0


def test_noisy_timesteps_come_more_often_and_count_more():
    drawn_B = timed_run.draw_timesteps(20_000, torch.Generator().manual_seed(0))
    assert drawn_B.min() >= 0 and drawn_B.max() == 999
    assert torch.isclose((drawn_B < 500).float().mean(), torch.tensor(0.5 ** (1 / timed_run.TIMESTEP_POWER)), atol=0.02)
    weight_T = timed_run.weights_of_timesteps()
    assert torch.isclose(weight_T[drawn_B].mean(), torch.tensor(1.0), atol=0.02)
    range_of_weights = timed_run.MOST_WEIGHT / timed_run.LEAST_WEIGHT
    assert (weight_T.diff() >= 0).all() and torch.isclose(weight_T[999] / weight_T[0], torch.tensor(range_of_weights))


def test_exported_files_predict_what_the_averaged_base_does(trained, tmp_path):
    options = argparse.Namespace(**{**vars(trained), "base": trained.out, "out": tmp_path / "shipped"})
    export.export_base(options)
    base, unet = export.averaged_base(trained.out / "base.pt"), load_unet(options.out / "unet.safetensors")
    connector, text_encoder = (load_connector(options.out / "ella.safetensors"),
                               load_text_encoder(options.out / "t5.safetensors"))
    tokenizer = saved_or_new_tokenizer(options.out / "tokenizer.json", small_data(), None)
    latent, timestep = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
    with torch.no_grad():
        wanted = base([[*tokenizer.encode("man cook").ids, 1]], latent, timestep)
        context = connector.tokens(text_encoder.encode(["man cook"])[0], timestep)
        found = unet(latent, timestep, context, return_dict=False)[0]
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)  # float16 weights, bfloat16 activations


def test_an_existing_tokenizer_is_kept_as_it_is(tmp_path):
    path = tmp_path / "tokenizer.json"
    saved_or_new_tokenizer(path, small_data(), None)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"].append(["added", -9.0])
    path.write_text(json.dumps(content), encoding="utf-8")
    assert saved_or_new_tokenizer(path, small_data(), None).token_to_id("added") is not None


def test_prompts_of_different_lengths_keep_their_rows():
    torch.manual_seed(0)
    base = Base(vocabulary=40).eval()
    ids = [[5, 6, 1], [1], [7, 8, 1], [9, 1]]
    generator = torch.Generator().manual_seed(0)
    latent, timestep = torch.randn(4, 4, 4, 4, generator=generator), torch.tensor([10, 300, 600, 900])
    with torch.no_grad():
        together = base(ids, latent, timestep)
        for row, one in enumerate(ids):
            alone = base([one], latent[row:row + 1], timestep[row:row + 1])
            torch.testing.assert_close(alone[0], together[row], rtol=0.02, atol=0.02)


def test_reference_pictures_are_of_the_train_split(tmp_path, monkeypatch):
    data = small_data()
    monkeypatch.setattr(export, "STYLE_PICTURES", DATA_PICTURES)
    monkeypatch.setattr(export, "FACE_PICTURES", {})
    monkeypatch.setattr(export, "OBJECT_PICTURES", {})
    export.export_references(data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["style-noto.png"]
    monkeypatch.setattr(export, "STYLE_PICTURES", {"noto": ("man pilot", "dark")})
    with pytest.raises(ImageInputError, match="held out"):
        export.export_references(data, tmp_path)
