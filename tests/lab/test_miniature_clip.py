"""The tiny CLIP: tokens, padding, both towers in transformers' layout."""

import json

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizerFast

from emma_core.files.tensor_file import read_tensors
from lab.miniature.clip import CONTEXT, END, START, TinyCLIP, save_clip, token_ids, train_tokenizer, trimmed
from lab.miniature.train_clip import contrast

TEXTS = ["a cat", "a woman cook, dark skin, flat style", "house in noto style", "a cup of coffee, 3d style"] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def clip(tokenizer):
    torch.manual_seed(0)
    return TinyCLIP(tokenizer).eval()


def test_prompts_begin_and_end_as_clips_do_and_are_padded_with_the_end(tokenizer):
    ids_BN = token_ids(tokenizer, ["a cat"])
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    assert ids_BN.shape == (1, CONTEXT)
    assert ids_BN[0, 0] == start and ids_BN[0, 3:].eq(end).all()
    assert end == tokenizer.get_vocab_size() - 1  # as in CLIP: the highest number


def test_a_prompt_past_the_context_keeps_its_end(tokenizer):
    ids_BN = token_ids(tokenizer, ["cat " * 100])
    assert ids_BN[0, -1] == tokenizer.token_to_id(END) and ids_BN.shape == (1, CONTEXT)


def test_unknown_words_become_pieces_and_case_is_ignored(tokenizer):
    assert token_ids(tokenizer, ["A CAT"]).equal(token_ids(tokenizer, ["a cat"]))
    assert tokenizer.encode("zebra").ids


def test_transformers_reads_the_tokenizer_alike(tokenizer):
    theirs = CLIPTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END, unk_token=END)
    assert theirs("a woman cook", add_special_tokens=False).input_ids == tokenizer.encode("a woman cook").ids


@torch.no_grad()
def test_padding_is_not_pooled(tokenizer, clip):
    ids_BN = token_ids(tokenizer, ["a cat", "a cup of coffee"])
    short_BN = trimmed(ids_BN, tokenizer)
    assert short_BN.shape[1] < CONTEXT
    torch.testing.assert_close(clip.text_features(ids_BN), clip.text_features(short_BN), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_saved_towers_are_the_same_in_transformers(tokenizer, clip, tmp_path):
    save_clip(clip, tokenizer, tmp_path)
    tensors, metadata = read_tensors(tmp_path / "clip_text.safetensors", "a text tower")
    theirs = CLIPTextModelWithProjection(CLIPTextConfig(**json.loads(metadata["config"]))).eval()
    theirs.load_state_dict(tensors)
    ids_BN = token_ids(tokenizer, ["a cat"])
    torch.testing.assert_close(theirs(input_ids=ids_BN).last_hidden_state, clip.hidden_states(ids_BN), atol=5e-3, rtol=5e-3)


def test_rows_of_the_same_words_are_right_answers_too():
    features_BP = torch.eye(3)
    ids_BN = torch.tensor([[1, 2], [1, 2], [3, 4]])
    text_BP = features_BP[[0, 0, 2]]
    right = contrast(features_BP[[0, 0, 2]], text_BP, ids_BN, torch.tensor(3.0))
    wrong = contrast(features_BP[[2, 0, 0]], text_BP, ids_BN, torch.tensor(3.0))
    assert right < 0.8 < wrong
