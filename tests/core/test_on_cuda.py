"""Whole runs, and pictures, on a CUDA device of fake tensors: nothing meets what was left on the CPU."""

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from PIL import Image

from emma_core.base.backbones import Backbone
from emma_core.base.config import BaseConfig, EllaConfig
from emma_core.base.pipeline import Request, Sampling
from emma_core.base.text_to_image import TextToImage
from emma_core.encoders import matching
from emma_core.encoders.clip_vision import ClipVisionEncoder
from emma_core.model.assembly import Assembly, Reference
from emma_core.playground import PLAYGROUND_DIR
from emma_core.text.encoder import TextEncoder
from emma_core.training import runs
from emma_core.training.config import resolve
from emma_core.training.student import Student

PRECISIONS = ("fp32", "fp16", "bf16")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (128, 128), (40 * index, 90, 200)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(("woman cook", "man", "")[index])
    return folder


def run(config, pictures, tmp_path, monkeypatch) -> None:
    """Train what the settings say."""
    config = resolve({"what": config.pop("what", "module")}, "small-card", {
        "data.folder": str(pictures), "data.workers": 0, "output.folder": str(tmp_path / "out"), "train.steps": 2,
        "report.sample_every": 1, "report.sample_steps": 2, "report.sample_prompts": ("woman cook",),
        "report.log_every": 1, "output.calibrate": False, **config})  # fake tensors have no numbers to choose by
    with fake_cuda(monkeypatch):
        runs.run(config, lambda line: None, bars=False, device="cpu")


def spy(monkeypatch, owner, name: str, models, seen: dict[str, set[str]]) -> None:
    """Note in ``seen`` which of ``models()`` are on the device when a method is called."""
    real = getattr(owner, name)

    def call(*arguments, **options):
        here = {what for what, model in models().items() if model and {value.device for value in model.parameters()} == {CUDA}}
        seen.setdefault(f"{owner.__name__}.{name}", set()).update(here)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("what", ["module", "ella"])
def test_a_run_with_sample_sheets(tmp_path, monkeypatch, pictures, what, precision):
    """Encoding, updates, averaged weights, sheets, the thumbnail and the gain of the reference."""
    run({"what": what, "train.precision": precision}, pictures, tmp_path, monkeypatch)
    assert [file.name for file in sorted((tmp_path / "out" / "samples").iterdir())] == ["00000001.png", "00000002.png"]


def test_a_small_card_holds_only_what_is_at_work(tmp_path, monkeypatch, pictures):
    """With the models of SD1.5 all of them together would take 7 GB."""
    made, seen = [], {}
    load_parts = runs.load_parts
    monkeypatch.setattr(runs, "load_parts", lambda *arguments: made.append(load_parts(*arguments)) or made[0])

    def models() -> dict:
        parts = made[0]
        return {"UNet": parts.backbone.unet, "autoencoder": parts.backbone.autoencoder,
                "text encoder": parts.text_encoder and parts.text_encoder.model,
                "reference encoder": parts.reference_encoder and parts.reference_encoder.model}

    for owner, name in ((Backbone, "encode"), (TextEncoder, "encode"), (ClipVisionEncoder, "features_of"),
                        (Student, "errors")):
        spy(monkeypatch, owner, name, models, seen)
    run({}, pictures, tmp_path, monkeypatch)
    assert seen == {"Backbone.encode": {"autoencoder"}, "TextEncoder.encode": {"text encoder"},
                    "ClipVisionEncoder.features_of": {"reference encoder"},
                    "Student.errors": {"UNet", "autoencoder"}}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pictures_from_text_and_a_reference(monkeypatch, precision):
    for check in ("check_encoder", "check_for_module"):  # fingerprints are of values
        monkeypatch.setattr(matching, check, lambda *parts, **options: None)
    seen: dict[str, set[str]] = {}
    with fake_cuda(monkeypatch):
        base = TextToImage(BaseConfig(), EllaConfig(), [str(PLAYGROUND_DIR / "encoder.safetensors")], "", precision, CUDA)

        def models() -> dict:
            return {"UNet": base._parts.backbone.unet, "autoencoder": base._parts.backbone.autoencoder,
                    "text encoder": base._parts.text_encoder.model, "reference encoder": base._encoders[0].model}

        for owner, name in ((ClipVisionEncoder, "features_of"), (TextEncoder, "encode"), (Backbone, "predict_noise")):
            spy(monkeypatch, owner, name, models, seen)
        module = base.load_module(str(PLAYGROUND_DIR / "emma-style.safetensors"))
        with_reference = Assembly([Reference(module, base.features(module, torch.rand(1, 128, 128, 3)))])
        drawn = base.draw([Request("woman cook", with_reference), Request("man")], Sampling(steps=2))
    assert [picture.size for picture in drawn] == [(128, 128)] * 2
    drawing = {"UNet", "autoencoder", "text encoder"}
    assert seen == {"ClipVisionEncoder.features_of": {"reference encoder"}, "TextEncoder.encode": drawing,
                    "Backbone.predict_noise": drawing}
