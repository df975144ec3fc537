"""T5 encoders in every kind of file give the features of transformers' own T5."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small_t5 import (
    PROMPT,
    PROMPT_IDS,
    SIZES,
    WORDS,
    assert_close,
    random_t5,
    random_t5_encoder,
    reference_features,
    save_folder,
    save_sharded,
    save_single,
    save_tokenizer,
)

from emma_core.errors import TextEncoderFileError
from emma_core.text.encoder import load_text_encoder
from emma_core.text.t5_file import open_t5_file


@pytest.fixture(scope="module")
def state():
    return random_t5_encoder()


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


def test_decoder_and_head_are_left_out(tmp_path, state):
    whole = {**random_t5(), "lm_head.weight": torch.randn(12, 32)}
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
    weights = dict(encoder.model.named_parameters())
    assert weights["encoder.block.0.layer.0.SelfAttention.q.weight"].dtype == dtype
    wo = weights["encoder.block.0.layer.1.DenseReluDense.wo.weight"]
    assert (wo.dtype == torch.float32) == (dtype == torch.float16)
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
    with pytest.raises(TextEncoderFileError, match=r"comes without a tokenizer: put .*/t5.tokenizer.json"):
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
    with pytest.raises(TextEncoderFileError, match=r"cannot be read as a tokenizer.json"):
        load_text_encoder(path)


def test_the_same_prompt_twice_runs_the_encoder_once(tmp_path, state):
    encoder = load_text_encoder(save_single(tmp_path, state))
    runs = []
    encoder.model.register_forward_hook(lambda module, inputs, output: runs.append(1))
    first, other, again = encoder.encode([PROMPT, "", PROMPT])
    assert len(runs) == 2 and torch.equal(first, again) and first.shape != other.shape
    again.zero_()  # what a caller does to its features stays its own
    assert torch.equal(encoder.encode([PROMPT])[0], first) and len(runs) == 2
