"""What commands print, wherever it goes: pipes and terminals that know few letters, values of strangers' files, full disks."""

import io
import json
import os
import zipfile

import pytest
import torch
from small_models import small_module
from training_world import tiny_config, tiny_trainer

from emma_core import save_module
from emma_core.__main__ import main
from emma_core.commands import generate as command
from emma_core.errors import TrainingError, WriteError
from emma_core.files.picture_file import open_picture
from emma_core.files.reference_file import save_reference
from emma_core.model.reference_features import ReferenceFeatures
from emma_core.training.checkpoints import checkpoints, load_checkpoint


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_names_that_the_output_cannot_show_are_escaped(tmp_path, monkeypatch, encoding):
    """Letters of other alphabets, and names that are no UTF-8, which Python keeps as halves of surrogate pairs."""
    shown, told = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setattr("sys.stderr", told)
    monkeypatch.setattr(command, "draw", lambda options: [tmp_path / "\u5b57-\udcff.png"])
    assert main(["generate", "\u5b57"]) == 0
    assert main(["generate", "\u5b57", "--module", "\u5b57\udcff", "x"]) == 0
    monkeypatch.undo()
    monkeypatch.setattr("sys.stderr", told)
    assert main(["inspect", str(tmp_path / "\u5b57\udcff.safetensors")]) == 1
    for stream, words in ((shown, "-\\udcff.png"), (told, "\\udcff.safetensors does not exist")):
        stream.flush()
        assert words in stream.buffer.getvalue().decode(encoding)


def test_a_log_in_a_file_holds_each_line_as_soon_as_it_is_said(tmp_path, monkeypatch):
    """Python keeps back what goes into a file, up to 8 KB: hours of a run."""
    log = tmp_path / "run.log"
    found = []
    monkeypatch.setattr(command, "draw", lambda options: (print("begun"), found.append(log.read_text()))[:0])
    with log.open("w", encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert main(["generate", "man cook"]) == 0
        monkeypatch.undo()
    assert found == ["begun\n"]


def test_a_strangers_metadata_moves_no_cursor_and_forges_no_line(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    module = small_module()
    module.config = module.config.replace(training={"data": "\x1b[2J", "k\x1b]0;x\x07": 1}, encoder={"family": "a\x1b[1m"})
    save_module(module, path, metadata={"modelspec.title": "\x1b]0;owned\x07title\n  global gates block 9: A +1.000",
                                        "modelspec.description": "\u202e" + "long " * 10_000})
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(text) and "\\x1b]0;owned\\x07title\\n" in text
    assert not [line for line in text.splitlines() if line.startswith("  global gates block 9")] and len(text) < 5000


def test_a_message_of_a_picture_names_no_stream():
    with pytest.raises(Exception, match="cannot identify it as a picture of a known kind") as found:
        open_picture(io.BytesIO(b"no picture"))
    assert "BytesIO" not in str(found.value)


@pytest.mark.skipif(os.name == "nt", reason="limits of a process are Unix's")
def test_a_full_disk_is_told_for_modules_and_references_and_leaves_nothing(tmp_path):
    """safetensors and Pillow hide the system's reason."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    features = ReferenceFeatures({"global": torch.zeros(1, 1, 30_000)}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(WriteError, match="a.safetensors cannot be written: File too large"):
            save_module(small_module(), tmp_path / "a.safetensors")
        with pytest.raises(WriteError, match="b.safetensors cannot be written: File too large"):
            save_reference(features, tmp_path / "b.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_would_unfold_is_refused_before_it_is_unpacked(tmp_path):
    """A thousand times its size: 100 MB of zeros in 100 kB, with or without a sum at its end."""
    tiny_trainer(tmp_path, tiny_config(train__steps=1)).run()
    path = checkpoints(tmp_path)[-1]
    with zipfile.ZipFile(path) as archive:
        files = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content + (b"\0" * 100_000_000 if name.endswith("data/0") else b""))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(TrainingError, match="checkpoint-00000001.pt cannot be read .*is compressed.* Remove it: there is no"):
        load_checkpoint(path)


@pytest.mark.parametrize("pickled", [b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", b"cos\nsystem\n(S'exit'\ntR."])
def test_a_checkpoint_that_names_other_things_than_tensors_is_refused(tmp_path, pickled):
    """torch's own reading of weights alone lets the first fill 2 GB."""
    path = tmp_path / "checkpoint-00000001.pt"
    torch.save({"step": 1}, path)
    with zipfile.ZipFile(path) as archive:
        files = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files:
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)
    with pytest.raises(TrainingError, match="cannot be read .*could run code"):
        load_checkpoint(path)


def test_a_run_whose_log_was_damaged_goes_on_drawing_its_curve(tmp_path):
    from emma_core.training.log import Log
    from emma_core.training.reports import draw_loss_curve

    whole = {"step": 1, "buckets": [0.5, None, 0.25, 0.125, 0.5]}
    odd = [{**whole, "step": value} for value in (None, "1", -1, 0, True, 10**30)]
    odd += [{**whole, "buckets": value} for value in ("x", [1], [[]] * 5, [-1.0] * 5, {"a": 1}, [True] * 5)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [whole, *odd, {**whole, "step": 2}])))
    clean = draw_loss_curve([whole, {**whole, "step": 2}])
    assert draw_loss_curve(Log(tmp_path / "log.jsonl").read()).tobytes() == clean.tobytes()
