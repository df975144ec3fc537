"""`python -m emma_core generate`: pictures from prompts, modules and reference pictures."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from playground_world import load_world

from emma_core import Assembly
from emma_core.__main__ import main
from emma_core.base.pipeline import Request, Sampling, generate
from emma_core.commands import generate as command
from emma_core.files.picture_file import open_picture, picture_tensor
from emma_core.model.addition import Addition
from emma_core.playground import PLAYGROUND_DIR
from emma_core.text.encoder import load_text_encoder

STYLE, FACE = (str(PLAYGROUND_DIR / f"emma-{condition}.safetensors") for condition in ("style", "face"))
NOTO, FLAT, DARK = (PLAYGROUND_DIR / "references" / f"{name}.png"
                    for name in ("style-noto", "style-fluent-emoji-flat", "face-dark"))
QUICK = ["--sampling.steps", "3", "--sampling.guidance", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def world():
    return load_world()


def written(capsys, *arguments: str) -> list[str]:
    assert main(["generate", *QUICK, *arguments]) == 0
    return capsys.readouterr().out.split()


def test_pictures_are_those_of_the_library(world, tmp_path, capsys):
    """Two modules, each with its own reference and strength; a picture of each prompt for each seed."""
    paths = written(capsys, "man cook", "woman judge", "--count", "2", "--seed", "7", "--out", str(tmp_path),
                    "--module", STYLE, str(NOTO), "--module", FACE, str(DARK), "0.5")
    wanted = Assembly([world.encode_reference("style", picture_tensor(open_picture(NOTO))),
                       replace(world.encode_reference("face", picture_tensor(open_picture(DARK))), strength=0.5)])
    requests = [Request(prompt, wanted, seed=seed) for prompt in ("man cook", "woman judge") for seed in (7, 8)]
    assert [path.rpartition("/")[2] for path in paths] == [
        "man-cook-7.png", "man-cook-8.png", "woman-judge-7.png", "woman-judge-8.png"]
    for path, picture_HW3 in zip(paths, generate(world.pipeline, requests, Sampling(3, 4.0)), strict=True):
        found = np.asarray(Image.open(path), dtype=np.float32) / 255
        assert np.abs(found - picture_HW3.numpy()).max() <= 1.01 / 255


def test_modules_are_added_up_as_the_command_says(world, tmp_path, capsys):
    """One step of six is early enough for the default, the predictions at the start."""
    modules = ["--module", STYLE, str(FLAT), "--module", FACE, str(DARK), "--sampling.steps", "6"]
    references = [world.encode_reference("style", picture_tensor(open_picture(FLAT))),
                  world.encode_reference("face", picture_tensor(open_picture(DARK)))]
    drawn = {}
    for adding in (None, "predictions", "blocks"):
        [path] = written(capsys, "man cook", "--out", str(tmp_path), *modules, *(["--adding", adding] if adding else []))
        addition = {None: Addition("predictions", 0.2)}.get(adding) or Addition(adding)
        [wanted] = generate(world.pipeline, [Request("man cook", Assembly(references, addition))], Sampling(6, 4.0))
        drawn[adding] = np.asarray(Image.open(path), dtype=np.float32) / 255
        assert np.abs(drawn[adding] - wanted.numpy()).max() <= 1.01 / 255
        assert Image.open(path).text["emma_adding"] == (adding or "early predictions")
    assert min(np.abs(drawn[one] - drawn[other]).max() for one, other in ((None, "blocks"), (None, "predictions"))) > 0.05


def test_a_picture_tells_what_it_shows_and_is_never_overwritten(tmp_path, capsys):
    [first] = written(capsys, "man cook", "--out", str(tmp_path))
    before = Image.open(first).tobytes()
    [second] = written(capsys, "man cook", "--out", str(tmp_path), "--module", STYLE, str(NOTO), "1.5")
    assert second != first and Image.open(first).tobytes() == before != Image.open(second).tobytes()
    assert Image.open(second).text == {"emma_prompt": "man cook", "emma_seed": "0",
                                       "emma_modules": "emma-style.safetensors style-noto.png 1.5"}


def test_brackets_weigh_words_as_in_comfyui(world, tmp_path, capsys):
    encode = load_text_encoder(PLAYGROUND_DIR / "t5.safetensors").encode_weighted
    weighted = replace(world.pipeline, encode_text=encode)
    drawn = {}
    for prompt in ("(man:1.6) cook", "man cook", "\\(man:1.6\\) cook"):
        [path] = written(capsys, prompt, "--out", str(tmp_path))
        [wanted] = generate(weighted, [Request(prompt)], Sampling(3, 4.0))
        drawn[prompt] = np.asarray(Image.open(path), dtype=np.float32) / 255
        assert np.abs(drawn[prompt] - wanted.numpy()).max() <= 1.01 / 255
    assert np.abs(drawn["(man:1.6) cook"] - drawn["man cook"]).max() > 0.05
    assert np.abs(drawn["\\(man:1.6\\) cook"] - drawn["man cook"]).max() > 0.05


def test_pictures_go_into_a_folder_that_no_guide_trains_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [path.rpartition("/")[0] for path in written(capsys, "man cook")] == ["output"]
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--module", STYLE], "found 1 words; wanted a module file, its reference picture"),
    (["--module", STYLE, str(NOTO), "1", "man cook"], "found 4 words; .* Prompts stand before the first --module"),
    (["--module", STYLE, "no.png"], "names 'no.png', which is no file. Check the path"),
    (["--module", STYLE, str(NOTO), "strong"], "the strength 'strong' is no number"),
    (["--module", STYLE, str(NOTO), "nan"], "the strength 'nan' is no number"),
    (["--sampling.width_px", "500"], "500 x 128 pixels; wanted .* multiples of 8"),
    (["--module", str(NOTO), str(NOTO)], "style-noto.png"),
    (["--module", STYLE, STYLE], "emma-style.safetensors is no picture that can be read"),
    (["--out", STYLE], "--out = .*emma-style.safetensors cannot be written: a file is in its place. Name a folder"),
    (["--out", f"{STYLE}/below"], "--out = .*below cannot be written: it lies below a file. Name a folder"),
    (["--out", "x" * 300], "--out = x.* cannot be written: the name is too long. Shorten it"),
    (["--out", "a\0b"], r"--out = a\\x00b cannot be written: embedded null"),
    (["--module", STYLE, "x" * 5000], "names 'x.* which is no file"),
    (["--ella.text_encoder", "x" * 5000], "ella.text_encoder = 'x.* does not exist"),
    (["--base.vae", "a\0b"], "does not exist"),
    (["(man cook:nan)"], "the prompt .* gives 'man cook' a weight that is no finite number; wanted one such as 1.2"),
    (["(" * 100 + "man" + ")" * 100], "brackets in brackets, more than 64 deep"),
    (["--count", "0"], "--count 0; wanted 1 or more"),
    (["--encoder.files", "no-such-file", "--module", STYLE, str(NOTO)], "no-such-file"),
    (["--base.checkpoint", "no-such-file.safetensors"], "base.checkpoint = 'no-such-file.safetensors' does not exist"),
    (["--base.checkpoint", "no-such-file.safetensors", "--ella.text_encoder", STYLE], "ella.file is not: T5 is read through"),
    (["--base.vae", "no-such-file.safetensors"], "base.vae = 'no-such-file.safetensors' does not exist"),
    (["--ella.text_encoder", "no-such-folder"], "ella.text_encoder = 'no-such-folder' does not exist"),
])
def test_mistakes_are_told_in_one_line_before_anything_is_loaded_or_written(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(command, "TextToImage", lambda *parts: pytest.fail("models were loaded"))
    first, rest = (arguments, []) if arguments[0].startswith("(") else (["man cook"], arguments)
    assert main(["generate", *first, "--out", str(tmp_path / "out"), *QUICK, *rest]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "out").exists()
