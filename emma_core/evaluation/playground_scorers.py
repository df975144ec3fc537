"""What judges pictures of the playground where no CLIP and no DINO is named: its own reference encoder.

Shapes: B pictures, D width of a feature, S input size of the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..encoders.base import ReferenceEncoder
from ..encoders.loading import load_encoder
from ..encoders.options import EncodeOptions
from ..files.tensor_file import sha256_of_file
from ..playground import PLAYGROUND_DIR

LOOK, FACE = "look", "face"  # the second is a column of results from before
# column, which is the kind too -> feature of the encoder
FEATURES = {LOOK: "global"}
NOTE = ("*look* is the cosine in the playground's own reference encoder, a small CLIP: it knows who drew a picture, in which "
        "tone, and what it shows. The modules read the same encoder, so this score says whether a module brings over what it "
        "reads, not whether a stranger would see it.")
_ENCODER = PLAYGROUND_DIR / "encoder.safetensors"


class PlaygroundScorer:
    """One feature of the playground's encoder."""

    prompt_column = ""

    def __init__(self, encoder: ReferenceEncoder, column: str):
        self.reference_column = column
        self._encoder = encoder
        self._options = EncodeOptions((FEATURES[column],))

    def to(self, device: torch.device) -> None:
        self._encoder.model.to(device)

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        encoded = []
        for picture in pictures:
            image_1HW3 = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255)[None]
            encoded += self._encoder.encode(image_1HW3, None, self._options)
        vectors_BD = torch.cat([one.features[FEATURES[self.reference_column]].flatten(1) for one in encoded])
        return F.normalize(vectors_BD, dim=-1).cpu()

    def embed_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        raise TypeError("the playground's encoder reads no text")


def playground_scorer_names() -> list[tuple[str, str, str]]:
    """Kind, name and SHA-256 of each, as `scorers.scorer_names`."""
    return [(column, f"playground {feature}", sha256_of_file(_ENCODER)) for column, feature in FEATURES.items()]


def load_playground_scorer(kind: str) -> PlaygroundScorer:
    """One of `playground_scorer_names`, on the CPU."""
    return PlaygroundScorer(load_encoder(_ENCODER), kind)
