"""A whole run on the playground from the command line: data, caches, training, samples, going on, inspecting."""

import base64
import io
import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from test_training_backbones import kohya_lora, lora_layers
from training_world import fresh_accelerate

from emma_core import load_connector, load_module
from emma_core.__main__ import main
from emma_core.base.backbones import load_backbone
from emma_core.base.config import BaseConfig
from emma_core.playground import PLAYGROUND_DIR
from emma_core.training.calibration import STRENGTHS
from emma_core.training.checkpoints import checkpoints
from emma_core.training.config import resolve
from emma_core.training.reports import draw_loss_curve
from emma_core.training.saved import Sitting

SMALL = ["--preset", "small-card", "--data.resolution_px", "128", "--data.reference_crops", "0", "--data.workers", "0",
         "--train.precision", "fp32", "--train.batch", "2", "--train.accumulate", "1", "--train.warmup", "1",
         "--train.gradient_checkpointing", "false", "--report.log_every", "1", "--report.sample_every", "0", "--device",
         "cpu", "--output.calibrate", "false"]

OUT = ["--data.folder", "{data}", "--output.folder", "{out}"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two styles of two pictures: filled and outlined shapes, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    chance = random.Random(3)
    for style in ("filled", "outlined"):
        (folder / style).mkdir()
        for index, caption in enumerate(("woman astronaut", "man cook")):
            picture = Image.new("RGB", (128, 128), "white")
            colour = tuple(chance.randrange(256) for _ in range(3))
            shape = {"fill": colour} if style == "filled" else {"outline": colour, "width": 4}
            ImageDraw.Draw(picture).ellipse((20 + 10 * index, 20, 100, 110), **shape)
            picture.save(folder / style / f"{index}.png")
            (folder / style / f"{index}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """Three updates with a sample sheet after the second."""
    folder = tmp_path_factory.mktemp("run")
    settings = ["--output.name", "mine", "--output.title", "My style", "--train.steps", "3", "--report.sample_every", "2",
                "--report.sample_steps", "2", "--report.save_every", "2"]
    assert main(["train", *SMALL, *settings, "--data.folder", str(pictures), "--output.folder", str(folder)]) == 0
    return folder


def test_the_module_says_what_it_is_and_names_no_path(run, pictures):
    config = load_module(run / "mine.safetensors").config
    assert config.condition == "style" and config.file_metadata["modelspec.title"] == "My style"
    assert config.ella["sha256"] == load_connector(PLAYGROUND_DIR / "ella.safetensors").sha256
    assert config.encoder["family"] == "clip-miniature" and len(config.encoder["fingerprint"]) == 64
    assert config.training["steps"] == 3 and config.training["data"]["pictures"] == 4 and config.training["data"]["groups"] == 2
    assert config.training["recipe"]["batch"] == 2 and config.training["base"]["sha256"]
    kind, _, picture = config.file_metadata["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64" and Image.open(io.BytesIO(base64.b64decode(picture))).size == (255, 255)
    assert str(pictures) not in json.dumps(dict(config.training)) and str(run) not in config.to_json()


def test_a_run_finds_what_strength_1_stands_for_and_draws_nothing_else_anew(run, pictures, tmp_path, capsys):
    settings = ["--output.name", "mine", "--output.title", "My style", "--train.steps", "3", "--report.sample_every", "2",
                "--report.sample_steps", "2", "--report.save_every", "2", "--output.calibrate", "true"]
    assert main(["train", *SMALL, *settings, "--data.folder", str(pictures), "--output.folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    found, plain = (load_module(folder / "mine.safetensors") for folder in (tmp_path, run))
    assert f"strength 1 stands for {found.config.calibrated_strength:g} of what was trained" in said
    assert found.config.calibrated_strength in STRENGTHS
    assert "likeness to references of 2 pictures" in found.config.calibration["by"]
    assert all(torch.equal(one, other) for one, other in zip(found.parameters(), plain.parameters(), strict=True))
    assert plain.config.calibration == {} and found.config.training["recipe"] == plain.config.training["recipe"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    measured = next(line["likeness"] for line in lines if "likeness" in line)
    assert list(measured) == [str(strength) for strength in STRENGTHS] and len(set(measured.values())) == len(STRENGTHS)


def test_sheets_in_bf16_show_what_they_show_in_float32(run, pictures, tmp_path):
    settings = ["--train.steps", "2", "--report.sample_every", "2", "--report.sample_steps", "2", "--train.precision", "bf16"]
    with fresh_accelerate():
        assert main(["train", *SMALL, *settings, "--data.folder", str(pictures), "--output.folder", str(tmp_path)]) == 0
    found, wanted = (torch.from_numpy(np.array(Image.open(folder / "samples" / "00000002.png"), dtype=np.float32))
                     for folder in (tmp_path, run))
    assert (found - wanted).abs().mean() < 2 < wanted.std()


def test_the_run_leaves_log_curve_samples_and_its_configuration(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert len(lines[0]["buckets"]) == 5 and len(lines[0]["gates"]["A"]) == 4
    assert set(lines[-1]) == {"step", "with reference", "text only"}
    assert Image.open(run / "loss.png").size == (760, 420)
    sheet = Image.open(run / "samples" / "00000002.png")
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["00000002.png", "00000003.png"]
    assert sheet.width > 5 * 160 and len(sheet.resize((40, 40)).getcolors(2000)) > 50
    assert 'condition = "style"' in (run / "config.toml").read_text()
    assert [path.name for path in checkpoints(run)] == ["checkpoint-00000002.pt", "checkpoint-00000003.pt"]


def test_starting_again_goes_on_and_encodes_nothing(run, pictures, capsys, monkeypatch):
    from emma_core.encoders.clip_vision import ClipVisionEncoder
    from emma_core.text.encoder import TextEncoder

    def never(*arguments):
        raise AssertionError("encoded again")

    monkeypatch.setattr(ClipVisionEncoder, "features_of", never)
    texts = []
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, prompts: texts.extend(prompts) or encode(self, prompts))
    assert main(["train", *SMALL, "--data.folder", str(pictures), "--output.folder", str(run), "--output.name", "longer",
                 "--train.steps", "4"]) == 0
    assert "going on after update 3" in capsys.readouterr().out
    assert load_module(run / "longer.safetensors").config.training["steps"] == 4
    assert len(texts) == 5, "the texts of the samples alone: four prompts that are no captions, and none"
    assert not {"woman astronaut", "man cook"} & set(texts)


def test_a_folder_of_other_settings_stays_as_it_is(run, pictures, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", *SMALL, "--data.folder", str(pictures), "--output.folder", str(run), "--train.rate", "0.1",
                 "--data.resolution_px", "64"]) == 1
    assert "data.resolution_px is 128 there and 64 here; train.rate is 0.0005 there and 0.1 here" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_ella_itself_can_be_trained(pictures, tmp_path):
    settings = ["--data.folder", str(pictures), "--output.folder", str(tmp_path), "--train.steps", "1"]
    assert main(["train", "ella", *SMALL, *settings]) == 0
    before, after = load_connector(PLAYGROUND_DIR / "ella.safetensors"), load_connector(tmp_path / "emma-module.safetensors")
    assert (before.config == after.config) and before.sha256 != after.sha256


def test_a_dry_run_lists_and_writes_nothing(pictures, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.png").write_bytes(b"no picture")
    assert main(["train", "--dry-run", *SMALL, "--data.folder", str(pictures)]) == 0
    told = capsys.readouterr().out
    places = [told.find(part) for part in (
        "pictures: 4 to learn from", "GB of checkpoints", "loading the models", "encoding ", "trial update 1 of 2",
        "trial update 2 of 2", "s an update in a trial", "memory, bf16:", "while data are encoded", "this run can start")]
    assert -1 not in places and places == sorted(places), (places, told)  # before each wait it says what it waits for
    assert main(["train", "--dry-run", "--data.folder", str(tmp_path / "bad")]) == 1
    told = capsys.readouterr().out
    assert "broken.png" in told and "this run cannot start" in told and "in a trial" not in told
    assert main(["train", *SMALL, "--data.folder", str(tmp_path / "bad"), "--output.folder", str(tmp_path / "run")]) == 1
    assert "broken.png" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("arguments", "found"), [
    (["--data.folder", "{data}"], "output.folder is not set"),
    ([*OUT, "--module.condition", "object"], None),
    ([*OUT, "--encoder.file", "none.safetensors"], "none.safetensors' does not exist"),
    ([*OUT, "--base.checkpoint", "no.safetensors", "--ella.file", "{ella}", "--ella.text_encoder", "{t5}"], "no.safetensors"),
    ([*OUT, "--base.checkpoint", "none.safetensors"], "base.checkpoint = 'none.safetensors' does not exist"),
    ([*OUT, "--teacher.lora", "a", "--teacher.ip_adapter", "b"], "Remove one"),
])
def test_mistakes_are_told_in_one_line(pictures, tmp_path, capsys, arguments, found):
    files = {"ella": PLAYGROUND_DIR / "ella.safetensors", "t5": PLAYGROUND_DIR / "t5.safetensors"}
    filled = [argument.format(data=pictures, out=tmp_path / "out", **files) for argument in arguments]
    status = main(["train", *SMALL, *filled, "--train.steps", "1"])
    if found is None:  # the playground's encoder has local features too
        assert status == 0
        return
    assert status == 1
    message = capsys.readouterr().err
    assert found in message and message.startswith("error: ") and "Traceback" not in message


@pytest.fixture
def taught(pictures, tmp_path):
    """Arguments of a run that a LoRA with random weights teaches, on samples of the playground itself."""
    unet = load_backbone(BaseConfig()).unet
    save_file(kohya_lora(lora_layers(unet)), tmp_path / "lora.safetensors")
    (tmp_path / "prompts.txt").write_text("woman astronaut\n\nman cook\n", encoding="utf-8")
    return [*SMALL, "--data.folder", str(pictures), "--teacher.own_latents", "true", "--teacher.samples", "2",
            "--teacher.prompts", str(tmp_path / "prompts.txt"), "--report.sample_steps", "2", "--report.guidance", "3"]


def test_a_teacher_needs_prompts_and_references_alone(taught, tmp_path, capsys):
    where = ["--teacher.lora", str(tmp_path / "lora.safetensors"), "--output.folder", str(tmp_path / "run")]
    first, second = (["train", *taught, *where, "--train.steps", steps] for steps in "23")
    assert main(first) == 0
    config = load_module(tmp_path / "run" / "emma-module.safetensors").config
    assert config.training["data"] == {"own_latents": 4, "distinct_prompts": 2, "references": 4}
    [shard] = (tmp_path / "run" / "cache" / "own_latents").rglob("*.safetensors")
    latents = load_file(shard)
    assert len(latents) == 4 and all(value.shape == (4, 16, 16) for value in latents.values())
    values = list(latents.values())
    assert not any(torch.equal(values[0], other) for other in values[1:])
    before = shard.stat().st_mtime_ns
    assert main(second) == 0 and shard.stat().st_mtime_ns == before, "drawn once"
    assert "going on after update 2" in capsys.readouterr().out


def test_every_group_of_references_may_have_a_lora_of_its_own(taught, tmp_path, capsys):
    loras = tmp_path / "loras"
    loras.mkdir()
    for name in ("filled", "another"):
        shutil.copyfile(tmp_path / "lora.safetensors", loras / f"{name}.safetensors")
    where = ["--teacher.lora", str(loras), "--output.folder", str(tmp_path / "several"), "--train.steps", "1"]
    assert main(["train", *taught, *where]) == 1
    assert "LoRAs for the groups another, filled, and none for outlined" in capsys.readouterr().err
    (loras / "another.safetensors").rename(loras / "outlined.safetensors")
    assert main(["train", *taught, *where]) == 0


@pytest.mark.parametrize(("arguments", "found"), [
    ([], "own_latents needs a teacher"),
    (["--teacher.lora", "a", "--data.flip", "true"], "data.flip does not go with"),
    (["--teacher.lora", "a", "--teacher.prompts", "none.txt"], "'none.txt' cannot be read"),
])
def test_own_latents_that_cannot_be_are_refused(taught, tmp_path, capsys, arguments, found):
    assert main(["train", *taught, *arguments, "--output.folder", str(tmp_path / "run"), "--train.steps", "1"]) == 1
    assert found in capsys.readouterr().err


def test_inspect_prints_and_draws(run, capsys, tmp_path):
    assert main(["inspect", str(run / "mine.safetensors"), "--gate-map", str(tmp_path / "gates.png")]) == 0
    text = capsys.readouterr().out
    assert "mine.safetensors: EMMA style module" in text and "global (128 wide" in text and "My style" in text
    assert Image.open(tmp_path / "gates.png").width > 300
    assert main(["inspect", str(PLAYGROUND_DIR / "ella.safetensors")]) == 1
    assert "not an EMMA module" in capsys.readouterr().err


def test_a_gate_map_of_named_files_needs_no_playground(run, capsys, tmp_path, monkeypatch):
    named = ["--ella", str(PLAYGROUND_DIR / "ella.safetensors"), "--text-encoder", str(PLAYGROUND_DIR / "t5.safetensors")]
    inspect = ["inspect", str(run / "mine.safetensors"), "--gate-map", str(tmp_path / "own.png")]
    assert main(inspect) == 0
    monkeypatch.setattr("emma_core.commands.inspect.PLAYGROUND_DIR", tmp_path / "none")
    assert main([*inspect[:-1], str(tmp_path / "named.png"), *named]) == 0
    assert (tmp_path / "named.png").read_bytes() == (tmp_path / "own.png").read_bytes()
    assert main([*inspect, *named[:2]]) == 1 and "none" in capsys.readouterr().err


def test_the_loss_curve_falls_where_the_loss_does():
    lines = [{"step": step, "buckets": [1 / step, None, None, None, None]} for step in (1, 10, 100)]
    sheet = draw_loss_curve(lines)
    blue = [(x, y) for x in range(64, 570) for y in range(30, 380) if sheet.getpixel((x, y)) == (33, 102, 172)]
    assert min(y for x, y in blue if x < 80) < 40 < 340 < max(y for x, y in blue if x > 540)


def test_frozen_parts_have_no_gradient_after_a_run(pictures, tmp_path):
    from accelerate import Accelerator

    from emma_core.training.config import resolve
    from emma_core.training.examples import read_examples
    from emma_core.training.losses import TimestepBuckets
    from emma_core.training.parts import encoders_of, load_parts, options_of
    from emma_core.training.prepare import prepare
    from emma_core.training.runs import begin_run

    config = resolve({}, "small-card", {"data.folder": str(pictures), "data.resolution_px": 128, "data.workers": 0,
                                        "train.precision": "fp32", "train.batch": 2, "train.accumulate": 1})
    parts = load_parts(config, torch.float32, torch.device("cpu"))
    frozen = [*parts.backbone.parameters(), *parts.connector.parameters(), *parts.text_encoder.model.parameters()]
    examples, _ = read_examples(config.data)
    data = prepare(examples, config.data, config.encoder, encoders_of(parts, config), options_of(config), tmp_path)
    trainer = begin_run(config, parts, data, Accelerator(cpu=True), tmp_path)
    trainer.optimizer.zero_grad = lambda *rest, **more: None  # the gradients of the update stay to be looked at
    trainer.update(TimestepBuckets())
    assert all(value.grad is None and not value.requires_grad for value in frozen)
    learning = dict(trainer.student.parameters())
    assert all(value.grad is not None for value in learning.values())
    assert any(value.grad.abs().max() > 0 for name, value in learning.items() if name.endswith("attn_gate"))


def test_what_was_stopped_is_told_from_the_files(tmp_path):
    config = resolve({}, changes={"output.folder": str(tmp_path), "output.name": "mine"})
    assert "no module and no checkpoint was saved in this sitting" in Sitting(config).ended_early()
    (tmp_path / "checkpoint-00000002.pt").write_bytes(b"2")
    (tmp_path / "mine.safetensors").write_bytes(b"2")
    told = Sitting(config).ended_early()
    assert "no module and no checkpoint was saved" in told and "goes on from checkpoint-00000002.pt, of an earlier" in told
    sitting = Sitting(config)
    (tmp_path / "checkpoint-00000003.pt").write_bytes(b"3")
    told = sitting.ended_early()
    assert told.startswith("stopped; checkpoint-00000003.pt saved in") and "mine.safetensors" not in told


def test_ctrl_c_while_encoding_claims_no_module(pictures, tmp_path, capsys, monkeypatch):
    from emma_core.text.encoder import TextEncoder

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextEncoder, "encode", interrupt)
    assert main(["train", *SMALL, "--data.folder", str(pictures), "--output.folder", str(tmp_path)]) == 130
    assert "no module and no checkpoint was saved in this sitting" in capsys.readouterr().err


def test_another_tokenizer_is_another_cache_of_texts(tmp_path):
    from emma_core.text.t5_tokenizer import PromptTokenizer

    found = sorted((PLAYGROUND_DIR).glob("*tokenizer.json"))[0]
    content = json.loads(found.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary[-1], vocabulary[-2] = vocabulary[-2], vocabulary[-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    own, same_again, other = (PromptTokenizer(path).fingerprint for path in (found, found, tmp_path / "tokenizer.json"))
    assert own == same_again != other
