"""The playground's reference encoder: a small CNN, trained on the emoji world, in the role of CLIP and AdaFace.

Shapes: B pictures, H x W their size, S the encoder's input size, C channels, N feature vectors.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import EncoderFileError, ImageInputError
from ..tensor_file import check_finite, check_shapes, read_tensors, sha256_of_tensors

FAMILY = "playground"
INPUT_SIZE_PX = 64
GLOBAL_DIM, LOCAL_DIM, FACE_DIM = 256, 128, 128
LOCAL_VECTORS = 16
_WIDTHS = (48, 96, 160, 256)  # at 32, 16, 8 and 4 pixels
_GROUPS = 8
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

    family = FAMILY
    input_size_px = INPUT_SIZE_PX

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
        cells_BNC = map_BCHW.flatten(2).transpose(1, 2)
        mean_B1C = cells_BNC.mean(1, keepdim=True)
        return {
            "global": _normalised(self.global_out(mean_B1C)),
            "local": _normalised(self.local_out(cells_BNC)),
            "face": _normalised(self.face_out(mean_B1C)),
        }

    @torch.no_grad()
    def encode(
        self, image_BHW3: torch.Tensor, mask_BHW: torch.Tensor | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Pictures in [0, 1] -> (features, what the encoder saw (B, S, S, 3) in [0, 1]).

        Args:
            image_BHW3: RGB pictures of any size; made square with white.
            mask_BHW: 1 where the object is; the rest becomes white. One mask serves all pictures if B is 1.
        Raises:
            ImageInputError: no picture, not RGB, or a mask of another size.
        """
        seen_B3SS = prepare(image_BHW3, mask_BHW)
        weight = self.global_out.weight
        features = self(seen_B3SS.to(weight) * 2 - 1)
        return features, seen_B3SS.permute(0, 2, 3, 1)


def prepare(image_BHW3: torch.Tensor, mask_BHW: torch.Tensor | None) -> torch.Tensor:
    """What the encoder sees, (B, 3, S, S) in [0, 1]: background white, padded to a square, resized."""
    if image_BHW3.ndim != 4 or image_BHW3.shape[-1] != 3 or 0 in image_BHW3.shape:
        raise ImageInputError(
            f"reference pictures of shape {tuple(image_BHW3.shape)}; wanted (pictures, height, width, 3) with at least "
            "one picture. Give RGB pictures."
        )
    image_B3HW = image_BHW3.permute(0, 3, 1, 2).float()
    if mask_BHW is not None:
        if mask_BHW.ndim != 3 or mask_BHW.shape[1:] != image_BHW3.shape[1:3]:
            raise ImageInputError(
                f"a mask of shape {tuple(mask_BHW.shape)} for pictures of shape {tuple(image_BHW3.shape)}; wanted "
                "(pictures, height, width) of the same size. Resize the mask to the picture."
            )
        keep_B1HW = mask_BHW.to(image_B3HW)[:, None]
        image_B3HW = image_B3HW * keep_B1HW + (1 - keep_B1HW)
    height, width = image_B3HW.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square_B3SS = F.pad(image_B3HW, (left, side - width - left, top, side - height - top), value=1.0)
    size = (INPUT_SIZE_PX, INPUT_SIZE_PX)
    return F.interpolate(square_B3SS, size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def load_playground_encoder(
    path: str | Path, dtype=None, device=None, operations: ModuleType | type = nn
) -> PlaygroundEncoder:
    """Loads strictly; `fingerprint` is the SHA-256 over the file's weights.

    Raises:
        EncoderFileError: not such a file; missing, extra, misshapen or non-finite weights.
    """
    name = Path(path).name
    tensors, _ = read_tensors(path, _WHAT, EncoderFileError)
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in PlaygroundEncoder().state_dict().items()}
    check_shapes(tensors, shapes, name, _WHAT, EncoderFileError)
    check_finite(tensors, name, EncoderFileError)
    encoder = PlaygroundEncoder(operations, dtype or torch.float32, device)
    encoder.load_state_dict(tensors)
    encoder.fingerprint = sha256_of_tensors(tensors)
    return encoder.eval().requires_grad_(False)


def _normalised(x_BNC: torch.Tensor) -> torch.Tensor:
    """Each vector of root mean square 1."""
    return F.normalize(x_BNC, dim=-1) * x_BNC.shape[-1] ** 0.5
