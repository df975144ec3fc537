"""An ELLA that learns to tell its base what the base's own text encoder tells it."""

import json
import warnings

import pytest
import torch
from checkpoints_with_text import save_checkpoint
from PIL import Image
from training_world import fresh_accelerate

from emma_core.__main__ import main
from emma_core.base.own_text import load_own_text
from emma_core.base.parts import load_base_parts
from emma_core.files.connector_file import load_connector, save_connector
from emma_core.model.connector import Connector, ConnectorConfig
from emma_core.playground import PLAYGROUND_DIR
from emma_core.training.checkpoints import checkpoints, load_checkpoint
from emma_core.training.config import resolve
from emma_core.training.draws import BatchRow
from emma_core.training.own_text_teacher import encode_for_teacher, own_text_target

T5 = str(PLAYGROUND_DIR / "t5.safetensors")
SMALL = ["--preset", "small-card", "--data.resolution_px", "64", "--data.bucket_step_px", "32", "--data.workers", "0",
         "--train.precision", "fp32", "--train.batch", "4", "--train.accumulate", "1", "--train.warmup", "1",
         "--report.log_every", "1", "--report.sample_every", "0", "--objective.place_weight", "false", "--device", "cpu"]
LONG = "a red ball " * 60  # more than 77 tokens


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sd15") / "small", sdxl=False)


@pytest.fixture(scope="module")
def ella(sd15, tmp_path_factory):
    """One that has learnt nothing, of this base's width and the small T5's."""
    torch.manual_seed(0)
    text_dim = load_connector(PLAYGROUND_DIR / "ella.safetensors").config.text_dim
    path = tmp_path_factory.mktemp("ella") / "ella.safetensors"
    config = ConnectorConfig(width=64, text_dim=text_dim, layers=2, heads=1, time_channels=64, time_width=64)
    save_connector(Connector(config), path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, (colour, caption) in enumerate((("#c03030", "a red ball"), ("#3030c0", "a blue ball"), ("#30c030", LONG))):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def train(what, sd15, ella, pictures, out, *more) -> int:
    with fresh_accelerate(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main(["train", *what, *SMALL, "--base.checkpoint", str(sd15), "--ella.file", str(ella), "--ella.text_encoder",
                     T5, "--data.folder", str(pictures), "--output.folder", str(out), "--teacher.own_text", "true", *more])


def losses(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_it_says_of_captions_of_all_lengths_what_the_base_says_by_its_own_tokens(sd15, tmp_path):
    config, captions = resolve({"what": "ella", "base": {"checkpoint": str(sd15)}}), ["a ball", LONG, "", "a fox"]
    parts = load_base_parts(config.base, config.ella, torch.float32, torch.device("cpu"))
    backbone = parts.backbone

    class Data:
        def __len__(self):
            return len(captions)

        def captions(self, index):
            return (captions[index],)

    told = []
    texts = encode_for_teacher(config, parts, Data(), tmp_path, lambda *progress: told.append(progress))
    assert told[-1][1:] == (4, 4)
    target = own_text_target(backbone, texts)
    torch.manual_seed(1)
    noised_B4hw, timestep_B = torch.randn(4, 4, 8, 8), torch.tensor([10, 400, 700, 999])
    rows = [BatchRow(index, False, caption, 0, 0, 1.0) for index, caption in enumerate(captions)]
    found_B4hw = target.predict(noised_B4hw, timestep_B, torch.zeros(4, 77, 64), rows)
    encode = load_own_text(sd15, backbone.spec, torch.float32).encode
    for index, caption in enumerate(captions):
        [text_1NW] = encode([caption])
        with torch.no_grad():
            wanted = backbone.predict_noise(noised_B4hw[index:index + 1], timestep_B[index:index + 1], text_1NW)
        assert torch.allclose(found_B4hw[index], wanted[0], atol=1e-5)
    assert not torch.allclose(found_B4hw[0], found_B4hw[1], atol=1e-3)


def test_an_ella_learns_from_it_and_an_interrupted_run_goes_on_bit_for_bit(sd15, ella, pictures, tmp_path, monkeypatch):
    from emma_core.training.trainer import Trainer

    settings = ["--train.steps", "60", "--train.rate", "5e-3", "--report.save_every", "60"]
    assert train(["ella"], sd15, ella, pictures, tmp_path / "whole", *settings) == 0
    found = losses(tmp_path / "whole")
    assert sum(found[-10:]) < 0.5 * sum(found[:10]), "a teacher's prediction has no noise of its own"
    metadata = load_connector(tmp_path / "whole" / "emma-module.safetensors")
    assert metadata.config.width == 64

    update = Trainer.update

    def interrupted(self, buckets):
        if self.step == 7:
            raise KeyboardInterrupt
        return update(self, buckets)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", interrupted)
        assert train(["ella"], sd15, ella, pictures, tmp_path / "parts", *settings) == 130
    assert train(["ella"], sd15, ella, pictures, tmp_path / "parts", *settings) == 0
    again, wanted = (load_checkpoint(checkpoints(tmp_path / name)[-1])["learning"] for name in ("parts", "whole"))
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("what", "more", "found"), [
    ([], ["--encoder.file", str(PLAYGROUND_DIR / "encoder.safetensors")], "teacher.own_text teaches an ELLA"),
    (["ella"], ["--teacher.lora", "a.safetensors"], "teacher.own_text does not go with teacher.lora"),
    (["ella"], ["--teacher.lora", "a.safetensors", "--teacher.own_latents", "true"],
     "teacher.own_text does not go with teacher.lora and teacher.own_latents"),
    (["ella"], ["--base.checkpoint", "playground"], "the playground has none but its ELLA's"),
])
def test_what_does_not_go_with_it_is_refused(sd15, ella, pictures, tmp_path, capsys, what, more, found):
    assert train(what, sd15, ella, pictures, tmp_path / "out", *more) == 1
    assert found in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_text_encoders_is_refused(ella, pictures, tmp_path, capsys, sd15):
    import shutil

    bare = shutil.copytree(sd15, tmp_path / "bare")
    shutil.rmtree(bare / "text_encoder")
    assert train(["ella"], bare, ella, pictures, tmp_path / "out") == 1
    assert "text_encoder" in capsys.readouterr().err and not (tmp_path / "out").exists()
