"""The text encoder as the host's CLIP: stock nodes give the features of transformers' T5, weights and all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

SIZES: dict[str, Any] = {"vocab_size": 32128, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2}
ROUNDINGS = [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
PROMPT = "an astronaut, holding a big sign that reads hello; watercolour by an unknown hand"
# pad, end and unknown elsewhere than in the standard tokenizer
WORDS = ["a", "red", "cat", "<unk>", "</s>", "<pad>", "blue"]


def random_state(sizes):
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in reference_model(sizes).state_dict().items()}
    state = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if key.endswith("layer_norm.weight"):
            state[key] = 1 + 0.2 * noise
        elif not key.endswith("embed_tokens.weight"):
            state[key] = (0.15 if key.endswith(("q.weight", "k.weight")) else 0.4) * noise
    return state


def reference_model(sizes):
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).eval()


def reference_features(state, ids, mask=None, sizes=SIZES):
    model = reference_model(sizes)
    weights = {key: value.float() for key, value in state.items()}
    model.load_state_dict({**weights, "encoder.embed_tokens.weight": weights["shared.weight"]})
    mask = None if mask is None else torch.tensor([mask])
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), attention_mask=mask).last_hidden_state


def save_words(path):
    """A tokenizer of WORDS."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))


def assert_close(found, wanted, tolerance=1e-4):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.fixture(scope="module")
def state():
    return random_state(SIZES)


@pytest.fixture(scope="module")
def standard_ids(host_path):
    """The host's own T5 tokenizer, as its other T5 models call it."""
    tokenizer = T5TokenizerFast.from_pretrained(host_path / "comfy" / "text_encoders" / "t5_tokenizer")
    return lambda prompt: tokenizer(prompt)["input_ids"]


@pytest.fixture(scope="module")
def t5_path(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("text_encoders") / "flan.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def load(pack_import):
    return pack_import("host.text_encoder").load_text_encoder_clip


@pytest.fixture(scope="module")
def clip(load, t5_path):
    return load(t5_path)


@pytest.fixture(scope="module")
def text_encode(host_nodes):
    """Stock CLIPTextEncode -> its conditioning."""

    def encode(clip, prompt):
        with torch.inference_mode():
            return host_nodes.CLIPTextEncode().encode(clip, prompt)[0]

    return encode


@pytest.fixture(scope="module")
def features(text_encode):
    """Stock CLIPTextEncode -> the features alone."""
    return lambda clip, prompt: text_encode(clip, prompt)[0][0].clone()


@pytest.mark.parametrize("prompt", ["red", PROMPT, "Grüße, 猫 & <odd> 100% \n tokens", " ".join([PROMPT] * 40)])
def test_stock_node_equals_transformers(clip, features, state, standard_ids, prompt):
    ids = standard_ids(prompt)
    assert_close(features(clip, prompt), reference_features(state, ids))


def test_long_prompt_is_neither_cut_nor_padded(clip, features, standard_ids):
    prompt = " ".join([PROMPT] * 40)
    assert features(clip, prompt).shape == (1, len(standard_ids(prompt)), 32)
    assert len(standard_ids(prompt)) > 600


def test_conditioning_is_that_of_a_t5_of_the_host(clip, text_encode):
    conditioning = text_encode(clip, PROMPT)
    assert len(conditioning) == 1
    assert conditioning[0][1] == {"pooled_output": None}


def test_stock_conditioning_nodes_take_it(clip, text_encode, host_nodes):
    first, second = text_encode(clip, PROMPT), text_encode(clip, "a cat")
    length = first[0][0].shape[1] + second[0][0].shape[1]
    assert host_nodes.ConditioningConcat().concat(first, second)[0][0][0].shape[1] == length
    assert len(host_nodes.ConditioningCombine().combine(first, second)[0]) == 2
    assert not host_nodes.ConditioningZeroOut().zero_out(first)[0][0][0].any()
    averaged = host_nodes.ConditioningAverage().addWeighted(second, first, 0.25)[0][0][0]
    assert_close(averaged, 0.25 * second[0][0] + 0.75 * first[0][0][:, : averaged.shape[1]])
    ranged = host_nodes.ConditioningSetTimestepRange().set_range(first, 0.2, 0.8)[0]
    assert ranged[0][1]["start_percent"] == 0.2


def test_prompt_weight_moves_features_away_from_the_empty_prompt(clip, features, state, standard_ids):
    ids = standard_ids("red")
    plain = reference_features(state, ids)
    empty = reference_features(state, [1] + [0] * (len(ids) - 1), [1] + [0] * (len(ids) - 1))
    wanted = empty + 1.3 * (plain - empty)
    wanted[:, -1] = plain[:, -1]  # the end token bears no weight
    weighted = features(clip, "(red:1.3)")
    assert_close(weighted, wanted)
    assert (weighted - plain).abs().max() > 0.05


def test_weight_of_one_changes_nothing(clip, features):
    assert torch.equal(features(clip, "(red:1.0)"), features(clip, "red"))


def test_empty_prompt_at_natural_length(clip, features, state):
    assert_close(features(clip, ""), reference_features(state, [1]))


def test_empty_prompt_padded_to_128(load, t5_path, features, state, standard_ids):
    padded = load(t5_path, empty_prompt="padded to 128")
    wanted = reference_features(state, [1] + [0] * 127, [1] + [0] * 127)
    assert_close(features(padded, ""), wanted)
    assert_close(features(padded.clone(), ""), wanted)
    assert_close(features(padded, PROMPT), reference_features(state, standard_ids(PROMPT)))


def test_own_tokenizer_with_other_special_ids(tmp_path, load, features):
    sizes = {**SIZES, "vocab_size": 8}
    state = random_state(sizes)
    save_file(state, tmp_path / "t5.safetensors", metadata={"t5": json.dumps({**sizes, "tokenizer": "tokenizer.json"})})
    save_words(tmp_path / "tokenizer.json")

    clip = load(tmp_path / "t5.safetensors", empty_prompt="padded to 128")
    assert_close(features(clip, "a red dog"), reference_features(state, [0, 1, 3, 4], sizes=sizes))
    padded = reference_features(state, [4] + [5] * 127, [1] + [0] * 127, sizes)
    assert_close(features(clip, ""), padded)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_reduced_file_equals_transformers_with_rounded_weights(tmp_path, load, features, state, standard_ids, stored):
    rounded = {key: value.to(stored) for key, value in state.items()}
    save_file(rounded, tmp_path / "t5.safetensors")
    clip = load(tmp_path / "t5.safetensors")
    assert clip.cond_stage_model.dtypes == {torch.float32}
    assert_close(features(clip, PROMPT), reference_features(rounded, standard_ids(PROMPT)))


def test_scaled_fp8_file_equals_transformers_with_its_weights(tmp_path, load, features, state, standard_ids):
    stored, meant = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for key, value in state.items():
        stored[key] = meant[key] = value
        if ".DenseReluDense." in key:
            scale = 1000 * value.abs().max() / 448
            stored[key] = (1000 * value / scale).to(torch.float8_e4m3fn)
            stored[key.replace(".weight", ".scale_weight")] = scale
            meant[key] = stored[key].float() * scale
    save_file(stored, tmp_path / "t5.safetensors")
    assert_close(features(load(tmp_path / "t5.safetensors"), PROMPT), reference_features(meant, standard_ids(PROMPT)))


@pytest.mark.parametrize(("dtype", "rounded_to"), ROUNDINGS)
def test_chosen_dtype_rounds_the_weights_only(load, t5_path, features, state, standard_ids, dtype, rounded_to):
    clip = load(t5_path, dtype=dtype)
    weights = list(clip.cond_stage_model.ella_t5.transformer.parameters())
    assert {weight.dtype for weight in weights} == {rounded_to}
    rounded = {key: value.to(rounded_to) for key, value in state.items()}
    assert_close(features(clip, PROMPT), reference_features(rounded, standard_ids(PROMPT)))


def test_memory_management_knows_all_weights(clip, state):
    import comfy.model_management as management

    assert clip.patcher.model_size() == sum(value.numel() * 4 for value in state.values()) + 4  # the host's logit_scale
    assert not any(weight.is_meta or weight.requires_grad for weight in clip.cond_stage_model.parameters())
    clip.load_model()
    assert any(loaded.model is clip.patcher for loaded in management.current_loaded_models)


def test_second_copy_for_hooks_has_the_same_weights(clip, state):
    factory, arguments = clip.patcher.cached_patcher_init
    copy = factory(*arguments).model.state_dict()
    assert copy.keys() == clip.cond_stage_model.state_dict().keys()
    assert all(torch.equal(copy[f"ella_t5.transformer.{key}"], value) for key, value in state.items())


def test_lora_hook_of_a_stock_node_leaves_the_features(clip, features, host_nodes):
    """A hooked CLIP encodes on a schedule of its own; without LoRA weights for a T5, nothing may change."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora={}, strength_model=1.0, strength_clip=1.0)
    set_hooks = host_nodes.NODE_CLASS_MAPPINGS["SetClipHooks"]()
    hooked = set_hooks.apply_hooks(clip, schedule_clip=True, apply_to_conds=False, hooks=hooks)[0]
    assert torch.equal(features(hooked, PROMPT), features(clip, PROMPT))


def test_refusals_reach_the_host(tmp_path, load, pack_import):
    error = pack_import("emma_core.errors").TextEncoderFileError
    with pytest.raises(error, match="does not exist"):
        load(tmp_path / "none.safetensors")
    save_file(random_state({**SIZES, "vocab_size": 40}), tmp_path / "t5.safetensors")
    with pytest.raises(error, match=r"vocabulary of 40, the standard T5 tokenizer needs 32128: put the tokenizer.json"):
        load(tmp_path / "t5.safetensors")


def test_standard_tokenizer_is_the_hosts(pack_import, host_path):
    standard = pack_import("host.text_encoder")._STANDARD_TOKENIZER
    assert Path(standard).is_relative_to(host_path) and Path(standard).is_file()


WEIGHTED = ["a (red:1.3) cat", "(a red) cat", "((a) red:0.5) blue", "a \\(red\\) (cat)", "a) (red (cat", "((red)", "() a",
            "(red:) a",
            "(a (red:1.4) blue:0.7) cat", "(:1.2) a", "(a:1.2:0.5) blue", "( a : 1.5 )", "(a red:-0.5) cat", "(red:0)",
            "a\n(blue)", "a (b:x) (c", "(((a)))", "", "red"]


@pytest.mark.parametrize("prompt", WEIGHTED)
def test_without_comfyui_brackets_weigh_as_the_host_weighs_them(load, features, state, tmp_path, pack_import, prompt):
    """Token by token, and in what comes out."""
    path = tmp_path / "own.safetensors"
    save_file(state, path)
    save_words(tmp_path / "own.tokenizer.json")
    clip, own = load(path), pack_import("emma_core.text.encoder").load_text_encoder(path)
    parts = pack_import("emma_core.text.prompt_weights").weighted_parts(prompt)
    wanted = [pair for [batch] in clip.tokenize(prompt).values() for pair in batch]
    found = [(token, weight) for part, weight in parts for token in own.tokenizer.ids(part)[:-1]]
    assert [token for token, _ in wanted] == [*(token for token, _ in found), own.tokenizer.eos_id]
    assert [weight for _, weight in wanted] == pytest.approx([*(weight for _, weight in found), 1.0])
    assert_close(own.encode_weighted([prompt])[0], features(clip, prompt))


@pytest.mark.parametrize("prompt", ["(man cook:nan)", "a (cook:inf)", "(" * 100 + "a" + ")" * 100])
def test_weights_that_are_none_are_refused_where_they_are_typed(clip, text_encode, pack_import, prompt):
    with pytest.raises(pack_import("emma_core.errors").TextInputError, match="no finite number|more than 64 deep"):
        text_encode(clip, prompt)
