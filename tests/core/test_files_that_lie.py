"""Small files that declare much: counts and shapes come from the tensors that are there, before anything is built."""

import json
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import small_connector, small_module
from small_t5 import random_t5_encoder, save_folder, save_sharded, save_single

from emma_core import load_connector, load_module, save_module
from emma_core.errors import EmmaError, FileError
from emma_core.files.connector_file import save_connector
from emma_core.files.diffusers_models import check_config
from emma_core.files.tensor_file import open_tensors, read_tensors
from emma_core.text.encoder import load_text_encoder

MOST_SECONDS, MOST_LETTERS = 5.0, 2500


def write_header(path: Path, header: dict | bytes, data: bytes = b"") -> Path:
    """A safetensors file of this header."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


def refused(load, path, match=".", error=EmmaError) -> str:
    """What the refusal says; it comes soon and is short."""
    started = time.process_time()
    with pytest.raises(error, match=match) as found:
        load(path)
    assert time.process_time() - started < MOST_SECONDS
    message = str(found.value)
    assert len(message) < MOST_LETTERS and "\x1b" not in message
    return message


def module_entry(**changes) -> dict:
    return {"format_version": 1, "condition": "style", "gate_scale": 1.0, "separable_gates": True, "width": 8, "heads": 1,
            "layers": 1, "features": {"global": {"dim": 8}}, **changes}


def tiny_module_file(path: Path, **changes) -> Path:
    only = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return write_header(path, {"__metadata__": {"emma": json.dumps(module_entry(**changes))}, "x": only}, b"\0" * 4)


@pytest.mark.parametrize("changes", [
    {"layers": 10**9}, {"layers": 10**5}, {"layers": 10**19}, {"width": 10**9}, {"width": 2**63, "heads": 2**62},
    {"features": {f"f{number}": {"dim": 8} for number in range(100_000)}},
    {"features": {"global": {"dim": 10**15}}}, {"features": {"global": {"dim": 8, "tokens_per_vector": 10**15}}},
    {"format_version": 2, "source": {"kind": "tokens", "width": 10**12, "inner": 8, "family": "sdxl"},
     "time": {"kind": "ddpm", "last": 999}},
    {"condition": "x" * 10**6}, {"features": {"g" * 10**6: {"dim": 8}}},
], ids=lambda changes: ", ".join(changes))
def test_a_small_module_file_that_declares_much_is_refused_at_once(tmp_path, changes):
    message = refused(load_module, tiny_module_file(tmp_path / "small.safetensors", **changes), error=FileError)
    assert message.startswith("small.safetensors")


@pytest.mark.parametrize("value", [True, "8", 8.0, None, [8], {"a": 1}])
@pytest.mark.parametrize("key", ["width", "heads", "layers"])
def test_sizes_of_another_kind_are_refused(tmp_path, key, value):
    refused(load_module, tiny_module_file(tmp_path / "a.safetensors", **{key: value}), r"wrong kind|lacks")


@pytest.mark.parametrize("encoder", [{"family": ["clip"]}, {"family": {"a": 1}}, {"fingerprint": 7}, {"layer": ["last"]},
                                     {"masked": "no"}, {"input_size": "224"}, {"frame": []}, {"background": 1.5}])
def test_an_encoder_described_by_other_kinds_is_refused(tmp_path, encoder):
    refused(load_module, tiny_module_file(tmp_path / "a.safetensors", encoder=encoder), "wrong kind")


JSON_FAULTS = {
    "deep": "[" * 100_000, "deep objects": '{"a":' * 100_000, "deep and whole": "[" * 100 + "]" * 100,
    "long number": '{"format_version": ' + "9" * 10_000 + "}", "digits": '{"format_version": ' + "9" * 40 + "}",
    "half a character": '{"format_version": 1, "condition": "\\ud800"}', "list": "[1]", "text": '"x"', "null": "null",
    "escapes": '{"format_version": "\\u001b[2J"}', "empty": "", "huge text": json.dumps({"format_version": "x" * 10**6}),
}


READERS = {"emma": load_module, "ella": load_connector, "t5": load_text_encoder}


# a key that a T5 does not know may hold any text
@pytest.mark.parametrize(("key", "fault"), [(key, fault) for key in READERS for fault in JSON_FAULTS
                                            if key != "t5" or fault not in ("escapes", "huge text")])
def test_metadata_of_any_kind_are_refused_in_words(tmp_path, key, fault):
    if key == "ella":
        path = tmp_path / "ella.safetensors"
        save_connector(small_connector(), path)
        save_file(load_file(path), path, {"ella": JSON_FAULTS[fault]})
    elif key == "t5":
        path = save_single(tmp_path, random_t5_encoder(), metadata={"t5": JSON_FAULTS[fault]})
    else:
        path = write_header(tmp_path / "a.safetensors", {"__metadata__": {"emma": JSON_FAULTS[fault]}})
    refused(READERS[key], path, path.name)


@pytest.mark.parametrize(("name", "make", "load"), [
    ("connector.perceiver_blocks.{}.attn_gate", lambda path: save_connector(small_connector(), path), load_connector),
    ("blocks.{}.attn_gate", lambda path: save_module(small_module(), path), load_module),
    ("encoder.block.{}.layer.0.layer_norm.weight", lambda path: save_single(path.parent, random_t5_encoder(), path.name),
     load_text_encoder),
])
@pytest.mark.parametrize("number", ["1000000000", "9" * 5000, "257", "٣"], ids=["10^9", "5000 digits", "257", "other digits"])
def test_the_number_in_a_name_is_not_believed(tmp_path, name, make, load, number):
    path = tmp_path / "a.safetensors"
    make(path)
    with open_tensors(path, "x") as file:
        tensors, metadata = file.tensors(), file.metadata()
    save_file({**tensors, name.format(number): torch.zeros(1)}, path, metadata)
    refused(load, path, "a.safetensors")


def test_names_of_100_kb_and_terminal_escapes_leave_a_short_message(tmp_path):
    path = tmp_path / "a.safetensors"
    for key in ("k" * 100_000, "\x1b]0;x\x07" * 100, "a\nb" * 1000):
        save_file({f"blocks.0.{key}": torch.zeros(1)}, path, {"emma": json.dumps(module_entry())})
        refused(load_module, path, "a.safetensors")
        save_file({f"connector.perceiver_blocks.0.{key}": torch.zeros(1)}, path)
        refused(load_connector, path, "a.safetensors")


@pytest.mark.parametrize("kind", ["I64", "U8", "BOOL", "C64", "F4", "F6_E2M3", "F8_E8M0", "U16", "NONSENSE"])
@pytest.mark.parametrize("load", [load_module, load_connector])
def test_numbers_that_are_no_weights_are_refused(tmp_path, kind, load):
    path = tmp_path / "a.safetensors"
    save_module(small_module(), path) if load is load_module else save_connector(small_connector(), path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + size])
    entry = header["blocks.0.attn_gate" if load is load_module else "time_embedding.linear_1.bias"]
    numbers = {"F4": 8, "F6_E2M3": 1, "I64": 0.5, "C64": 0.5, "U16": 2}.get(kind, 4 if kind[0] in "UBF" else 1)
    entry["dtype"], entry["shape"] = kind, [int(entry["shape"][0] * numbers) or 1]
    refused(load, write_header(path, header, content[8 + size:]), "a.safetensors", FileError)


@pytest.mark.parametrize("shape", [[0, 2**63], [2**62, 0], [1] * 1000, [2**31, 2**31, 0], [2**40, 2**40, 0]])
def test_impossible_shapes_are_refused(tmp_path, shape):
    count = 1
    for side in shape:
        count *= side
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * count]}
    path = write_header(tmp_path / "a.safetensors", {"x": entry}, b"\0" * 4 * count)
    refused(lambda path: read_tensors(path, "weights"), path, "a.safetensors", FileError)


def test_a_header_of_many_names_is_refused_before_it_is_read(tmp_path):
    entries = {f"k{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(150_000)}
    refused(load_connector, write_header(tmp_path / "a.safetensors", entries), "names 150,000 tensors")


@pytest.mark.parametrize("index", [
    {"weight_map": {"a": 3}}, {"weight_map": {"a": ["x"]}}, {"weight_map": {"a": "../x.safetensors"}}, {"weight_map": [1]},
    {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": "x" * 5000}}, {"weight_map": {"a": "nul\0"}}, {"weight_map": {}},
    {"weight_map": None}, {}, [], "x", {"weight_map": {f"k{number}": f"part-{number}" for number in range(5000)}},
])
def test_an_index_of_other_kinds_is_refused(tmp_path, index):
    folder = save_sharded(tmp_path / "t5", random_t5_encoder())
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(load_text_encoder, folder, "t5")


@pytest.mark.parametrize("content", [b"", b"[" * 10**6, b"\xff\xfe", b"nul", b'{"d_model": ' + b"9" * 5000 + b"}", b"\0" * 100])
def test_a_configuration_that_is_no_json_is_refused(tmp_path, content):
    folder = save_folder(tmp_path / "t5", random_t5_encoder())
    (folder / "config.json").write_bytes(content)
    refused(load_text_encoder, folder, "config.json")


@pytest.mark.parametrize("change", [
    lambda state: state.update({"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": torch.zeros(32, 0)}),
    lambda state: state.update({"shared.weight": torch.zeros(5)}),
    lambda state: state.update({"shared.weight": torch.zeros(())}),
    lambda state: state.update({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(0, 32)}),
    lambda state: state.update({"encoder.block.0.layer.1.DenseReluDense.wi_0.weight": torch.zeros(())}),
], ids=["no heads", "vocabulary of one side", "scalar", "no width", "no hidden width"])
def test_a_t5_of_impossible_sizes_is_refused(tmp_path, change):
    state = random_t5_encoder()
    change(state)
    refused(load_text_encoder, save_single(tmp_path, state), "t5.safetensors")


@pytest.mark.parametrize("changes", [
    {"block_out_channels": [32] * 10**6}, {"block_out_channels": [32, 64, 64]}, {"layers_per_block": 10**9},
    {"layers_per_block": 3}, {"layers_per_block": [2, [2, 2, 2, 99]]}, {"cross_attention_dim": 10**9},
    {"sample_size": float("nan")}, {"k" * 100_000: 1}, {"act_fn": "x" * 100_000}, {"x": [["y" * 5000]]},
], ids=lambda changes: str(changes)[:40])
def test_a_configuration_of_a_unet_that_declares_more_than_its_weights_is_refused(changes):
    names = [f"down_blocks.{block}.resnets.{layer}.conv1.weight" for block in range(2) for layer in range(2)]
    sound = {"block_out_channels": [32, 64], "layers_per_block": 2, "cross_attention_dim": 48, "_name_or_path": "/a/b" * 50}
    check_config(sound, names, "config.json", "a UNet")
    refused(lambda config: check_config(config, names, "config.json", "a UNet"), sound | changes, "config.json", FileError)
