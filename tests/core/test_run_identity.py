"""What belongs to a run: the contents of its files and pictures, and its folder, which it has alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import small_module
from small_t5 import random_t5_encoder, save_single
from test_training_run import SMALL, pictures  # noqa: F401
from training_world import TinySet, fresh_accelerate, tiny_config, tiny_trainer

from emma_core import save_module
from emma_core.__main__ import main
from emma_core.errors import EmmaWarning, TrainingError
from emma_core.files.content_mark import content_mark
from emma_core.training import runs
from emma_core.training.acceleration import new_accelerator, new_device
from emma_core.training.checkpoints import checkpoints, load_checkpoint
from emma_core.training.identity import check_folder, file_marks
from emma_core.training.lock import alone_in


def test_other_weights_under_the_same_name_are_another_mark(tmp_path):
    """Of 40 MB a sample counts: one changed layer of many shows, a copy of the same bytes does not."""
    tensors = {f"layer.{index}": torch.full((1_000_000,), float(index)) for index in range(10)}
    save_file(tensors, tmp_path / "a.safetensors")
    mark = content_mark(tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    assert content_mark(tmp_path / "b.safetensors") == mark
    for index in range(10):
        save_file(tensors | {f"layer.{index}": torch.full((1_000_000,), 0.5)}, tmp_path / "b.safetensors")
        assert content_mark(tmp_path / "b.safetensors") != mark
    (tmp_path / "folder").mkdir()
    for step, name in enumerate(("config.json", "model.safetensors", "readme.md")):
        before = content_mark(tmp_path / "folder")
        (tmp_path / "folder" / name).write_bytes(b"x")
        assert (content_mark(tmp_path / "folder") != before) == (step < 2)


def test_a_file_that_was_replaced_belongs_to_another_run(tmp_path):
    """Before anything is loaded, by its contents; a file that was copied or touched is the same."""
    start = tmp_path / "start.safetensors"
    save_module(small_module(), start)
    config = tiny_config(train__steps=1, module__start=str(start))
    folder = tmp_path / "run"
    first = tiny_trainer(folder, tiny_config(train__steps=1))
    first.config, first._files = config, file_marks(config)
    first.run()
    os.utime(start, (1, 1))
    check_folder(folder, config)
    save_module(small_module(seed=9), start)
    with pytest.raises(TrainingError, match=r"checkpoint-00000001.pt belongs to a run with other files: the contents of "
                                            r"module.start have changed. Give this run a folder of its own, or put these"):
        check_folder(folder, config)


def test_checkpoints_of_before_contents_counted_are_gone_on_from(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_config(train__steps=1))
    trainer.run()
    assert "files" in load_checkpoint(checkpoints(tmp_path)[-1])["run"]
    again = tiny_trainer(tmp_path, tiny_config(train__steps=1))
    again._files = {"base.checkpoint": "0"}
    assert again.resume()


def test_other_pictures_under_the_same_names_are_told(tmp_path):
    class Changed(TinySet):
        def mark(self):
            return "other pictures"

    tiny_trainer(tmp_path, tiny_config(train__steps=1)).run()
    with pytest.warns(EmmaWarning, match="6 pictures as before, but with other pictures"):
        assert tiny_trainer(tmp_path, tiny_config(train__steps=2), Changed()).resume()


HOLDING = """
import sys, time
from pathlib import Path
from emma_core.training.lock import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_in_one_folder_are_kept_apart_and_a_kill_gives_it_back(tmp_path):
    root = Path(__file__).resolve().parents[2]
    holder = subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        (tmp_path / ".checkpoint-00000003.pt.77.part").write_bytes(b"half")
        with pytest.raises(TrainingError, match="another run is at work in .* Wait until it has ended, or give this one"), \
                alone_in(tmp_path):
            pytest.fail("two runs in one folder")
        assert list(tmp_path.glob("*.part")) or list(tmp_path.glob(".*.part")), "what the other one writes is left alone"
    finally:
        holder.kill()
        holder.wait()
    with alone_in(tmp_path):
        assert not list(tmp_path.rglob(".*.part")), "what a killed run left is cleared"


def test_a_second_run_in_a_process_may_have_another_precision():
    with fresh_accelerate():
        for precision in ("fp32", "bf16", "fp32"):
            assert new_device(cpu=True).type == "cpu"
            accelerator = new_accelerator(precision, cpu=True)
            assert accelerator.mixed_precision == ("no" if precision == "fp32" else precision)


def test_a_t5_of_another_width_is_refused_before_anything_is_encoded(pictures, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(runs, "encoded", lambda *parts: pytest.fail("data were encoded"))
    t5 = save_single(tmp_path, random_t5_encoder())
    arguments = ["--data.folder", str(pictures), "--output.folder", str(tmp_path / "run"), "--ella.text_encoder", str(t5)]
    assert main(["train", *SMALL, *arguments]) == 1
    assert "t5.safetensors" in (told := capsys.readouterr().err) and "width" in told


@pytest.mark.parametrize(("folder", "found"), [
    ("a\0b", "cannot be written: embedded null"), ("x" * 300, "cannot be written: the name is too long"),
    ("file/below", "cannot be written: it lies below a file"), ("file", "cannot be written: a file is in its place"),
])
@pytest.mark.parametrize("command", ["train", "eval"])
def test_folders_that_cannot_be_are_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch, pictures,  # noqa: F811
                                                                      folder, found, command):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("emma_core.training.runs.load_parts", lambda *parts: pytest.fail("models were loaded"))
    monkeypatch.setattr("emma_core.evaluation.runs.Drawer", lambda *parts: pytest.fail("models were loaded"))
    monkeypatch.setattr("emma_core.evaluation.runs.scorer_names", lambda config: [])
    (tmp_path / "prompts.txt").write_text("a cat")
    given = [*SMALL, "--data.folder", str(pictures)] if command == "train" else [
        "--references.folder", str(pictures), "--prompts.file", str(tmp_path / "prompts.txt"), "--device", "cpu",
        "--scores.dino_model", "any", "--scores.dino_file", "any"]
    assert main([command, *given, "--output.folder", str(tmp_path / folder)]) == 1
    message = capsys.readouterr().err
    assert "output.folder = " in message and found in message and len(message.splitlines()) == 1


def test_a_folder_without_permission_is_refused(tmp_path, capsys, monkeypatch, pictures):  # noqa: F811
    def refuse(*where, **how):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("emma_core.files.writing.tempfile.TemporaryFile", refuse)
    assert main(["train", *SMALL, "--data.folder", str(pictures), "--output.folder", str(tmp_path)]) == 1
    assert "cannot be written: there is no permission. Give permission, or name another place" in capsys.readouterr().err
