"""What is not a usable T5 v1.1 encoder is refused, with what it is and what to do."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small_t5 import (
    random_t5_encoder,
    save_folder,
    save_sharded,
    save_single,
)

from emma_core.errors import TextEncoderFileError
from emma_core.text import encoder as encoder_file
from emma_core.text.encoder import load_text_encoder


@pytest.fixture(scope="module")
def state():
    return random_t5_encoder()


OTHER_MODELS = {
    "text_model.encoder.layers.0.mlp.fc1.weight": "is a CLIP model",
    "model.layers.0.self_attn.q_proj.weight": "is a decoder-only language model",
    "decoder.block.0.layer.0.SelfAttention.q.weight": "holds only the decoder of a T5",
    "connector.latents": "is an ELLA connector; .* models/ella",
    "blocks.0.attn_gate": "is an EMMA module; .* models/emma",
    "model.diffusion_model.input_blocks.0.0.weight": "is a diffusion checkpoint",
    "banana.weight": "is not a T5: its keys are banana.weight",
}


@pytest.mark.parametrize("key", OTHER_MODELS)
def test_other_models_are_named(tmp_path, key):
    save_file({key: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(TextEncoderFileError, match=f"x.safetensors {OTHER_MODELS[key]}"):
        load_text_encoder(tmp_path / "x.safetensors")


def changed(state, **changes):
    """`state` with keys (``/`` for ``.``) replaced, or removed where None."""
    new = dict(state)
    for key, value in changes.items():
        new.pop(key.replace("/", "."), None)
        if value is not None:
            new[key.replace("/", ".")] = value
    return new


FF, ATTENTION = "encoder/block/1/layer/1/DenseReluDense", "encoder/block/1/layer/0/SelfAttention"
BAD_STATES = {
    "T5 v1.0": ({f"{FF}/wi/weight": torch.zeros(48, 32)}, "is a T5 v1.0 .* Choose flan-t5-xl"),
    "UMT5": ({f"{ATTENTION}/relative_attention_bias/weight": torch.zeros(32, 4)}, "is a UMT5"),
    "missing": ({f"{FF}/wo/weight": None}, r"1 missing keys \(encoder.block.1.layer.1.DenseReluDense.wo.weight\)"),
    "missing layer norm": ({"encoder/final_layer_norm/weight": None}, "missing keys .*encoder.final_layer_norm.weight"),
    "missing sizes": ({"shared/weight": None}, "lacks shared.weight"),
    "unexpected": ({"encoder/block/1/adapter/weight": torch.zeros(1)}, r"1 unexpected keys \(encoder.block.1.adapter"),
    "shape": ({f"{FF}/wo/weight": torch.zeros(32, 47)}, r"wo.weight has shape \(32, 47\), wanted \(32, 48\)"),
    "transposed": ({f"{ATTENTION}/o/weight": torch.zeros(32, 31)}, r"o.weight has shape \(32, 31\), wanted \(32, 32\)"),
    "buckets": (
        {"encoder/block/0/layer/0/SelfAttention/relative_attention_bias/weight": torch.zeros(16, 4)},
        r"relative_attention_bias.weight has shape \(16, 4\), wanted \(32, 4\)",
    ),
    "heads": (
        {"encoder/block/0/layer/0/SelfAttention/relative_attention_bias/weight": torch.zeros(32, 5)},
        "5 attention heads do not divide the attention width 32",
    ),
    "NaN": ({f"{FF}/wo/weight": torch.full((32, 48), torch.nan)}, "wo.weight holds NaN or infinite values"),
    "int8": ({f"{FF}/wo/weight": torch.zeros(32, 48, dtype=torch.int8)}, r"stored as I8 \(a quantised file\)"),
    "scale without weight": ({"encoder/block/7/x/scale_weight": torch.ones(())}, "a scale for .* but not the weight"),
    "block scale": ({f"{FF}/wo/weight_scale": torch.ones(32, 3)}, r"scale of .*wo.weight has shape \(32, 3\)"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_unusable_tensors_are_refused(tmp_path, state, case):
    changes, message = BAD_STATES[case]
    with pytest.raises(TextEncoderFileError, match=message):
        load_text_encoder(save_single(tmp_path, changed(state, **changes)))


def test_weights_beyond_fp16_are_refused_in_fp16_only(tmp_path, state):
    path = save_single(tmp_path, changed(state, **{f"{ATTENTION}/v/weight": torch.full((32, 32), 1e5)}))
    load_text_encoder(path, dtype=torch.bfloat16)
    with pytest.raises(TextEncoderFileError, match=r"up to 1e.05, more than torch.float16 can hold. .* bf16 or fp32"):
        load_text_encoder(path, dtype=torch.float16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_model": 64}, "config.json says d_model = 64, the tensors need 32"),
        ({"feed_forward_proj": "relu"}, "config.json says feed_forward_proj = relu, the tensors need gated-gelu"),
        ({"model_type": "umt5"}, "config.json says model_type = umt5"),
        ({"relative_attention_max_distance": 64}, "relative_attention_max_distance = 64"),
    ],
)
def test_contradicting_config_is_refused(tmp_path, state, config, message):
    with pytest.raises(TextEncoderFileError, match=message):
        load_text_encoder(save_folder(tmp_path / "flan", state, config))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (json.dumps({"num_heads": 8}), "metadata `t5` says num_heads = 8, the tensors need 4"),
        ("{", "metadata `t5` is not JSON"),
        ("[]", "metadata `t5` is a list, wanted a JSON object"),
    ],
)
def test_contradicting_metadata_is_refused(tmp_path, state, metadata, message):
    with pytest.raises(TextEncoderFileError, match=message):
        load_text_encoder(save_single(tmp_path, state, metadata={"t5": metadata}))


def test_config_of_another_model_beside_many_files_is_not_read(tmp_path, state):
    path = save_single(tmp_path, state)
    save_file({"other": torch.zeros(1)}, tmp_path / "clip_l.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 768}))
    assert load_text_encoder(path).width == 32


def test_missing_file(tmp_path):
    with pytest.raises(TextEncoderFileError, match=r"nowhere.safetensors does not exist"):
        load_text_encoder(tmp_path / "nowhere.safetensors")


def test_truncated_file(tmp_path, state):
    path = save_single(tmp_path, state)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TextEncoderFileError, match="truncated or damaged"):
        load_text_encoder(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "t5.pt", "t5.ckpt"])
def test_pickle_is_refused_as_file_and_in_a_folder(tmp_path, state, name):
    torch.save(state, tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(TextEncoderFileError, match=f"{name} is a pickled PyTorch file.*flan-t5-xl .* safetensors"):
            load_text_encoder(path)


def test_pickle_under_another_name_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "t5.safetensors")
    with pytest.raises(TextEncoderFileError, match="pickled PyTorch file"):
        load_text_encoder(tmp_path / "t5.safetensors")


def test_gguf_is_refused(tmp_path):
    (tmp_path / "t5.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(TextEncoderFileError, match=r"t5.gguf is a GGUF file"):
        load_text_encoder(tmp_path / "t5.gguf")


def test_one_part_of_a_model_is_refused(tmp_path, state):
    folder = save_sharded(tmp_path / "flan", state)
    with pytest.raises(TextEncoderFileError, match=r"part 2 of 2 of a model; .* Choose the folder flan"):
        load_text_encoder(folder / "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("index", "message"),
    [(True, "lacks model-00002-of-00002.safetensors, which its"), (False, "holds 1 of 2 parts")],
)
def test_incomplete_parts_are_refused(tmp_path, state, index, message):
    folder = save_sharded(tmp_path / "flan", state, index)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(TextEncoderFileError, match=message):
        load_text_encoder(folder)


def test_folder_of_many_models_is_refused(tmp_path, state):
    save_single(tmp_path, state, "a.safetensors")
    save_single(tmp_path, state, "b.safetensors")
    with pytest.raises(TextEncoderFileError, match=r"holds 2 .safetensors files .* Choose the file itself"):
        load_text_encoder(tmp_path)


def test_text_of_another_width_is_refused_before_the_weights_are_read(tmp_path, state, monkeypatch):
    path = save_single(tmp_path, state)
    assert load_text_encoder(path, width=32).width == 32
    monkeypatch.setattr(encoder_file, "load_t5_parts", lambda *parts: pytest.fail("the weights were read"))
    with pytest.raises(TextEncoderFileError, match=rf"{path.name} gives .* width 32, .* trained on 2048. Choose flan-t5-xl"):
        load_text_encoder(path, width=2048)
    with pytest.raises(TextEncoderFileError, match="Choose a T5 of width 128"):
        load_text_encoder(path, width=128)
