"""Texts of unequal lengths in one CONDITIONING: padded for the host's nodes, with their lengths beside.

Shapes: F texts, N tokens of the longest, D text width.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..emma_core.errors import ConnectorMismatchError

LENGTHS = "emma_text_lengths"


def padded_texts(texts_1ND: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Texts (1, N, D) of any lengths as one (F, N, D) with zeros behind, and what its options must hold."""
    lengths = tuple(text_1ND.shape[1] for text_1ND in texts_1ND)
    padded_FND = torch.cat([torch.nn.functional.pad(text_1ND, (0, 0, 0, max(lengths) - text_1ND.shape[1]))
                            for text_1ND in texts_1ND])
    return padded_FND, {LENGTHS: lengths} if len(lengths) > 1 else {}


def text_rows(text_FND: torch.Tensor, lengths: Sequence[int] | None) -> list[torch.Tensor]:
    """The texts (1, N, D) of a conditioning, each at its own length.

    What nodes between did to all tokens (Average, Zero Out) is kept: with zeros behind they do to each text what they
    do to it alone.

    Raises:
        ConnectorMismatchError: a node between added tokens or texts.
    """
    if lengths is None:
        return list(text_FND.split(1)) if text_FND.ndim == 3 else [text_FND]
    if text_FND.shape[:2] != (len(lengths), max(lengths)):
        raise ConnectorMismatchError(
            f"a prompt list of {len(lengths)} texts with up to {max(lengths)} tokens was changed to shape "
            f"{tuple(text_FND.shape)} (by Conditioning Concat or a similar node). Write what shall be added into the prefix or "
            "suffix of Encode Prompt List, or encode it as an entry of its own and combine them."
        )
    # cloned, as matrix products may round by where their numbers lie in memory
    return [text_FND[row:row + 1, :length].clone() for row, length in enumerate(lengths)]
