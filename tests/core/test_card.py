"""`python -m emma_core card`: a folder as model sites want it, of what the module's file says."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from emma_core.__main__ import main
from emma_core.files.model_card import Beside, license_entries, model_card
from emma_core.files.module_file import load_module, read_module_config
from emma_core.model.source_spec import SourceSpec, TimeSpec
from emma_core.playground import PLAYGROUND_DIR

GAIN = {"with reference": [None, 0.02, 0.03, 0.009, 0.004], "text only": [None, 0.02, 0.03, 0.010, 0.005]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run leaves: the module, its samples, its curve and its log."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copyfile(PLAYGROUND_DIR / "emma-style.safetensors", folder / "mine.safetensors")
    (folder / "samples").mkdir()
    for step, colour in ((0, "red"), (500, "blue")):
        Image.new("RGB", (60, 40), colour).save(folder / "samples" / f"{step:08d}.png")
    Image.new("RGB", (50, 30)).save(folder / "loss.png")
    (folder / "log.jsonl").write_text("\n".join(json.dumps(line) for line in ({"step": 1, "loss": 0.1}, {"step": 500, **GAIN})))
    return folder


@pytest.fixture(scope="module")
def card(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("cards") / "card"
    (run / "table.md").write_text("| | CLIP-I |\n| --- | --- |\n| mine | 0.71 |\n")
    assert main(["card", str(run / "mine.safetensors"), "--out", str(out), "--title", "Mine | yours", "--author", "Ada",
                 "--license", "Apache 2.0", "--base-model", "owner/base", "--scores", str(run / "table.md")]) == 0
    return out


def front_matter(text: str) -> dict:
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def test_the_folder_holds_all_that_is_shown(card):
    assert sorted(path.name for path in card.iterdir()) == [
        "README.md", "gates.png", "loss.png", "mine.safetensors", "sheet.png", *(["thumbnail.jpg"] if (
            card / "thumbnail.jpg").exists() else [])]
    assert Image.open(card / "sheet.png").getpixel((5, 5)) == (0, 0, 255), "the last sheet of the run"
    assert Image.open(card / "gates.png").width > 300
    text = (card / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in text for name in ("sheet.png", "gates.png", "loss.png"))


def test_the_front_matter_is_what_hugging_face_reads(card):
    found = front_matter((card / "README.md").read_text(encoding="utf-8"))
    assert found["license"] == "apache-2.0" and found["pipeline_tag"] == "text-to-image" and found["base_model"] == "owner/base"
    assert {"emma", "comfyui", "emma-style", "ella"} <= set(found["tags"])
    assert found["widget"] == [{"text": "Mine / yours", "output": {"url": "sheet.png"}}]


def test_the_card_says_what_the_file_says_and_no_path(card, run):
    text, config = (card / "README.md").read_text(encoding="utf-8"), read_module_config(run / "mine.safetensors")
    assert "# Mine / yours" in text and "Author: Ada; licence: Apache 2.0." in text
    assert f"| updates | {config.training['steps']} |" in text and "family clip-miniature" in text
    assert "| 800 to 999 | 0.00400 | 0.00500 | -20.0% |" in text and "| mine | 0.71 |" in text
    assert str(run) not in text and str(card) not in text


def test_the_module_is_the_same_and_says_who_made_it(card, run):
    before, after = load_file(run / "mine.safetensors"), load_file(card / "mine.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    metadata = load_module(card / "mine.safetensors").config.file_metadata
    assert (metadata["modelspec.title"], metadata["modelspec.author"]) == ("Mine | yours", "Ada")


@pytest.mark.parametrize(("license", "found"), [
    ("Apache-2.0", {"license": "apache-2.0"}), ("CreativeML OpenRAIL M", {"license": "creativeml-openrail-m"}),
    ("ask me first!", {"license": "other", "license_name": "ask-me-first"}), (" ", {"license": "unknown"})])
def test_licences_are_named_as_hugging_face_does(license, found):
    assert license_entries(license) == found


def test_what_is_missing_is_told(run, tmp_path, capsys):
    shutil.copyfile(run / "mine.safetensors", tmp_path / "bare.safetensors")
    assert main(["card", str(tmp_path / "bare.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "it has no author; add --author" in told and "no sheet: there is no folder `samples`" in told
    assert "bare-card: README.md" in told


def test_a_module_on_own_tokens_says_so(run):
    config = read_module_config(run / "mine.safetensors")
    text = model_card(config.replace(source=SourceSpec("sdxl", 2048), time=TimeSpec("ddpm")), Beside("m.safetensors"))
    assert "the own tokens of sdxl (width 2048)" in text and "ella" not in front_matter(text)["tags"]


@pytest.mark.parametrize(("prepare", "arguments", "found"), [
    (lambda run, out: out.mkdir() or (out / "mine.txt").write_text("x"), [], "is not an empty folder"),
    (lambda run, out: None, ["--sheet", "{run}/log.jsonl"], "cannot be read"),
    (lambda run, out: None, ["--scores", "{run}/none.md"], "none.md"),
])
def test_mistakes_are_told_and_nothing_is_made(run, tmp_path, capsys, prepare, arguments, found):
    out = tmp_path / "out"
    prepare(run, out)
    before = sorted(out.iterdir()) if out.exists() else None
    arguments = [argument.format(run=run) for argument in arguments]
    assert main(["card", str(run / "mine.safetensors"), "--out", str(out), *arguments]) == 1
    assert found in capsys.readouterr().err
    assert (sorted(out.iterdir()) if out.exists() else None) == before
