"""The playground's text side: captions in several wordings, a small tokenizer, a small T5 encoder."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ..emoji.dataset import EmojiPicture

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import T5EncoderModel

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
VOCABULARY = 384
T5_CONFIG = {
    "d_model": 128, "d_ff": 256, "d_kv": 32, "num_heads": 4, "num_layers": 2, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
_FRAMES = ("{}", "{}", "{}", "a {}", "{} emoji", "an emoji of a {}", "a picture of a {}")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.:;!?'-()"


CATEGORY = "person"  # what every picture shows, and all that a prompt says where a reference tells the rest


def wordings_of_category() -> list[str]:
    """Ways to say no more than the category."""
    return [frame.format(CATEGORY) for frame in _FRAMES]


def wordings(row: EmojiPicture) -> list[str]:
    """Ways to say a caption; none names style or tone."""
    phrases = [row.caption, row.caption]
    if row.gender and row.role and row.caption == f"{row.gender} {row.role}" and " " not in row.role:
        phrases += [f"{row.role} {row.gender}", f"{row.gender}, {row.role}", f"{row.role}, {row.gender}"]
    return [frame.format(phrase) for phrase in phrases for frame in _FRAMES]


def captions_of(row: EmojiPicture, empty_share: float, category_share: float, chance: random.Random) -> list[str]:
    """Captions to choose from: its wordings; with the given probabilities nothing, or no more than the category."""
    draw = chance.random()
    if draw < empty_share:
        return [""]
    return wordings_of_category() if draw < empty_share + category_share else wordings(row)


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A Unigram tokenizer in T5's manner; single letters stay in it, so an unknown word becomes pieces."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, EOS, UNK], unk_token=UNK, initial_alphabet=list(_LETTERS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_t5(vocabulary: int) -> T5EncoderModel:
    """A fresh encoder in T5 v1.1's layout."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(
        **T5_CONFIG, vocab_size=vocabulary, feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False,
        pad_token_id=0, eos_token_id=1, attn_implementation="eager",
    ))


def t5_metadata(vocabulary: int) -> dict[str, str]:
    """The `t5` entry of the file: sizes, and the tokenizer beside it."""
    return {"t5": json.dumps({**T5_CONFIG, "vocab_size": vocabulary, "tokenizer": "tokenizer.json"})}


def by_length(ids: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(rows (G,), ids (G, N)) of each token count: prompts are never padded, as at inference."""
    groups: dict[int, list[int]] = {}
    for row, one in enumerate(ids):
        groups.setdefault(len(one), []).append(row)
    return [(torch.tensor(rows), torch.tensor([ids[row] for row in rows])) for rows in groups.values()]
