"""The first world's reference encoder: a small CNN, trained on emoji people, in the role of CLIP and AdaFace.

Shapes: B pictures, S the encoder's input size, C channels, N feature vectors.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..errors import EncoderFileError
from ..files.tensor_file import check_finite, check_shapes, read_weights, sha256_of_tensors
from .base import PictureEncoder, ReferenceEncoder
from .options import EncodeOptions
from .pictures import Preparation
from .weights import Shapes, weights_path

FAMILY = "playground"
INPUT_SIZE_PX = 64
GLOBAL_DIM, LOCAL_DIM, FACE_DIM = 256, 128, 128
_WIDTHS = (48, 96, 160, 256)  # at 32, 16, 8 and 4 pixels
_GROUPS = 8
_HALF = (0.5, 0.5, 0.5)  # mean and deviation: [0, 1] -> [-1, 1]
_WHAT = "the playground's reference encoder"


class _Stage(nn.Module):
    """Halves the resolution, then one residual block."""

    def __init__(self, inputs: int, width: int, operations: ModuleType | type, dtype, device):
        super().__init__()
        placement = {"dtype": dtype, "device": device}
        self.down = operations.Conv2d(inputs, width, 3, stride=2, padding=1, **placement)
        self.norm_1 = operations.GroupNorm(_GROUPS, width, **placement)
        self.conv_1 = operations.Conv2d(width, width, 3, padding=1, **placement)
        self.norm_2 = operations.GroupNorm(_GROUPS, width, **placement)
        self.conv_2 = operations.Conv2d(width, width, 3, padding=1, **placement)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x_BCHW = self.down(x_BCHW)
        residual = self.conv_1(F.relu(self.norm_1(x_BCHW)))
        return x_BCHW + self.conv_2(F.relu(self.norm_2(residual)))


class PlaygroundEncoder(nn.Module):
    """Picture -> global (B, 1, 256), local (B, 16, 128) and face (B, 1, 128) features, each vector normalised.

    `global` knows who drew the picture, in which tone, and what it shows; `face` was trained to tell the skin tone
    whoever drew it. `fingerprint` names the weights: features of one encoder are useless to modules of another.
    """

    def __init__(self, operations: ModuleType | type = nn, dtype=None, device=None):
        super().__init__()
        placement = {"dtype": dtype, "device": device}
        inputs = (3, *_WIDTHS[:-1])
        self.stages = nn.Sequential(
            *(_Stage(i, width, operations, dtype, device) for i, width in zip(inputs, _WIDTHS, strict=True))
        )
        self.norm = operations.GroupNorm(_GROUPS, _WIDTHS[-1], **placement)
        self.global_out = operations.Linear(_WIDTHS[-1], GLOBAL_DIM, **placement)
        self.local_out = operations.Linear(_WIDTHS[-1], LOCAL_DIM, **placement)
        self.face_out = operations.Linear(_WIDTHS[-1], FACE_DIM, **placement)
        self.fingerprint = ""

    def forward(self, seen_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures of the input size in [-1, 1] -> features."""
        map_BCHW = F.relu(self.norm(self.stages(seen_B3SS)))
        cells_BNC = rearrange(map_BCHW, "b c h w -> b (h w) c")
        mean_B1C = cells_BNC.mean(1, keepdim=True)
        return {
            "global": _normalised(self.global_out(mean_B1C)),
            "local": _normalised(self.local_out(cells_BNC)),
            "face": _normalised(self.face_out(mean_B1C)),
        }


class PlaygroundReferenceEncoder(PictureEncoder):
    """The playground's encoder for pictures of any size: padded to a square, the background white."""

    feature_names = ("global", "local", "face")
    bytes_per_picture = 8 << 20

    def __init__(self, model: PlaygroundEncoder):
        self.model = model
        self.description = {"family": FAMILY, "fingerprint": model.fingerprint, "input_size": INPUT_SIZE_PX}
        self.preparation = Preparation(INPUT_SIZE_PX, _HALF, _HALF, "bilinear", "pad", "white")

    def features_of(self, seen_B3SS: torch.Tensor, options: EncodeOptions) -> dict[str, torch.Tensor]:
        return self.model(self.preparation.normalise(seen_B3SS).to(self.model.global_out.weight))


def load_playground_encoder(
    path: str | Path, dtype=None, device=None, operations: ModuleType | type = nn
) -> PlaygroundReferenceEncoder:
    """Loads strictly; the fingerprint is the SHA-256 over the file's weights.

    Raises:
        EncoderFileError: not such a file; missing, extra, misshapen or non-finite weights.
    """
    name = Path(path).name
    tensors = read_weights(path, _WHAT, EncoderFileError)
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in PlaygroundEncoder().state_dict().items()}
    check_shapes(tensors, shapes, name, _WHAT, EncoderFileError)
    check_finite(tensors, name, EncoderFileError)
    encoder = PlaygroundEncoder(operations, dtype or torch.float32, device)
    encoder.load_state_dict(tensors)
    encoder.fingerprint = sha256_of_tensors(tensors)
    return PlaygroundReferenceEncoder(encoder.eval().requires_grad_(False))


def _normalised(x_BNC: torch.Tensor) -> torch.Tensor:
    """Each vector of root mean square 1."""
    return F.normalize(x_BNC, dim=-1) * x_BNC.shape[-1] ** 0.5


def recognises(shapes: Shapes) -> bool:
    """See `EncoderKind`."""
    return any(key.removeprefix("module.").removeprefix("model.") == "stages.0.down.weight" for key in shapes)


def load(path: Path, open_clip_model: str | None) -> ReferenceEncoder:
    """See `EncoderKind`."""
    return load_playground_encoder(weights_path(path))
