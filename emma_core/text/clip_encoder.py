"""Texts as the CLIPs of a checkpoint read them, through transformers: tokens for the cross-attention, and a pooled vector.

Shapes: C rows of ids of one text, L their length (77), S = C * L tokens, D width of the tokens of all towers, P of the pooled
vector.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import nn

from ..errors import TextEncoderFileError
from ..files.tensor_file import check_finite, check_shapes
from .clip_layout import WHAT, ClipTower, canonical_names, config_of
from .clip_tokenizer import ClipTokenizer
from .prompt_weights import weighted_parts

_REMEMBERED = 64  # prompts
Parts = tuple[tuple[str, float], ...]  # of a prompt, with their weights


@dataclass(frozen=True, eq=False)
class LoadedTower:
    """A text tower with its weights, and the tokenizer that it was trained with."""

    tower: ClipTower
    model: nn.Module
    tokenizer: ClipTokenizer

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """The linear layers, by the names that transformers has them under in checkpoints."""
        named = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear)}
        return {name if name.startswith("text_") else f"text_model.{name}": layer for name, layer in named.items()}

    def encode(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens (1, S, D of this tower), and the pooled vector (1, P) where the model reads one: of the first row.

        A token of weight w becomes e + w (z - e): z its feature, e the one at its place in an empty prompt.
        """
        rows = self._rows(parts)
        weighted = any(weight != 1.0 for row in rows for _, weight in row)
        hidden_CLD, pooled_CP = self._hidden(rows + self._rows((("", 1.0),)) * weighted)
        if weighted:
            *_, empty_LD = hidden_CLD
            weight_CL1 = torch.tensor([[weight for _, weight in row] for row in rows]).to(hidden_CLD)[..., None]
            plain_CLD = hidden_CLD[:-1]
            hidden_CLD = torch.where(weight_CL1 == 1.0, plain_CLD, empty_LD + weight_CL1 * (plain_CLD - empty_LD))
        return rearrange(hidden_CLD, "c l d -> 1 (c l) d"), None if pooled_CP is None else pooled_CP[:1]

    def _rows(self, parts: Parts) -> list[list[tuple[int, float]]]:
        pad_id = self.tokenizer.end_id if self.tower.pads_with_end else 0
        return self.tokenizer.rows(parts, self.config.max_position_embeddings, pad_id)

    def _hidden(self, rows: Sequence[Sequence[tuple[int, float]]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        ids_CL = torch.tensor([[token_id for token_id, _ in row] for row in rows], device=self.device)
        output = self.model(input_ids=ids_CL, output_hidden_states=True)
        hidden_CLD = output.hidden_states[-2] if self.tower.penultimate else output.last_hidden_state
        return hidden_CLD, output.text_embeds if self.tower.projected else None


class ClipTextEncoder:
    """The text towers of a checkpoint, side by side; the latest prompts are remembered."""

    def __init__(self, towers: Sequence[LoadedTower]):
        self.towers = tuple(towers)
        self.model = nn.ModuleList([one.model for one in towers])
        self._known: OrderedDict[Parts, tuple[torch.Tensor, torch.Tensor | None]] = OrderedDict()

    @property
    def width(self) -> int:
        """D."""
        return sum(one.config.hidden_size for one in self.towers)

    @property
    def pooled_width(self) -> int:
        """P; 0: the model reads no pooled vector."""
        return sum(one.config.projection_dim for one in self.towers if one.tower.projected)

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of all that decides the ids."""
        return " ".join(one.tokenizer.fingerprint for one in self.towers)

    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """Tokens (1, S, D) of each prompt."""
        return [self._encoded(((prompt, 1.0),))[0].clone() for prompt in prompts]

    def encode_weighted(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """As `encode`, with the weights that brackets give as in ComfyUI, see `weighted_parts`.

        Raises:
            TextInputError: a weight that is no finite number.
        """
        return [self._encoded(tuple(weighted_parts(prompt)))[0].clone() for prompt in prompts]

    def pooled(self, prompts: Sequence[str], weighted: bool = False) -> list[torch.Tensor]:
        """The pooled vector (1, P) of each prompt; (1, 0) where the model reads none.

        Args:
            weighted: brackets are no part of the text; their weights change no pooled vector.
        """
        parts = [tuple(weighted_parts(prompt)) if weighted else ((prompt, 1.0),) for prompt in prompts]
        found = [self._encoded(one)[1] for one in parts]
        return [torch.zeros(1, 0) if one is None else one.clone() for one in found]

    def forget(self) -> None:
        """What was remembered: the weights are about to change."""
        self._known.clear()

    @torch.no_grad()
    def _encoded(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor | None]:
        if parts not in self._known:
            found = [one.encode(parts) for one in self.towers]
            tokens_1SD = torch.cat([tokens for tokens, _ in found], dim=-1)
            self._known[parts] = tokens_1SD, next((pooled for _, pooled in found if pooled is not None), None)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(parts)
        return self._known[parts]


def load_tower(
    tower: ClipTower, tensors: Mapping[str, torch.Tensor], tokenizer: ClipTokenizer, name: str, dtype: torch.dtype,
    declared: Mapping[str, Any] | None = None,
) -> LoadedTower:
    """A tower in transformers' implementation, loaded strictly.

    Args:
        tower: which one.
        tensors: its weights in either layout, without prefix.
        tokenizer: that it was trained with.
        name: of the file or folder, for the messages.
        dtype: of the weights.
        declared: config.json of a folder, for what shapes do not tell.
    Raises:
        TextEncoderFileError: missing, unexpected, misshapen or non-finite weights; a tokenizer of another vocabulary.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tensors = canonical_names(tensors, tower.projected)
    sizes = config_of(tensors, tower, name)
    told = {key: declared[key] for key in ("num_attention_heads", "hidden_act") if declared and key in declared}
    if tokenizer.highest_id >= sizes["vocab_size"]:
        raise TextEncoderFileError(f"{tokenizer.name} has ids up to {tokenizer.highest_id}, the {WHAT} of {name} has a "
                                   f"vocabulary of {sizes['vocab_size']}. Use the tokenizer that came with it.")
    config = CLIPTextConfig(**{**sizes, **told}, bos_token_id=tokenizer.start_id, eos_token_id=tokenizer.end_id)
    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if tower.projected else CLIPTextModel)(config)
    _put(model, tensors, name, dtype)
    return LoadedTower(tower, model.eval().requires_grad_(False), tokenizer)


def _put(model: nn.Module, tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype) -> None:
    # transformers 5 has no outer name in a tower without projection
    outer = "text_model." if any(key.startswith("text_model.") for key in model.state_dict()) else ""
    renamed = {f"{outer}{key.removeprefix('text_model.')}" if key.startswith("text_model.") else key: value
               for key, value in tensors.items()}
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    check_shapes(renamed, shapes, name, f"a {WHAT}", TextEncoderFileError)
    check_finite(renamed, name, TextEncoderFileError)
    model.load_state_dict({key: value.to(dtype, copy=True) for key, value in renamed.items()}, strict=True, assign=True)
    embeddings = model.get_submodule(f"{outer}embeddings")
    embeddings.position_ids = torch.arange(embeddings.position_embedding.weight.shape[0])[None]  # no weight, so not in the file
