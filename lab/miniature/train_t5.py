"""`python -m lab.miniature.train_t5 --data DIR --state FILE`: a small T5 encoder from text alone, by filling in what is masked.

Like the T5 that ELLA reads it has never seen a picture: what words look like, the connector must learn.

Shapes: M sentences, B rows of N tokens.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from lab.playground.text import EOS, PAD, UNK, make_t5, train_tokenizer

from .captions import sentences_of
from .dataset import Pictures, load
from .timed import TimedRun, add_run_arguments, begin, load_averaged, read_state

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY, LONGEST, SENTENCES = 2048, 32, 10
BATCH, RATE, MASKED_SHARE = 128, 2e-3, 0.2


class Denoiser(nn.Module):
    """T5's encoder, and the guess of each token by its own embeddings."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.t5 = make_t5(vocabulary)

    def forward(self, ids_BN: torch.Tensor, is_text_BN: torch.Tensor) -> torch.Tensor:
        """Scores (B, N, vocabulary)."""
        hidden_BND = self.t5(input_ids=ids_BN, attention_mask=is_text_BN.long()).last_hidden_state
        return hidden_BND @ self.t5.shared.weight.T / self.t5.config.d_model ** 0.5


def saved_or_new_tokenizer(path: Path, data: Pictures) -> Tokenizer:
    """A resumed run must keep its tokenizer: trained again, it might differ."""
    from tokenizers import Tokenizer

    if not path.exists():
        chance = random.Random(0)
        texts = [sentences_of(row, chance) for row in data.rows for _ in range(2)]
        train_tokenizer([*texts, *(name for row in data.rows for name in row.names)], VOCABULARY).save(str(path))
    return Tokenizer.from_file(str(path))


def sentence_tokens(data: Pictures, tokenizer: Tokenizer) -> torch.Tensor:
    """(M, N), padded."""
    chance = random.Random(1)
    texts = [sentences_of(row, chance) for row in data.rows for _ in range(SENTENCES)]
    pad, eos = tokenizer.token_to_id(PAD), tokenizer.token_to_id(EOS)
    rows = [[*encoding.ids[:LONGEST - 1], eos] for encoding in tokenizer.encode_batch(texts)]
    return torch.tensor([row + [pad] * (LONGEST - len(row)) for row in rows], dtype=torch.int16)


def train(options: argparse.Namespace) -> None:
    begin(options)
    data, device = load(options.data), options.device
    tokenizer = saved_or_new_tokenizer(options.state.with_suffix(".tokenizer.json"), data)
    ids_MN = sentence_tokens(data, tokenizer).to(device)
    pad, unknown = tokenizer.token_to_id(PAD), tokenizer.token_to_id(UNK)
    model = Denoiser(tokenizer.get_vocab_size()).to(device)
    run = TimedRun(model, options, RATE, about={"vocabulary": tokenizer.get_vocab_size()})

    def loss_of_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        picked_B = torch.randint(len(ids_MN), (options.batch,), generator=generator, device=device)
        ids_BN = ids_MN[picked_B].long()
        is_text_BN = ids_BN != pad
        hidden_BN = is_text_BN & (torch.rand(ids_BN.shape, generator=generator, device=device) < MASKED_SHARE)
        with torch.autocast(device, torch.bfloat16):
            scores_BNV = model(torch.where(hidden_BN, unknown, ids_BN), is_text_BN)
        loss_BN = F.cross_entropy(scores_BNV.float().transpose(1, 2), ids_BN, reduction="none")
        return {"loss": (loss_BN * hidden_BN).sum() / hidden_BN.sum().clamp_min(1)}

    run.run(loss_of_batch)


def load_t5(state: Path):
    """The averaged encoder, frozen."""
    return load_averaged(Denoiser(read_state(state)["about"]["vocabulary"]), state).t5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, minutes=4)
    parser.add_argument("--batch", type=int, default=BATCH)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
