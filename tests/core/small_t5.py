"""T5 encoders small enough to be made on the spot, in every kind of file, and transformers' answer for them."""

import json
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import T5Config, T5EncoderModel, T5Model

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "on", "the", "blue", "sofa"]
PROMPT = "a red cat on the blue sofa"
PROMPT_IDS = [3, 4, 5, 6, 7, 8, 9, 1]
SIZES: dict[str, Any] = {"vocab_size": 12, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2}


def random_t5():
    """The tensors of a whole random T5 v1.1, decoder included."""
    generator = torch.Generator().manual_seed(0)
    model = T5Model(T5Config(**SIZES, feed_forward_proj="gated-gelu"))
    state = {}
    for key, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if key.endswith("layer_norm.weight"):
            state[key] = 1 + 0.2 * noise
        elif not key.endswith("embed_tokens.weight"):
            state[key] = (0.15 if key.endswith(("q.weight", "k.weight")) else 0.4) * noise
    return state


def random_t5_encoder():
    """The same without the decoder."""
    return {key: value for key, value in random_t5().items() if not key.startswith("decoder.")}


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
