"""AdaFace (arXiv 2204.00964): an aligned face becomes a 512-d identity embedding.

The published weights have no clear licence of their own; check it before you use or share what is made with them.

Shapes: B faces, C channels, 112 x 112 pixels.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import EmmaWarning, EncoderFileError, ImageInputError
from ..files.plain_file import read_text
from ..files.tensor_file import check_finite, check_shapes, fingerprint_of_weights, integers_in, read_weights
from .base import ReferenceEncoder
from .weights import Shapes, weights_path

INPUT_SIZE_PX = 112
EMBEDDING_DIM, MAP_DIM = 512, 512
FEATURES = ("face", "face_map", "face_norm")
BLOCKS_OF_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 101: (3, 13, 30, 3)}
_STAGE_WIDTHS = (64, 128, 256, 512)
_FINAL_CELLS = 7 * 7
_WHAT = "an AdaFace IR-18, 34, 50 or 101"
_BLOCK = re.compile(r"body\.([0-9]{1,4})\.")
_FIRST = "input_layer.0.weight"
_CVLFACE = "net."  # the author's newer collection (github.com/mk-minchul/CVLface) calls the backbone so
_CVLFACE_CONFIGS = ("config.json", "model.yaml", "pretrained_model/model.yaml")
_COLOURS = re.compile(r"""["']?color_space["']?\s*:\s*["']?(RGB|BGR)\b""")
_LARGEST_CONFIG = 1 << 20  # bytes


class _Block(nn.Module):
    """A residual block of the improved ResNet (ArcFace, arXiv 1801.07698, section 3.2.2)."""

    def __init__(self, inputs: int, width: int, stride: int, operations: ModuleType | type):
        super().__init__()
        if inputs == width:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                operations.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs), operations.Conv2d(inputs, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
            nn.PReLU(width), operations.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width),
        )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.res_layer(x_BCHW) + self.shortcut_layer(x_BCHW)


class AdaFace(nn.Module):
    """The backbone, under the key names of the published checkpoints."""

    input_size_px = INPUT_SIZE_PX

    def __init__(self, layers: int = 101, operations: ModuleType | type = nn):
        super().__init__()
        self.layers = layers
        self.fingerprint = ""
        self.input_layer = nn.Sequential(
            operations.Conv2d(3, _STAGE_WIDTHS[0], 3, 1, 1, bias=False), nn.BatchNorm2d(_STAGE_WIDTHS[0]),
            nn.PReLU(_STAGE_WIDTHS[0]),
        )
        blocks, inputs = [], _STAGE_WIDTHS[0]
        for width, count in zip(_STAGE_WIDTHS, BLOCKS_OF_STAGES[layers], strict=True):
            for index in range(count):
                blocks.append(_Block(inputs, width, 2 if index == 0 else 1, operations))
                inputs = width
        self.body = nn.Sequential(*blocks)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(MAP_DIM), nn.Dropout(0.4), nn.Flatten(),
            operations.Linear(MAP_DIM * _FINAL_CELLS, EMBEDDING_DIM), nn.BatchNorm1d(EMBEDDING_DIM, affine=False),
        )

    def forward(self, face_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Aligned faces, blue-green-red in [-1, 1], (B, 3, 112, 112).

        Returns:
            Embedding (B, 512) of unit length, its length before (B, 1), and the map before the head (B, 512, 7, 7).
        Raises:
            ImageInputError: pictures of another shape.
        """
        if face_B3HW.ndim != 4 or tuple(face_B3HW.shape[1:]) != (3, INPUT_SIZE_PX, INPUT_SIZE_PX):
            raise ImageInputError(f"faces of shape {tuple(face_B3HW.shape)}; wanted (faces, 3, {INPUT_SIZE_PX}, "
                                  f"{INPUT_SIZE_PX}). Detect and align the face first.")
        map_BChw = self.body(self.input_layer(face_B3HW))
        raw_BD = self.output_layer(map_BChw)
        norm_B1 = raw_BD.norm(dim=1, keepdim=True)
        return F.normalize(raw_BD, dim=1), norm_B1, map_BChw


def load_adaface(path: str | Path, operations: ModuleType | type = nn) -> AdaFace:
    """An AdaFace backbone from the published .ckpt or a .safetensors, recognised by its tensors, loaded strictly.

    Raises:
        EncoderFileError: not such a file, a pickle that holds more than tensors, missing or misshapen weights.
    """
    path = Path(path)
    found = read_weights(path, _WHAT, EncoderFileError)
    prefix = _prefix_in(found) or ""
    tensors = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    if prefix.endswith(_CVLFACE):
        tensors = _blue_first(tensors, path)
    blocks = {int(match.group(1)) for key in tensors if (match := _BLOCK.match(key))}
    layers = {sum(counts): layers for layers, counts in BLOCKS_OF_STAGES.items()}.get(len(blocks))
    if layers is None:
        raise EncoderFileError(f"{path.name} has {len(blocks)} residual blocks and {len(tensors)} tensors; wanted {_WHAT} "
                               f"({', '.join(str(sum(counts)) for counts in BLOCKS_OF_STAGES.values())} blocks). Choose an "
                               "AdaFace backbone.")
    with torch.device("meta"):
        wanted = AdaFace(layers).state_dict()
    check_shapes(tensors, {key: tuple(value.shape) for key, value in wanted.items()}, path.name, _WHAT, EncoderFileError)
    check_finite(tensors, path.name, EncoderFileError, integers_in(wanted))
    encoder = AdaFace(layers, operations)
    encoder.load_state_dict(tensors)
    encoder.fingerprint = fingerprint_of_weights(tensors)
    return encoder.eval().requires_grad_(False)


def _prefix_in(names: Iterable[str]) -> str | None:
    """What stands before the backbone's names: "model." of the training code, "model.net." or "net." of CVLface, or nothing."""
    return min((key.removesuffix(_FIRST) for key in names if key.endswith(_FIRST)), key=len, default=None)


def _blue_first(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Weights for blue-green-red, as AdaFace has them; a CVLface model says in a file beside it which way round it reads."""
    for beside in (path.parent / name for name in _CVLFACE_CONFIGS):
        if beside.is_file():
            order = _COLOURS.search(read_text(beside, "a CVLface configuration", EncoderFileError, _LARGEST_CONFIG))
            if order:
                flipped = order[1] == "RGB" and tensors[_FIRST].ndim == 4
                return {**tensors, _FIRST: tensors[_FIRST].flip(1)} if flipped else dict(tensors)
    warnings.warn(f"{path.name} has CVLface's names. Which way round it reads colours stands in the {_CVLFACE_CONFIGS[0]} "
                  "published with it, which is not beside it: blue-green-red is taken, as AdaFace reads. Put that file into "
                  "the same folder to be sure.", EmmaWarning, stacklevel=3)
    return dict(tensors)


def recognises(shapes: Shapes) -> bool:
    """See `EncoderKind`."""
    return _prefix_in(shapes) is not None


def load(path: Path, open_clip_model: str | None) -> ReferenceEncoder:
    """See `EncoderKind`."""
    from .face import FaceReferenceEncoder  # here, as finding faces takes long to import
    from .face_detection import load_face_detector

    return FaceReferenceEncoder(load_adaface(weights_path(path)), load_face_detector)
