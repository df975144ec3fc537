"""T5 encoders in every kind of file give the features of transformers' own T5, and nothing else is taken for one."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import T5Config, T5EncoderModel, T5Model

from emma_core.errors import EmmaError, TextEncoderFileError
from emma_core.t5_file import open_t5_file
from emma_core.t5_layout import check_text_width
from emma_core.text_encoder import load_text_encoder

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "on", "the", "blue", "sofa"]
PROMPT = "a red cat on the blue sofa"
PROMPT_IDS = [3, 4, 5, 6, 7, 8, 9, 1]
SIZES = {"vocab_size": 12, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2}


@pytest.fixture(scope="module")
def full_state():
    """A whole random T5 v1.1, decoder included."""
    generator = torch.Generator().manual_seed(0)
    model = T5Model(T5Config(**SIZES, feed_forward_proj="gated-gelu", decoder_start_token_id=0))
    state = {}
    for key, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if key.endswith("layer_norm.weight"):
            state[key] = 1 + 0.2 * noise
        elif not key.endswith("embed_tokens.weight"):
            state[key] = (0.15 if key.endswith(("q.weight", "k.weight")) else 0.4) * noise
    return state


@pytest.fixture(scope="module")
def state(full_state):
    """The encoder alone."""
    return {key: value for key, value in full_state.items() if not key.startswith("decoder.")}


def reference_features(state, ids, mask=None):
    model = T5EncoderModel(T5Config(**SIZES, feed_forward_proj="gated-gelu")).eval()
    weights = {key: value.float() for key, value in state.items()}
    model.load_state_dict({**weights, "encoder.embed_tokens.weight": weights["shared.weight"]})
    mask = None if mask is None else torch.tensor([mask])
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), attention_mask=mask).last_hidden_state


def save_tokenizer(path, words=WORDS):
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))


def save_single(folder, state, name="t5.safetensors", metadata=None):
    folder.mkdir(exist_ok=True)
    path = folder / name
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata=metadata)
    save_tokenizer(folder / f"{path.stem}.tokenizer.json")
    return path


def save_folder(folder, state, config=None):
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    save_tokenizer(folder / "tokenizer.json")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_sharded(folder, state, index=True):
    folder.mkdir()
    keys = sorted(state)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shards = [keys[::2], keys[1::2]]  # each layer lies in both
    for name, shard in zip(names, shards, strict=True):
        save_file({key: state[key] for key in shard}, folder / name)
    if index:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_tokenizer(folder / "tokenizer.json")
    return folder


def assert_close(found, wanted, tolerance=1e-5):
    assert found.shape == wanted.shape
    assert wanted.abs().max() > 0.5
    assert (found.float() - wanted).abs().max() <= tolerance * wanted.abs().max()


# --- what is read


def test_single_file_equals_transformers(tmp_path, state):
    (features,) = load_text_encoder(save_single(tmp_path, state)).encode([PROMPT])
    assert_close(features, reference_features(state, PROMPT_IDS))


def test_folder_equals_transformers(tmp_path, state):
    folder = save_folder(tmp_path / "flan", state, {**SIZES, "model_type": "t5", "feed_forward_proj": "gated-gelu"})
    assert_close(load_text_encoder(folder).encode([PROMPT])[0], reference_features(state, PROMPT_IDS))


def test_folder_without_config_equals_transformers(tmp_path, state):
    folder = save_folder(tmp_path / "flan", state)
    assert_close(load_text_encoder(folder).encode([PROMPT])[0], reference_features(state, PROMPT_IDS))


@pytest.mark.parametrize("index", [True, False])
def test_sharded_folder_equals_transformers(tmp_path, state, index):
    folder = save_sharded(tmp_path / "flan", state, index)
    assert_close(load_text_encoder(folder).encode([PROMPT])[0], reference_features(state, PROMPT_IDS))


def test_decoder_and_head_are_left_out(tmp_path, full_state, state):
    whole = {**full_state, "lm_head.weight": torch.randn(12, 32)}
    assert len(whole) > len(state) + 1
    (features,) = load_text_encoder(save_single(tmp_path, whole)).encode([PROMPT])
    assert_close(features, reference_features(state, PROMPT_IDS))


@pytest.mark.parametrize("with_shared", [True, False])
def test_embedding_under_its_other_name(tmp_path, state, with_shared):
    renamed = {**state, "encoder.embed_tokens.weight": state["shared.weight"].clone()}
    if not with_shared:
        del renamed["shared.weight"]
    (features,) = load_text_encoder(save_single(tmp_path, renamed)).encode([PROMPT])
    assert_close(features, reference_features(state, PROMPT_IDS))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_reduced_file_equals_transformers_with_its_rounded_weights(tmp_path, state, stored):
    rounded = {key: value.to(stored) for key, value in state.items()}
    encoder = load_text_encoder(save_single(tmp_path, rounded))
    assert next(encoder.model.parameters()).dtype == torch.float32
    assert_close(encoder.encode([PROMPT])[0], reference_features(rounded, PROMPT_IDS))


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("marker", [False, True])
def test_scaled_fp8_equals_transformers_with_its_weights(tmp_path, state, suffix, per_row, marker):
    stored, meant = {}, {}
    for key, value in state.items():
        if ".layer.1.DenseReluDense." not in key and ".SelfAttention.q." not in key:
            stored[key] = meant[key] = value
            continue
        value = value * 1000  # beyond what fp8 holds, and beyond recognition if a scale is forgotten
        scale = value.abs().amax(1, keepdim=True) / 448 if per_row else value.abs().max() / 448
        stored[key] = (value / scale).to(torch.float8_e4m3fn)
        stored[key.replace(".weight", f".{suffix}")] = scale
        stored[key.replace(".weight", ".scale_input")] = torch.tensor(1.0)
        meant[key] = stored[key].float() * scale
    if marker:
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    (features,) = load_text_encoder(save_single(tmp_path, stored)).encode([PROMPT])
    assert_close(features, reference_features(meant, PROMPT_IDS))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision_stays_near(tmp_path, state, dtype, tolerance):
    encoder = load_text_encoder(save_single(tmp_path, state), dtype=dtype)
    block = encoder.model.encoder.block[0]
    assert block.layer[0].SelfAttention.q.weight.dtype == dtype
    assert (block.layer[1].DenseReluDense.wo.weight.dtype == torch.float32) == (dtype == torch.float16)
    (features,) = encoder.encode([PROMPT])
    assert_close(features, reference_features(state, PROMPT_IDS), tolerance)


def test_sizes_are_those_of_the_tensors(tmp_path, state):
    t5_file = open_t5_file(save_single(tmp_path, state))
    assert vars(t5_file.config) == SIZES


def test_weights_stay_when_the_file_is_overwritten(tmp_path, state):
    path = save_single(tmp_path, state)
    encoder = load_text_encoder(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_close(encoder.encode([PROMPT])[0], reference_features(state, PROMPT_IDS))


# --- prompts


def test_prompts_keep_their_lengths(tmp_path, state):
    encoder = load_text_encoder(save_single(tmp_path, state))
    long_prompt = " ".join([PROMPT] * 30)
    features = encoder.encode([PROMPT, "", long_prompt, "a dog"])
    assert [tuple(f.shape) for f in features] == [(1, 8, 32), (1, 1, 32), (1, 211, 32), (1, 3, 32)]
    assert_close(features[1], reference_features(state, [1]))
    assert_close(features[2], reference_features(state, PROMPT_IDS[:-1] * 30 + [1]))
    assert_close(features[3], reference_features(state, [3, 2, 1]))


def test_padded_prompt_equals_transformers(tmp_path, state):
    features = load_text_encoder(save_single(tmp_path, state)).encode_padded(PROMPT)
    wanted = reference_features(state, PROMPT_IDS + [0] * 120, [1] * 8 + [0] * 120)
    assert_close(features, wanted)
    assert features.shape == (1, 128, 32)


def test_padding_does_not_change_the_prompt(tmp_path, state):
    encoder = load_text_encoder(save_single(tmp_path, state))
    assert_close(encoder.encode_padded(PROMPT, 20)[:, :8], encoder.encode([PROMPT])[0])


def test_prompt_longer_than_the_padding_is_refused(tmp_path, state):
    encoder = load_text_encoder(save_single(tmp_path, state))
    with pytest.raises(EmmaError, match="8 tokens, more than 7: encode it at its natural length"):
        encoder.encode_padded(PROMPT, 7)


# --- which tokenizer


def test_tokenizer_named_in_metadata(tmp_path, state):
    path = save_single(tmp_path, state, metadata={"t5": json.dumps({**SIZES, "tokenizer": "tokenizer.json"})})
    (tmp_path / "t5.tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert_close(load_text_encoder(path).encode([PROMPT])[0], reference_features(state, PROMPT_IDS))


def test_tokenizer_of_the_file_wins(tmp_path, state):
    path = save_single(tmp_path, state, metadata={"t5": json.dumps({"tokenizer": "tokenizer.json"})})
    save_tokenizer(tmp_path / "tokenizer.json", [*WORDS[:3], *reversed(WORDS[3:])])
    assert load_text_encoder(path).tokenizer.ids(PROMPT) == PROMPT_IDS


def test_loose_tokenizer_among_many_models_is_not_taken(tmp_path, state):
    path = save_single(tmp_path, state)
    (tmp_path / "t5.tokenizer.json").rename(tmp_path / "tokenizer.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    save_file({"other": torch.zeros(1)}, tmp_path / "clip_l.safetensors")
    with pytest.raises(TextEncoderFileError, match=r"t5.safetensors comes without a tokenizer: put .*/t5.tokenizer.json"):
        load_text_encoder(path)


def test_tokenizer_of_an_own_folder_serves_its_file(tmp_path, state):
    folder = save_folder(tmp_path / "flan", state, {"model_type": "t5"})
    encoder = load_text_encoder(folder / "model.safetensors")
    assert encoder.tokenizer.ids(PROMPT) == PROMPT_IDS


def test_folder_without_tokenizer_says_where_to_put_it(tmp_path, state):
    folder = save_folder(tmp_path / "flan", state)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TextEncoderFileError, match=r"google/flan-t5-xl .* at .*/flan/tokenizer.json"):
        load_text_encoder(folder)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer": "tokenizer.json"}, "needs its own tokenizer tokenizer.json, which is not in"),
        ({"tokenizer": "../secret.json"}, "wanted the plain name of a file beside it"),
    ],
)
def test_tokenizer_that_cannot_be_had(tmp_path, state, metadata, message):
    path = save_single(tmp_path, state, metadata={"t5": json.dumps(metadata)})
    (tmp_path / "t5.tokenizer.json").unlink()
    with pytest.raises(TextEncoderFileError, match=message):
        load_text_encoder(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (WORDS + ["x", "y", "z"], "has ids up to 12, t5.safetensors has a vocabulary of 12"),
        ([word for word in WORDS if word != "</s>"], "has no </s> token"),
        ([word for word in WORDS if word != "<pad>"], "has no <pad> token"),
    ],
)
def test_tokenizer_of_another_model(tmp_path, state, words, message):
    path = save_single(tmp_path, state)
    save_tokenizer(tmp_path / "t5.tokenizer.json", words)
    with pytest.raises(TextEncoderFileError, match=message):
        load_text_encoder(path)


def test_broken_tokenizer(tmp_path, state):
    path = save_single(tmp_path, state)
    (tmp_path / "t5.tokenizer.json").write_text("{")
    with pytest.raises(TextEncoderFileError, match="cannot be read as a tokenizer.json"):
        load_text_encoder(path)


# --- what is refused

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
    "shape": ({f"{FF}/wo/weight": torch.zeros(32, 47)}, r"DenseReluDense.wo.weight has shape \(32, 47\), wanted \(32, 48\)"),
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
    with pytest.raises(TextEncoderFileError, match="values up to 1e.05, more than torch.float16 can hold. .* bf16 or fp32"):
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
        ("[]", "metadata `t5` is not a JSON object"),
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
    with pytest.raises(TextEncoderFileError, match="nowhere.safetensors does not exist"):
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
    with pytest.raises(TextEncoderFileError, match="t5.gguf is a GGUF file"):
        load_text_encoder(tmp_path / "t5.gguf")


def test_one_part_of_a_model_is_refused(tmp_path, state):
    folder = save_sharded(tmp_path / "flan", state)
    with pytest.raises(TextEncoderFileError, match="part 2 of 2 of a model; .* Choose the folder flan"):
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
    with pytest.raises(TextEncoderFileError, match="holds 2 .safetensors files .* Choose the file itself"):
        load_text_encoder(tmp_path)


def test_text_of_another_width_is_named():
    check_text_width(2048, 2048)
    with pytest.raises(TextEncoderFileError, match="t5xxl gives text features of width 4096, .* trained on 2048: load flan-t5-xl"):
        check_text_width(4096, 2048, "t5xxl")
    with pytest.raises(TextEncoderFileError, match="load a T5 of width 128"):
        check_text_width(2048, 128)
