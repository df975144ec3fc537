"""Macs put a file `._x` beside each `x` of a foreign disk; nothing that looks into a folder takes it for one of x's kind."""

import pytest
from PIL import Image

from emma_core.encoders.weights import weights_path
from emma_core.errors import FileError
from emma_core.evaluation.config import ReferencesConfig
from emma_core.evaluation.plan import sha256_of
from emma_core.evaluation.references import references_in
from emma_core.text.t5_file import _files_of
from emma_core.training.lora_teacher import lora_files


@pytest.fixture
def copied(tmp_path):
    """A folder with one file of weights and its Mac's note."""
    for name in ("own.safetensors", "._own.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_folder_of_one_encoder_is_one(copied):
    assert weights_path(copied) == copied / "own.safetensors"
    (copied / "own.safetensors").unlink()
    with pytest.raises(FileError, match="holds 0 weight files"):
        weights_path(copied)


def test_a_folder_of_t5_shards_is_whole(tmp_path):
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in (*names, *(f"._{name}" for name in names)):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in _files_of(tmp_path)] == names


def test_a_teacher_has_no_hidden_groups(copied):
    assert list(lora_files(copied)) == ["own"]


def test_an_evaluation_reads_no_hidden_pictures(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    (tmp_path / "._1.png").write_bytes(b"x")
    assert [reference.path.name for reference in references_in(ReferencesConfig(folder=str(tmp_path)))] == ["1.png"]


def test_the_digest_of_a_folder_is_that_of_its_files(copied):
    before = sha256_of(copied)
    (copied / "._own.safetensors").unlink()
    assert sha256_of(copied) == before
