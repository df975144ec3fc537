"""PyTorch files (.bin, .ckpt, .pt, .pth) give the tensors that torch.save wrote, in both formats, and nothing else."""

import io
import os
import pickle
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch

from emma_core.errors import EncoderFileError
from emma_core.files.pickle_reading import StoredTensor, read_pickle
from emma_core.files.tensor_file import open_weights, read_weights
from emma_core.files.zip_entries import zip_entries

WHAT = "weights"


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    return OrderedDict(
        plain=base, turned=torch.randn(3, 5).t(), part=base[2:, 1:3], tied=base, half=torch.randn(7).half(),
        brain=torch.randn(2, 2).bfloat16(), double=torch.randn(3).double(), eight=torch.randn(9).to(torch.float8_e4m3fn),
        scalar=torch.tensor(2.5), empty=torch.zeros(0, 3), counter=torch.tensor(7), bytes=torch.arange(5, dtype=torch.uint8),
        parameter=torch.nn.Parameter(torch.randn(2)))


def read(path):
    return read_weights(path, WHAT, EncoderFileError)


def refused(path, match):
    with pytest.raises(EncoderFileError, match=match) as found:
        read(path)
    message = str(found.value)
    assert "weights_only" not in message and "torch.load" not in message and "trust" not in message, message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "old format"])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"epoch": 3, "state_dict": state, "lr": [0.1, None]}],
                         ids=["plain", "checkpoint"])
def test_every_tensor_comes_back_bit_for_bit(tmp_path, archive, wrap):
    torch.save(wrap(tensors()), tmp_path / "a.bin", _use_new_zipfile_serialization=archive)
    found, wanted = read(tmp_path / "a.bin"), tensors()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8) if name == "eight" else found[name],
                           tensor.view(torch.uint8) if name == "eight" else tensor), name


def test_shapes_are_known_before_a_number_is_read(tmp_path):
    torch.save(tensors(), tmp_path / "a.bin")
    with open_weights(tmp_path / "a.bin", WHAT) as file:
        assert file.shapes == {name: tuple(tensor.shape) for name, tensor in tensors().items()}
        assert file.stored["half"].kind == "F16" and file.stored["counter"].kind == "I64"


def test_a_module_with_what_torch_adds_to_its_state(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert all(torch.equal(read(tmp_path / "a.pt")[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("value", "found"), [
    (torch.eye(3).to_sparse(), r"no plain row of numbers \(sparse\)"),
    (torch.eye(3).to_sparse_csr(), r"no plain row of numbers \(sparse\)"),
    (torch.zeros(3, device="meta"), r"no plain row of numbers \(meta\)"),
    (torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.quint8), r"no plain row of numbers \(qtensor\)"),
    (torch.zeros(1).expand(10**9), "more than the 1 numbers that are there"),
])
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_plain_weights_are_refused(tmp_path, value, found):
    torch.save({"a": torch.zeros(2), "w": value}, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", found)


class Canary:
    """What a pickle may ask for: here to write a file."""

    def __init__(self, path, function=os.mkdir):
        self.path, self.function = path, function

    def __reduce__(self):
        return self.function, (str(self.path),)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "old format"])
@pytest.mark.parametrize("wrap", [lambda canary: {"w": torch.zeros(2), "x": canary}, lambda canary: canary,
                                  lambda canary: {"state_dict": {"w": canary}}], ids=["beside", "whole", "inside"])
def test_no_file_runs_code(tmp_path, archive, wrap):
    torch.save(wrap(Canary(tmp_path / "made")), tmp_path / "a.ckpt", _use_new_zipfile_serialization=archive)
    message = refused(tmp_path / "a.ckpt", "names posix.mkdir|names nt.mkdir")
    assert not (tmp_path / "made").exists() and "could run code" in message


def test_functions_that_only_fill_the_memory_are_not_called_either(tmp_path):
    class Bomb:
        def __reduce__(self):
            return bytearray, (10**11,)

    torch.save({"w": torch.zeros(2), "x": Bomb()}, tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", "names (__builtin__|builtins).bytearray")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"w": torch.zeros(64 << 20)}, tmp_path / "a.ckpt")
    with (zipfile.ZipFile(tmp_path / "a.ckpt") as plain,
          zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as small):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    assert (tmp_path / "b.ckpt").stat().st_size < 1 << 20
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "b.ckpt", "is compressed, as PyTorch never writes it")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_tensors_that_lie_upon_each_other_are_refused(tmp_path):
    base = torch.zeros(1000)
    torch.save({f"w{number}": base for number in range(50)}, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", "lie upon each other")


@pytest.mark.parametrize(("content", "found"), [
    ({1: torch.zeros(2)}, "calls a tensor 1, which is no text"), ({"\ud800": torch.zeros(2)}, "which is no text"),
    ([torch.zeros(2)], "holds no weights"), ({"a": 3}, "holds no weights"), ({"state_dict": [1]}, "holds no weights"),
    (torch.zeros(3), "holds no weights"),
    ({"w": torch.zeros(2, dtype=torch.complex64)}, "w is stored as C64, which is not read here"),
])
def test_what_is_no_state_dict_is_refused(tmp_path, content, found):
    torch.save(content, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", found)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "old format"])
def test_truncated_and_damaged_files_are_refused(tmp_path, archive):
    torch.save(tensors(), tmp_path / "a.bin", _use_new_zipfile_serialization=archive)
    whole = (tmp_path / "a.bin").read_bytes()
    for length in range(0, len(whole) - 1, 97):
        (tmp_path / "b.bin").write_bytes(whole[:length])
        refused(tmp_path / "b.bin", "b.bin")
    (tmp_path / "b.bin").write_bytes(pickle.dumps({"a": 1}))
    refused(tmp_path / "b.bin", "not one of PyTorch's")


def test_a_number_of_a_tensor_beyond_the_file_is_refused(tmp_path):
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, stream, _use_new_zipfile_serialization=False)
    content = stream.getvalue()
    count = content.rindex((2).to_bytes(8, "little"))
    (tmp_path / "a.bin").write_bytes(content[:count] + (10**12).to_bytes(8, "little") + content[count + 8:])
    refused(tmp_path / "a.bin", "numbers of its tensors are missing")


def test_deep_tuples_as_keys_do_not_end_the_process():
    deep = b")" + b"\x85" * 400_000  # hashing it would overflow C's stack
    with pytest.raises(ValueError, match="is damaged"):
        read_pickle(b"\x80\x02}" + deep + b"Ns.")


def test_a_long_list_of_instructions_ends_early():
    with pytest.raises(ValueError, match="more than 1,000,000 entries"):
        read_pickle(b"\x80\x02" + b"N" * 3_000_000 + b".")


def test_archives_are_read_as_python_reads_them(tmp_path):
    torch.save(tensors(), tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as archive, open(tmp_path / "a.bin", "rb") as stream:
        entries = zip_entries(stream)
        assert entries.keys() == set(archive.namelist())
        for name, entry in entries.items():
            stream.seek(entry.start)
            assert stream.read(entry.nbytes) == archive.read(name)


def test_a_large_archive_is_read_by_its_long_numbers(tmp_path):
    """More than 65,535 files: the number of files stands in the zip64 record."""
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        for number in range(66_000):
            archive.writestr(f"a/{number}", b"")
    with open(tmp_path / "a.bin", "rb") as stream:
        assert len(zip_entries(stream)) == 66_000


def test_the_description_of_a_tensor_is_what_torch_wrote():
    stream = io.BytesIO()
    torch.save({"w": torch.randn(4, 6)[1:, ::2]}, stream)
    with zipfile.ZipFile(stream) as archive:
        found = read_pickle(archive.read("archive/data.pkl"))["w"]
    assert isinstance(found, StoredTensor)
    assert (found.shape, found.strides, found.offset, found.kind) == ((3, 3), (6, 2), 6, "F32")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in folders")
def test_a_pipe_is_refused_not_waited_for(tmp_path):
    for name in ("a.bin", "a.safetensors"):
        os.mkfifo(tmp_path / name)
        refused(tmp_path / name, "is a named pipe")
