"""What the trainings draw from, on their device: pictures, latents, and several captions of each picture as tokens.

Shapes: N pictures of the data set, B rows of a batch, K captions of a picture of L tokens, S pixels of a side.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from .captions import captions_of
from .clip import token_ids
from .concepts import EVERYDAY
from .dataset import Pictures, Row

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CAPTIONS = 24
EVERYDAY_WEIGHT, TONES_WEIGHT = 3.0, 2.0
# Styles are not alike on the web either: words alone then mean the commonest one, and not a mixture of ten.
_STYLE_WEIGHTS = {"noto": 4.0, "twemoji": 2.0, "3d": 2.0, "flat": 2.0}
_AT_ONCE = 4096


def caption_tokens(data: Pictures, tokenizer: Tokenizer, path: Path) -> torch.Tensor:
    """(N, K, L) int16: captions of every picture, drawn once, from `path` if they lie there already."""
    if not path.exists():
        chance = random.Random(0)
        texts = [captions_of(row, chance) for row in data.rows for _ in range(CAPTIONS)]
        parts = [token_ids(tokenizer, texts[start:start + _AT_ONCE]).short() for start in range(0, len(texts), _AT_ONCE)]
        save_file({"captions": torch.cat(parts).unflatten(0, (-1, CAPTIONS)).contiguous()}, path)
    return load_file(path)["captions"]


def drawing_weights(rows: list[Row]) -> list[float]:
    """How often each picture is drawn: everyday things, roles, what has tones and some styles more; else all concepts alike."""
    pictures: Counter[str] = Counter()
    for row in rows:
        pictures[row.concept] += _STYLE_WEIGHTS.get(row.style, 1.0)
    toned = {row.concept for row in rows if row.tone}

    def weight(row: Row) -> float:
        is_everyday = row.concept in EVERYDAY or row.subcategory == "person-role"
        of_concept = (EVERYDAY_WEIGHT if is_everyday else 1.0) * (TONES_WEIGHT if row.concept in toned else 1.0)
        return of_concept * _STYLE_WEIGHTS.get(row.style, 1.0) / pictures[row.concept]

    return [weight(row) for row in rows]


class Feed:
    """Draws positions of the data set, by weight, and what belongs to them.

    Args:
        positions: what may be drawn.
        weights: of each of these; None: alike.
    """

    def __init__(self, data: Pictures, positions: list[int], weights: list[float] | None, device: str):
        self._positions_P = torch.tensor(positions, device=device)
        self._weights_P = torch.tensor(weights or [1.0] * len(positions), dtype=torch.float64, device=device)
        self._small_N3SS = torch.from_numpy(data.small_N3SS)
        if device != "cpu":  # the CPU reads them from the file
            self._small_N3SS = self._small_N3SS.to(device)

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(B,)"""
        picked_B = torch.multinomial(self._weights_P, count, replacement=True, generator=generator)
        return self._positions_P[picked_B]

    def small(self, position_B: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1]."""
        return self._small_N3SS[position_B].float() / 127.5 - 1


def one_caption(captions_NKL: torch.Tensor, position_B: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B, L) one of each picture's captions."""
    which_B = torch.randint(captions_NKL.shape[1], position_B.shape, generator=generator, device=position_B.device)
    return captions_NKL[position_B, which_B].long()
