"""A tiny CLIP in transformers' layout: tokenizer, text tower (which the UNet reads), vision tower with projection.

Shapes: B rows, N tokens of width D, P the width both towers project to, S pixels of a side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from emma_core.encoders.families import MEAN, STD
from emma_core.text.clip_layout import CLIP_L

from ..playground.judge import Judge
from ..weights import save_tensors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT, VOCABULARY, TEXT_WIDTH, PROJECTION = 32, 3072, 128, 128
TEXT_CONFIG = {
    "hidden_size": TEXT_WIDTH, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT, "projection_dim": PROJECTION, "hidden_act": "quick_gelu",
}
VISION_CONFIG = {
    "hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 5, "num_attention_heads": 5,
    "image_size": 64, "patch_size": 8, "projection_dim": PROJECTION, "hidden_act": "quick_gelu",
}
# CLIP's own split into words, numbers one digit at a time, and the rest.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """CLIP's kind of byte-level BPE, learnt from the captions. The two special tokens come last, as in CLIP's vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False))
    tokenizer.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """(B, N) padded with the end token to the context's length, as Stable Diffusion pads; what is longer is cut."""
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    rows = [[start, *encoding.ids[:CONTEXT - 2], end] for encoding in encodings]
    return torch.tensor([row + [end] * (CONTEXT - len(row)) for row in rows])


def trimmed(ids_BN: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Without the columns that are padding in every row: attention is causal, so what is pooled stays the same."""
    longest = (ids_BN != tokenizer.token_to_id(END)).sum(1).max()
    return ids_BN[:, :longest + 1]


class Convolutions(nn.Module):
    """The judge's body in the vision tower's place, while the text tower learns."""

    def __init__(self):
        super().__init__()
        self.judge = Judge({"embeds": PROJECTION})

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(image_embeds=self.judge(pixel_values)["embeds"])


class TinyCLIP(nn.Module):
    """Both towers, and the temperature of the contrast."""

    def __init__(self, tokenizer: Tokenizer, vision: nn.Module | None = None):
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        end = tokenizer.token_to_id(END)
        self.text = CLIPTextModelWithProjection(CLIPTextConfig(
            **TEXT_CONFIG, vocab_size=tokenizer.get_vocab_size(), bos_token_id=tokenizer.token_to_id(START),
            eos_token_id=end, pad_token_id=end, attn_implementation="eager"))
        self.vision = vision or CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION_CONFIG, attn_implementation="eager"))
        self.register_buffer("mean_311", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std_311", torch.tensor(STD)[:, None, None], persistent=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # CLIP's: 1 / 0.07

    def text_features(self, ids_BN: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, P)."""
        return F.normalize(self.text(input_ids=ids_BN).text_embeds.float(), dim=-1)

    def image_embeds(self, image_B3SS: torch.Tensor) -> torch.Tensor:
        """(B, P) of pictures in [-1, 1] of the vision tower's size; it sees them as CLIP's towers do."""
        pixels_B3SS = ((image_B3SS + 1) / 2 - self.mean_311) / self.std_311
        return self.vision(pixel_values=pixels_B3SS).image_embeds

    def image_features(self, image_B3SS: torch.Tensor) -> torch.Tensor:
        """The same as unit vectors."""
        return F.normalize(self.image_embeds(image_B3SS).float(), dim=-1)

    def hidden_states(self, ids_BN: torch.Tensor) -> torch.Tensor:
        """(B, N, D) behind the last layer's norm: what Stable Diffusion 1.5's UNet reads."""
        return self.text(input_ids=ids_BN).last_hidden_state


def save_clip(clip: TinyCLIP, tokenizer: Tokenizer, folder: Path) -> None:
    """The text tower and its tokenizer as a diffusers folder has them; the vision tower in one file."""
    text, tokenizer_folder = folder / CLIP_L.folder, folder / CLIP_L.tokenizer
    for each in (text, tokenizer_folder):
        each.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(tokenizer_folder / "tokenizer.json"))
    (text / "config.json").write_text(clip.text.config.to_json_string(), encoding="utf-8")
    save_tensors(_weights(clip.text), text / "model.safetensors")
    save_tensors(_weights(clip.vision), folder / "clip_vision.safetensors",
                 {"config": json.dumps(clip.vision.config.to_diff_dict())})


def _weights(tower: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tower.state_dict().items() if not key.endswith("position_ids")}
