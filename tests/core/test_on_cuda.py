"""Whole runs, and pictures, on a CUDA device of fake tensors: nothing meets what was left on the CPU."""

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from PIL import Image

from emma_core import text_to_image
from emma_core.assembly import Assembly, Reference
from emma_core.generate import Request, Sampling
from emma_core.playground import PLAYGROUND_DIR
from emma_core.text_to_image import TextToImage
from emma_core.training import runs
from emma_core.training.config import BaseConfig, EllaConfig, resolve

PRECISIONS = ("fp32", "fp16", "bf16")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (128, 128), (40 * index, 90, 200)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(("woman cook", "man", "")[index])
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("what", ["module", "ella"])
def test_a_run_with_sample_sheets(tmp_path, monkeypatch, pictures, what, precision):
    """Encoding, updates, averaged weights, sheets, the thumbnail and the gain of the reference."""
    config = resolve({"what": what}, "small-card", {
        "data.folder": str(pictures), "data.workers": 0, "output.folder": str(tmp_path / "out"), "train.steps": 2,
        "train.precision": precision, "report.sample_every": 1, "report.sample_steps": 2, "report.log_every": 1})
    with fake_cuda(monkeypatch):
        runs.run(config, lambda line: None, bars=False, device="cpu")
    assert [file.name for file in sorted((tmp_path / "out" / "samples").iterdir())] == ["00000001.png", "00000002.png"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pictures_from_text_and_a_reference(monkeypatch, precision):
    for check in ("check_encoder", "check_for_module"):  # fingerprints are of values
        monkeypatch.setattr(text_to_image, check, lambda *parts, **options: None)
    with fake_cuda(monkeypatch):
        base = TextToImage(BaseConfig(), EllaConfig(), [str(PLAYGROUND_DIR / "encoder.safetensors")], "", precision, CUDA)
        module = base.load_module(str(PLAYGROUND_DIR / "emma-style.safetensors"))
        with_reference = Assembly([Reference(module, base.features(module, torch.rand(1, 128, 128, 3)))])
        drawn = base.draw([Request("woman cook", with_reference), Request("man")], Sampling(steps=2))
    assert [picture.size for picture in drawn] == [(128, 128)] * 2
