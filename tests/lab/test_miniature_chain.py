"""Every training of the second world on a few shapes: it learns what it should and nothing else; resuming; files."""

import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer

from emma_core.base.backbones import load_backbone
from emma_core.base.config import BaseConfig, EllaConfig
from emma_core.base.parts import load_base_parts
from emma_core.encoders.clip_vision import load_clip_vision
from emma_core.errors import ImageInputError
from emma_core.files.connector_file import load_connector
from emma_core.files.module_file import load_module
from emma_core.text.encoder import load_text_encoder
from emma_core.training.ip_adapter_teacher import IpAdapterTeacher
from lab.miniature.clip import CONTEXT, TinyCLIP
from lab.miniature.evaluate import LINES
from lab.miniature.pack import join
from lab.miniature.timed import load_averaged, read_state
from lab.miniature.train_base import NoiseTask, by_bucket, load_base_unet, start_from
from lab.miniature.train_ip_adapter import adapter_tensors, add_adapter

ROOT = Path(__file__).resolve().parents[2]


def command(stage: str, *arguments) -> None:
    """Runs a stage by its own command line, in this process."""
    module = importlib.import_module(f"lab.miniature.{stage}")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with mock.patch.object(sys, "argv", [stage, *map(str, arguments)]):
            module.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def files(chain):
    """The exported folder."""
    command("export", "--states", chain, "--out", chain / "files")
    return chain / "files"


@pytest.fixture(scope="module")
def chain(miniature_data, tmp_path_factory):
    """States of every stage, each after a few updates."""
    states = tmp_path_factory.mktemp("states")
    short = ["--data", miniature_data, "--minutes", "0.02", "--batch", "4"]
    command("train_clip", *short, "--state", states / "text.pt", "--convolutions")
    command("train_clip", *short, "--state", states / "clip.pt", "--text", states / "text.pt")
    command("latents", "--data", miniature_data, "--out", states / "latents.safetensors", "--every", "50")
    noise = ["--latents", states / "latents.safetensors", "--clip", states / "clip.pt"]
    command("train_base", *short, *noise, "--state", states / "base.pt")
    command("train_t5", *short, "--state", states / "t5.pt")
    command("train_ip_adapter", *short, *noise, "--base", states / "base.pt", "--state", states / "ip.pt",
            "--out", states / "ip-adapter.safetensors")
    return states


def test_each_stage_leaves_a_state_of_its_updates(chain):
    for name in ("clip", "base", "t5", "ip"):
        state = read_state(chain / f"{name}.pt")
        assert state["step"] >= 1 and state["spent"] >= 0.02 * 60
        last = json.loads((chain / f"{name}.jsonl").read_text().splitlines()[-1 if name != "clip" else 0])
        assert last["step"] <= state["step"] and torch.isfinite(torch.tensor(last["loss"]))


def test_a_run_that_is_lengthened_goes_on_from_its_state(chain, miniature_data):
    before = read_state(chain / "t5.pt")["step"]
    command("train_t5", "--data", miniature_data, "--minutes", "0.04", "--batch", "4", "--state", chain / "t5.pt")
    assert read_state(chain / "t5.pt")["step"] > before
    ended = read_state(chain / "t5.pt")["step"]
    command("train_t5", "--data", miniature_data, "--minutes", "0.04", "--batch", "4", "--state", chain / "t5.pt")
    assert read_state(chain / "t5.pt")["step"] == ended  # its time is up


def test_clip_begins_with_the_text_tower_that_convolutions_taught_and_keeps_it(chain):
    taught, clip = (read_state(chain / f"{name}.pt") for name in ("text", "clip"))
    text = {key: value for key, value in taught["average"].items() if key.startswith("text.")}
    assert text and all(value.equal(clip["model"][key]) for key, value in text.items())
    assert not any("judge" in key for key in clip["model"])


def test_vision_only_leaves_the_text_tower_alone(chain, miniature_data, tmp_path):
    before = read_state(chain / "clip.pt")["model"]
    state = tmp_path / "clip.pt"
    state.write_bytes((chain / "clip.pt").read_bytes())
    state.with_suffix(".tokenizer.json").write_bytes((chain / "clip.tokenizer.json").read_bytes())
    command("train_clip", "--data", miniature_data, "--minutes", "0.05", "--batch", "4", "--state", state, "--vision-only")
    after = read_state(state)["model"]
    changed = {key.split(".")[0] for key in before if not before[key].equal(after[key])}
    assert changed == {"vision"}


def test_the_base_keeps_what_is_not_cross_attention_and_begins_silent():
    from emma_core.playground.files import load_unet
    from lab.playground.unet import make_unet

    torch.manual_seed(0)
    unet, other = make_unet(), load_unet(ROOT / "playground" / "unet.safetensors")
    start_from(unet, other)
    latent_B4hw, timestep_B = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    with torch.no_grad():
        one, two = (unet(latent_B4hw, timestep_B, encoder_hidden_states=torch.randn(2, 5, 128)).sample for _ in range(2))
    assert one.equal(two)  # whatever the words
    assert unet.conv_in.weight.equal(other.conv_in.weight)


def test_the_noised_latent_has_the_share_of_noise_that_its_timestep_says(chain):
    task = NoiseTask(chain / "latents.safetensors", "cpu")
    generator = torch.Generator().manual_seed(0)
    noised_B4hw, noise_B4hw, timestep_B = task.draw(torch.zeros(64, dtype=torch.long), generator)
    assert timestep_B.float().mean() > 500  # toward high noise
    last = timestep_B.argmax()
    correlation = torch.corrcoef(torch.stack([noised_B4hw[last].flatten(), noise_B4hw[last].flatten()]))[0, 1]
    assert correlation > 0.95


def test_buckets_without_a_row_are_no_number():
    means = by_bucket(torch.tensor([1.0, 3.0]), torch.tensor([10, 150]))
    assert means["t0"] == 2.0 and means["t800"].isnan()


def test_the_adapter_teaches_where_there_is_a_reference_alone(chain, files):
    backbone = load_backbone(BaseConfig(checkpoint=str(files)))
    encoder = load_clip_vision(files / "clip_vision.safetensors")
    teacher = IpAdapterTeacher(backbone, chain / "ip-adapter.safetensors", encoder, 1.0)
    generator = torch.Generator().manual_seed(0)
    latent_B4hw, tokens_BKW = (torch.randn(size, generator=generator) for size in ((2, 4, 16, 16), (2, 16, 128)))
    seen = latent_B4hw, torch.tensor([900, 900]), tokens_BKW
    reference = teacher.encode_reference(torch.rand(2, 128, 128, 3, generator=generator))
    shown = teacher.predict(*seen, {**reference, "present_B": torch.tensor([True, False])})
    plain = backbone.predict_noise(*seen)
    torch.testing.assert_close(shown[1], plain[1], atol=1e-5, rtol=1e-4)
    assert (shown[0] - plain[0]).abs().max() > 1e-4


def test_only_the_adapter_learns_and_its_names_round_trip(chain):
    unet = load_base_unet(chain / "base.pt")
    add_adapter(unet, 128, seed=0)
    learning = {name for name, tensor in unet.named_parameters() if tensor.requires_grad}
    assert learning and all("processor" in name or "encoder_hid_proj" in name for name in learning)
    assert sum(tensor.numel() for tensor in adapter_tensors(unet).values()) == sum(
        tensor.numel() for tensor in unet.parameters() if tensor.requires_grad)


def test_the_adapter_changed_while_the_base_did_not(chain):
    base, trained = read_state(chain / "base.pt"), read_state(chain / "ip.pt")["model"]
    assert all(base["average"][key].equal(trained[key]) for key in base["average"])
    fresh = load_base_unet(chain / "base.pt")
    add_adapter(fresh, 128, seed=0)
    assert any(not value.equal(trained[key]) for key, value in fresh.state_dict().items() if "_ip" in key)


def test_exported_files_are_what_the_loaders_of_the_pack_read(files):
    backbone = load_backbone(BaseConfig(checkpoint=str(files)))
    connector = load_connector(files / "ella-start.safetensors")
    text = load_text_encoder(files / "t5.safetensors").encode(["a cat"])[0]
    assert connector.width == backbone.spec.context_width and text.shape[-1] == connector.config.text_dim
    encoder = load_clip_vision(files / "clip_vision.safetensors")
    assert encoder.description["family"] == "clip-miniature"


def test_exported_files_are_a_checkpoint_with_its_own_text(files):
    """Modules on the base's own tokens, without an ELLA, belong to SD1.5's family there."""
    parts = load_base_parts(BaseConfig(checkpoint=str(files)), EllaConfig(), torch.float32, torch.device("cpu"))
    assert (parts.connector.source.family, parts.connector.source.width) == ("sd15", 128)
    assert parts.text_encoder.encode(["a cat"])[0].shape == (1, CONTEXT, 128)


def test_the_playground_of_it_is_complete_and_its_references_were_learnt_from(files, miniature_data, tmp_path, monkeypatch):
    from emma_core.encoders.loading import load_encoder
    from emma_core.playground.words import known_words
    from lab.miniature import playground

    runs, page = tmp_path / "runs", tmp_path / "help.md"
    for name, source in [("ella", files / "ella-start.safetensors"),
                         *((f"emma-{one}", ROOT / "playground" / f"emma-{one}.safetensors") for one in playground.MODULES)]:
        (runs / name).mkdir(parents=True)
        (runs / name / f"{name}.safetensors").write_bytes(source.read_bytes())
    where = ("--files", files, "--runs", runs, "--data", miniature_data, "--out", tmp_path / "out", "--help-pages", page)
    page.write_text("before\n<!-- names -->\nold\n<!-- /names -->\nafter\n")
    with pytest.raises(ImageInputError, match="name another thing"):
        command("playground", *where)
    monkeypatch.setattr(playground, "_SHOWN_IN_STYLE", (("woman cook", "medium-dark"), ("cat", "")))
    monkeypatch.setattr(playground, "FACES", {"light": ("man farmer", "noto")})
    monkeypatch.setattr(playground, "OBJECTS", {"cup": ("coffee", "3d", "")})
    command("playground", *where)
    out = tmp_path / "out"
    assert (out / "references" / "style-fxemoji.png").is_file() and len(list((out / "references").glob("*.png"))) == 12
    credits = (out / "CREDITS.md").read_text()
    assert "| `style-noto.png` | cat | Noto Emoji, Google |" in credits, "its cook in that tone is held out"
    assert "| `style-twemoji.png` | woman cook, medium-dark skin tone | Twemoji" in credits
    words = known_words(out / "words.json")
    assert words.notice("a picture of a coffee, dark skin, noto style") == "" and words.unknown("a flag") == {"flag": ""}
    assert page.read_text().startswith("before\n<!-- names -->\n\n**Animals & Nature:** cat.\n\n**Food")
    assert page.read_text().endswith("<!-- /names -->\nafter\n") and "old" not in page.read_text()
    assert load_encoder(out / "encoder.safetensors").description["family"] == "clip-miniature"
    assert load_text_encoder(out / "t5.safetensors").encode(["a cat"])[0].shape[-1] == 128


def test_two_processes_learn_as_one_with_both_batches(chain, tmp_path):
    """Their weights stay the same, and the gradient is the mean of theirs."""
    script = tmp_path / "two.py"
    script.write_text(f"""
import argparse, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from lab.miniature.timed import TimedRun, begin
options = argparse.Namespace(threads=1, seed=0, state=Path({str(tmp_path)!r}) / "state.pt", device="cpu", minutes=0.02, batch=1)
begin(options)
model = torch.nn.Linear(3, 1, bias=False)
run = TimedRun(model, options, 1e-2)
rank, seen = torch.distributed.get_rank(), []
def loss(generator):
    seen.append(torch.randn(3, generator=generator))
    return {{"loss": (model(seen[-1]) - rank).square().sum()}}
run.run(loss)
torch.save((model.weight, seen[:5], model.weight.grad, seen[-1], run.step), Path({str(tmp_path)!r}) / f"{{rank}}.pt")
""")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
                   check=True, capture_output=True, timeout=300)
    (one, first, gradient_1, _, steps_1), (two, second, gradient_2, _, steps_2) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert one.equal(two) and gradient_1.equal(gradient_2) and steps_1 == steps_2
    assert not torch.stack(first).equal(torch.stack(second))
    assert read_state(tmp_path / "state.pt")["step"] == steps_1


def test_pictures_enter_clip_as_its_towers_were_taught(chain):
    clip = TinyCLIP(Tokenizer.from_file(str(chain / "clip.tokenizer.json")))
    assert clip.mean_311.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])


@pytest.mark.slow
def test_the_whole_chain_ends_in_scores_and_in_parts_that_hold_them(miniature_packages, tmp_path):
    command("chain", "--packages", miniature_packages, "--out", tmp_path / "out", "--parts", tmp_path / "parts",
            "--minutes", "0.1", "--steps", "2", "--pictures", "4")
    join(tmp_path / "parts", tmp_path / "back")
    lines = json.loads((tmp_path / "back" / "scores" / "scores-heldout-triple.json").read_text())["lines"]
    assert {line.name for line in LINES} <= set(lines)
    for name in ("style", "face", "object", "distilled", "style-own", "face-own"):
        load_module(tmp_path / "back" / "runs" / f"emma-{name}" / f"emma-{name}.safetensors")
    load_averaged(TinyCLIP(Tokenizer.from_file(str(tmp_path / "back" / "states" / "clip.tokenizer.json"))),
                  tmp_path / "back" / "states" / "clip.pt")
