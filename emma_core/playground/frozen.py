"""What a module is trained on: the shipped base, frozen, and the whole data set as latents and reference features.

Shapes: B pictures, N text tokens, K cross-attention tokens of width W, latents 4 x h x w, D dim of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..assembly import Assembly, Reference
from ..connector_file import load_connector
from ..emoji.dataset import EmojiPeople
from ..encoders.options import EncodeOptions
from ..encoders.playground import load_playground_encoder
from ..gated_resampler import GatedResampler
from ..text_encoder import load_text_encoder
from .autoencoder import LATENT_SCALE
from .files import load_autoencoder, load_unet
from .training import to_float
from .unet import PlainAttention

PICTURES_AT_ONCE = 64


class FrozenBase:
    """T5, connector and UNet of a playground folder; nothing of it learns, gradients flow through to the tokens."""

    def __init__(self, folder: Path):
        self.connector = load_connector(folder / "ella.safetensors")
        self.unet: nn.Module = load_unet(folder / "unet.safetensors")
        self.unet.set_attn_processor(PlainAttention())
        self._text_encoder = load_text_encoder(folder / "t5.safetensors")
        self._known_texts: dict[str, torch.Tensor] = {}

    def text(self, prompt: str) -> torch.Tensor:
        """T5 features (1, N, D) of a prompt, computed once."""
        if prompt not in self._known_texts:
            self._known_texts[prompt] = self._text_encoder.encode([prompt])[0]
        return self._known_texts[prompt]

    def text_tokens(self, prompt: str) -> int:
        """N, the number of tokens of a prompt."""
        return self.text(prompt).shape[1]

    def tokens(
        self, prompts: Sequence[str], timestep_B: torch.Tensor, module: GatedResampler,
        features: Mapping[str, torch.Tensor], strength_B: torch.Tensor,
    ) -> torch.Tensor:
        """Cross-attention tokens (B, K, W); rows of strength 0 have no reference.

        Prompts are never padded: rows are grouped by their number of text tokens.
        """
        texts = [self.text(prompt) for prompt in prompts]
        groups: dict[int, list[int]] = {}
        for row, text_1ND in enumerate(texts):
            groups.setdefault(text_1ND.shape[1], []).append(row)
        parts = []
        for group in groups.values():
            rows_G = torch.tensor(group)
            reference = Reference(module, {name: value[rows_G] for name, value in features.items()}, strength_B[rows_G])
            text_GND = torch.cat([texts[row] for row in group])
            parts.append(self.connector.tokens(text_GND, timestep_B[rows_G], Assembly([reference])))
        order_B = torch.tensor([row for group in groups.values() for row in group]).argsort()
        return torch.cat(parts)[order_B]

    def predict_noise(
        self, noised_B4hw: torch.Tensor, timestep_B: torch.Tensor, context_BKW: torch.Tensor
    ) -> torch.Tensor:
        """The UNet's prediction, computed in bfloat16."""
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.unet(noised_B4hw, timestep_B, context_BKW, return_dict=False)[0]
        return predicted.float()


@torch.no_grad()
def latents_of(data: EmojiPeople, folder: Path) -> torch.Tensor:
    """Latents (pictures, 4, h, w) of deviation 1, by the shipped autoencoder."""
    autoencoder = load_autoencoder(folder / "autoencoder.safetensors")
    return torch.cat([autoencoder.encode(chunk) for chunk in _chunks(data)]) * LATENT_SCALE


def features_of(data: EmojiPeople, folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Reference features (pictures, vectors, D) of every picture, and the encoder's description for the metadata."""
    encoder = load_playground_encoder(folder / "encoder.safetensors")
    options = EncodeOptions(encoder.feature_names)
    encoded = [one for chunk in _chunks(data) for one in encoder.encode((chunk.permute(0, 2, 3, 1) + 1) / 2, None, options)]
    features = {name: torch.cat([one.features[name] for one in encoded]) for name in options.features}
    return features, dict(encoder.description)


def _chunks(data: EmojiPeople):
    for start in range(0, len(data.rows), PICTURES_AT_ONCE):
        yield to_float(data.images_NHWC[start:start + PICTURES_AT_ONCE])
