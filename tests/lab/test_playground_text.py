"""The playground's captions and tokenizer."""

import random

import pytest
import torch

from lab.emoji.dataset import EmojiPicture
from lab.playground.text import EOS, PAD, UNK, by_length, captions_of, train_tokenizer, wordings, wordings_of_category

CAPTIONS = [f"{gender} {role}" for gender in ("man", "woman") for role in ("cook", "astronaut", "with red hair", "judge")]


def row(gender: str, role: str) -> EmojiPicture:
    return EmojiPicture("0", f"{gender} {role}".strip(), role, gender, "light", "noto", "", "", "train")


@pytest.fixture(scope="module")
def tokenizer():
    rows = [row(*caption.split(" ", 1)) for caption in CAPTIONS]
    return train_tokenizer(text for one in rows for text in wordings(one))


def test_special_tokens_have_t5s_numbers(tokenizer):
    assert [tokenizer.token_to_id(token) for token in (PAD, EOS, UNK)] == [0, 1, 2]


@pytest.mark.parametrize("text", [*CAPTIONS, "a picture of a man cook", "zebra, 7 quartz jokers"])
def test_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert 2 not in ids
    assert tokenizer.decode(ids) == text


def test_case_does_not_matter(tokenizer):
    assert tokenizer.encode("Man COOK").ids == tokenizer.encode("man cook").ids


def test_known_words_are_short_and_unknown_ones_become_pieces(tokenizer):
    assert len(tokenizer.encode("astronaut").ids) <= 2
    assert len(tokenizer.encode("zyxwvuts").ids) > 4


def test_an_unknown_character_is_the_unknown_token(tokenizer):
    assert 2 in tokenizer.encode("man 👩").ids


def test_wordings_keep_gender_and_role_and_turn_only_plain_roles():
    assert {"man cook", "cook, man", "an emoji of a cook man"} <= set(wordings(row("man", "cook")))
    for text in wordings(row("woman", "with red hair")):
        assert "woman with red hair" in text


def test_captions_are_empty_or_no_more_than_the_category_as_often_as_asked():
    chance = random.Random(0)
    captions = [captions_of(row("man", "cook"), 0.3, 0.2, chance) for _ in range(2000)]
    assert 0.26 < captions.count([""]) / 2000 < 0.34
    assert 0.17 < captions.count(wordings_of_category()) / 2000 < 0.23


def test_rows_are_grouped_by_length_without_padding():
    ids = [[5, 1], [6, 7, 1], [8, 1], [1]]
    groups = {tokens.shape[1]: (rows.tolist(), tokens.tolist()) for rows, tokens in by_length(ids)}
    assert groups == {2: ([0, 2], [[5, 1], [8, 1]]), 3: ([1], [[6, 7, 1]]), 1: ([3], [[1]])}
    assert all(rows.dtype == torch.int64 for rows, _ in by_length(ids))
