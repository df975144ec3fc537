"""The tiny CLIP: tokens, padding, both towers in transformers' layout."""

from dataclasses import replace

import pytest
import torch
from transformers import CLIPTokenizerFast

from emma_core.base.own_text import load_own_text
from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.encoders.clip_vision import load_clip_vision
from emma_core.text.clip_layout import CLIP_L
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
def test_the_saved_text_tower_is_what_a_checkpoints_loader_reads(tokenizer, clip, tmp_path):
    """Of a short prompt, weights in half precision: the tokens that the UNet learns on."""
    save_clip(clip, tokenizer, tmp_path)
    encoder = load_own_text(tmp_path, replace(PLAYGROUND_SPEC, towers=(CLIP_L,)), torch.float32)
    for prompt in ("a cat", "", "a woman cook, dark skin, flat style"):
        wanted_1ND = clip.hidden_states(token_ids(tokenizer, [prompt]))
        torch.testing.assert_close(encoder.encode([prompt])[0], wanted_1ND, atol=5e-3, rtol=5e-3)


@torch.no_grad()
def test_the_saved_vision_tower_is_the_same_in_the_packs_loader(tokenizer, clip, tmp_path):
    save_clip(clip, tokenizer, tmp_path)
    pixels_13SS = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    theirs = load_clip_vision(tmp_path / "clip_vision.safetensors").model(pixel_values=pixels_13SS)
    wanted_1P = clip.vision(pixel_values=pixels_13SS).image_embeds
    torch.testing.assert_close(theirs.image_embeds, wanted_1P, atol=5e-3, rtol=5e-3)


def test_rows_of_the_same_words_are_right_answers_too():
    features_BP = torch.eye(3)
    ids_BN = torch.tensor([[1, 2], [1, 2], [3, 4]])
    text_BP = features_BP[[0, 0, 2]]
    right = contrast(features_BP[[0, 0, 2]], text_BP, ids_BN, torch.tensor(3.0))
    wrong = contrast(features_BP[[2, 0, 0]], text_BP, ids_BN, torch.tensor(3.0))
    assert right < 0.8 < wrong
