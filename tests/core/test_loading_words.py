"""What is said before large files are loaded."""

import re

import pytest

from emma_core.__main__ import main
from emma_core.files import loading_words
from emma_core.files.loading_words import loading_in_words
from emma_core.playground import PLAYGROUND_DIR


def sparse(path, size: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def test_large_files_and_folders_are_named_with_their_sizes(tmp_path):
    file = sparse(tmp_path / "base.safetensors", 4_265_000_000)
    sparse(tmp_path / "t5" / "model.safetensors", 1_000_000_000)
    sparse(tmp_path / "t5" / "model-2.safetensors", 1_440_000_000)
    sparse(tmp_path / "small.safetensors", 1000)
    assert loading_in_words([file, "", tmp_path / "t5", tmp_path / "small.safetensors", tmp_path / "none"]) == (
        "loading base.safetensors (4.3 GB), t5 (2.4 GB)")


def test_nothing_is_said_of_small_files():
    assert loading_in_words([PLAYGROUND_DIR / "unet.safetensors", "playground"]) == ""


@pytest.mark.parametrize("command", ["generate", "eval", "train"])
def test_the_commands_say_it_before_they_load(command, tmp_path, capsys, monkeypatch):
    """With a limit that the playground's files exceed."""
    monkeypatch.setattr(loading_words, "_WORTH_SAYING", 1)
    encoder, style = (str(PLAYGROUND_DIR / f"{name}.safetensors") for name in ("encoder", "emma-style"))
    picture = str(PLAYGROUND_DIR / "references" / "style-noto.png")
    arguments = {
        "generate": ["man cook", "--module", style, picture, "--sampling.steps", "2", "--out", str(tmp_path / "out")],
        "eval": ["--modules.files", style, "--references.folder", str(PLAYGROUND_DIR / "references"), "--references.most", "1",
                 "--prompts.file", str(PLAYGROUND_DIR / "recipes" / "prompts.txt"), "--prompts.most", "1", "--encoder.files",
                 encoder, "--output.folder", str(tmp_path / "out"), "--sampling.steps", "2"],
        "train": ["--preset", "small-card", "--data.folder", str(PLAYGROUND_DIR / "references"), "--encoder.file", encoder,
                  "--output.folder", str(tmp_path / "out"), "--train.steps", "1", "--train.batch", "2", "--data.workers", "0",
                  "--report.sample_every", "0", "--output.thumbnail", "false"]}[command]
    assert main([command, *arguments, "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert re.search(r"^loading .*encoder[.]safetensors \(", told.out + told.err, re.MULTILINE)
