"""Settings that cannot be are refused before a picture is looked at or a model is loaded."""

import importlib.util

import pytest
import torch
from safetensors.torch import save_file
from small_models import small_module
from test_encoder_loading import KINDS as ENCODERS

from emma_core.__main__ import main
from emma_core.files.module_file import save_module
from emma_core.playground import PLAYGROUND_DIR
from emma_core.training import runs

OWN = ["--ella.file", "{ella}", "--ella.text_encoder", "{t5}"]
OTHER_BASE = ["--base.checkpoint", "{tmp}/base.safetensors", *OWN]


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """What `train` says of arguments, while nothing is read or written."""
    names = {"ella": "ella", "t5": "t5", "unet": "unet", "encoder": "encoder"}
    files = {name: PLAYGROUND_DIR / f"{file}.safetensors" for name, file in names.items()}
    save_file(ENCODERS["adaface"][0](), tmp_path / "adaface.safetensors")
    save_module(small_module("style"), tmp_path / "style.safetensors")
    # as much of a checkpoint as tells its family
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3),
               "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(32, 128)},
              tmp_path / "base.safetensors")
    for name in ("read_examples", "load_parts"):
        monkeypatch.setattr(runs, name, lambda *parts: pytest.fail("data or models were read"))

    def refused(arguments) -> str:
        filled = [argument.format(**files, tmp=tmp_path) for argument in arguments]
        where = ["--data.folder", str(tmp_path), "--output.folder", str(tmp_path / "run")]
        assert main(["train", *where, "--device", "cpu", *filled]) == 1 and not (tmp_path / "run").exists()
        return capsys.readouterr().err

    return refused


@pytest.mark.parametrize(("arguments", "found"), [
    (["--output.folder", ""], "output.folder is not set"),
    (["--data.resolution_px", "500"], "data.resolution_px = 500 is no multiple of data.bucket_step_px = 64; choose 512"),
    (["--data.resolution_px", "100", "--data.bucket_step_px", "20"], "data.bucket_step_px = 20; wanted a multiple of 8"),
    (["--objective.drop_text", "0.5", "--objective.drop_both", "0.6"], "add up to 1.15; wanted 1 at most"),
    (["--module.condition", "custom"], "a custom condition needs module.features"),
    (["--module.features", "global"], "wanted JSON such as"),
    (["--module.start", "{tmp}/none.safetensors"], "none.safetensors' does not exist"),
    (["--module.start", "{ella}"], "not an EMMA module"),
    (["--module.start", "{tmp}/style.safetensors", "--module.condition", "object"],
     "reads global (4) (tokens per vector), the module of this run global (1), local (1). Start from a module of the same"),
    (["--encoder.file", "none.safetensors"], "encoder.file = 'none.safetensors' does not exist"),
    (["--encoder.file", "{tmp}/adaface.safetensors"],
     "adaface.safetensors is AdaFace (IR-18, 50, 101), which gives face, face_map, face_norm; wanted an encoder that gives"),
    (["--encoder.file", "{encoder}", "--base.checkpoint", "none.safetensors", *OWN], "'none.safetensors' does not exist"),
    (["--base.checkpoint", "{unet}"], "holds no model.diffusion_model.* weights"),
    ([*OTHER_BASE[:2], "--ella.text_encoder", "{t5}"], "ella.text_encoder is set, but ella.file is not"),
    ([*OTHER_BASE[:2], "--ella.file", "{ella}"], "ella.text_encoder is not set"),
    (OTHER_BASE[:2], "holds no CLIP text encoder (cond_stage_model.transformer.*), and ella.file is not set"),
    ([*OTHER_BASE, "--module.condition", "face"], "encoder.file is not set; wanted the reference encoder of a face module"),
    ([*OTHER_BASE], "encoder of a style module: CLIP ViT (CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors, in models/clip_vision)"),
    (["--base.vae", "none.safetensors"], "base.vae = 'none.safetensors' does not exist"),
    (["--base.lora", "none.safetensors"], "base.lora = 'none.safetensors' does not exist"),
    (["--report.sample_references", "none.png"], "report.sample_references = 'none.png' does not exist"),
    (["--report.sample_references", "{tmp}"], "cannot be read ("),
    (["--report.sample_references", "{ella}"], "ella.safetensors' cannot be read (cannot identify"),
    (["--output.name", "mine.safetensors"], "output.name = 'mine.safetensors'; wanted the name of a file alone"),
    (["--output.name", "styles/mine"], "output.name = 'styles/mine'; wanted the name of a file alone"),
    (["--output.name", ".."], "output.name = '..'; wanted the name of a file alone"),
    (["--teacher.lora", "none.safetensors"], "teacher.lora = 'none.safetensors' does not exist"),
    (["--teacher.lora", "{unet}", "--teacher.ip_adapter", "{unet}"], "teacher.lora and teacher.ip_adapter are both given"),
    (["--teacher.ip_adapter", "{unet}"], "teacher.ip_adapter needs teacher.ip_image_encoder"),
    (["--teacher.own_latents", "true"], "own_latents needs a teacher"),
    (["--teacher.own_latents", "true", "--teacher.lora", "{unet}", "--teacher.prompts", "none.txt"], "'none.txt' cannot be"),
])
def test_settings_are_checked_before_anything_is_read(refusal, arguments, found):
    assert found in refusal(arguments)


def test_a_missing_package_is_named_before_anything_is_read(refusal, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name))
    assert "TensorBoard is not installed. Run `pip install tensorboard`" in refusal(["--report.tensorboard", "true"])


def test_sound_settings_go_on_to_the_data(refusal, tmp_path):
    save_file({"lora": torch.zeros(1)}, tmp_path / "lora.safetensors")
    for arguments in ([], ["--module.start", "{tmp}/style.safetensors"], ["--teacher.lora", "{tmp}/lora.safetensors"]):
        with pytest.raises(pytest.fail.Exception, match="data or models were read"):
            refusal(arguments)
