"""MTCNN (arXiv 1604.02878): where the faces of a picture are, and five keypoints of each.

The weights are those of the `mtcnn` package (MIT), read from its files; neither the package nor TensorFlow is imported.

Shapes: H x W the picture, N candidate boxes, S the side of a network's input; coordinates are (x, y) in pixels. Inside this
file they are measured from the picture's edge: the first pixel reaches from 0 to 1.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.ops import batched_nms, nms

from ..errors import EncoderFileError, ImageInputError

_INSTALL = "pip install mtcnn==1.0.0"
_FILES = {
    "pnet": "ea6b0c3e685ebee3165326ad6484acc95f2ef78f1c94fbf40a55704fa989f7b5",
    "rnet": "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee",
    "onet": "94f6ea2f4cf985275ee958cdd762d17b6009348a4fb9d8c6be39ba73ffd22ca3",
}
_P_SIDE, _R_SIDE, _O_SIDE = 12, 24, 48
_P_STRIDE = 2
# thresholds, pyramid factor and overlaps of the authors' published demo (section 3 of the paper leaves them open)
_P_THRESHOLD, _R_THRESHOLD, _O_THRESHOLD = 0.6, 0.7, 0.7
_PYRAMID_FACTOR = 0.709
_OVERLAP_IN_LEVEL, _OVERLAP = 0.5, 0.7
_MOST_PIXELS = 2048 * 2048
_PAD = 0.25  # of the shorter side
# our own, for the second look: false faces in pictures without a face reached 0.79, 340 of 343 found faces exceeded 0.87
_SURE = 0.85
# and by how much the log-odds of a face grow if it is turned further: of most that are not upright by more than this; where
# they grow at all, a face is taken only if the turned pictures hold no better one
_TURNED = 2.0
_DOUBT = 0.1
_UPRIGHT = math.cos(math.radians(50))
_CHUNK = 128


@dataclass(frozen=True)
class Face:
    """A face in a picture.

    Args:
        box: left, top, right and bottom edge in pixels; may reach beyond the picture.
        keypoints: five (x, y) in the order of `options.KEYPOINTS`, in pixels; the centre of the first pixel is (0, 0).
        confidence: 0 to 1.
    """

    box: tuple[float, float, float, float]
    keypoints: tuple[tuple[float, float], ...]
    confidence: float


class _Network(nn.Module):
    """One of the three networks (Fig. 2 of the paper): a trunk and heads; the last head tells face from no face."""

    def __init__(self, trunk: list[nn.Module], heads: list[nn.Module]):
        super().__init__()
        self.trunk = nn.Sequential(*trunk)
        self.heads = nn.ModuleList(heads)

    def forward(self, x_B3SS: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Pictures in [-1, 1] -> the heads' answers, the last one as probability of a face."""
        x = self.trunk(x_B3SS)
        *answers, decision = (head(x) for head in self.heads)
        return *answers, decision.softmax(1)[:, 1]


def _convolution(inputs: int, width: int, side: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, width, side), nn.PReLU(width)]


def _pool(side: int) -> nn.Module:
    return nn.MaxPool2d(side, 2, ceil_mode=True)


def _p_net() -> _Network:
    trunk = [*_convolution(3, 10, 3), _pool(2), *_convolution(10, 16, 3), *_convolution(16, 32, 3)]
    return _Network(trunk, [nn.Conv2d(32, outputs, 1) for outputs in (4, 2)])


def _r_net() -> _Network:
    trunk = [*_convolution(3, 28, 3), _pool(3), *_convolution(28, 48, 3), _pool(3), *_convolution(48, 64, 2)]
    return _Network([*trunk, nn.Flatten(), nn.Linear(576, 128), nn.PReLU(128)], [nn.Linear(128, outputs) for outputs in (4, 2)])


def _o_net() -> _Network:
    trunk = [*_convolution(3, 32, 3), _pool(3), *_convolution(32, 64, 3), _pool(3), *_convolution(64, 64, 3), _pool(2),
             *_convolution(64, 128, 2)]
    return _Network([*trunk, nn.Flatten(), nn.Linear(1152, 256), nn.PReLU(256)],
                    [nn.Linear(256, outputs) for outputs in (4, 10, 2)])


class FaceDetector(nn.Module):
    """The three networks in a row: proposals on a pyramid of pictures, a refinement, and the answer with keypoints."""

    def __init__(self):
        super().__init__()
        self.pnet, self.rnet, self.onet = _p_net(), _r_net(), _o_net()

    @torch.no_grad()
    def detect(self, image_HW3: torch.Tensor, smallest_face_px: float = 20.0) -> list[Face]:
        """The faces of an RGB picture in [0, 1], from left to right.

        Faces slanted by up to 50 degrees count as upright; where none is, the picture is searched lying on either side and
        upside down as well. Pictures of more than 4 megapixels are searched at 4 megapixels.

        Args:
            image_HW3: on any device; searched on that of the weights.
            smallest_face_px: of the picture as it is searched, at least 12.
        Raises:
            ImageInputError: not an RGB picture.
        """
        if image_HW3.ndim != 3 or image_HW3.shape[2] != 3 or 0 in image_HW3.shape:
            raise ImageInputError(f"a picture of shape {tuple(image_HW3.shape)} to find faces in; wanted (height, width, 3). "
                                  "Give an RGB picture.")
        picture_3HW, scale_2 = _searchable(image_HW3, self.pnet.heads[0].weight)
        smallest_face_px = max(smallest_face_px, _P_SIDE)
        searches = [self._turned(picture_3HW, 0, smallest_face_px)]
        # a face that is slanted more is found better, with a box that fits, in a turned picture
        if not (searches[0][3] > _UPRIGHT).any():
            searches += [self._turned(picture_3HW, quarters, smallest_face_px) for quarters in (1, 2, 3)]
        corners_N22, points_N52, confidence_N, _ = max(searches, key=lambda found: found[3].sum())
        boxes_N4, points_N52 = rearrange(corners_N22 / scale_2, "n e x -> n (e x)"), points_N52 / scale_2 - 0.5
        faces = [Face(tuple(box), tuple(map(tuple, points)), confidence) for box, points, confidence
                 in zip(boxes_N4.tolist(), points_N52.tolist(), confidence_N.tolist(), strict=True)]
        return sorted(faces, key=lambda face: (face.box[0] + face.box[2], face.box[1] + face.box[3]))

    def _turned(self, picture_3HW: torch.Tensor, quarters: int, smallest_px: float) -> tuple[torch.Tensor, ...]:
        """The faces found in the picture turned counterclockwise, in coordinates of the picture as it was.

        Returns:
            Corners (N, 2, 2), keypoints (N, 5, 2), confidences (N,), and how upright the faces were (N,), up to 1.
        """
        pad = math.ceil(_PAD * min(picture_3HW.shape[1:]))
        # grey around the picture: faces that its edge cuts are found as well
        padded_3HW = F.pad(picture_3HW, (pad, pad, pad, pad))
        boxes_N4, points_N52, confidence_N, upright_N = self._upright(torch.rot90(padded_3HW, quarters, (1, 2)), smallest_px)
        size = padded_3HW.shape[:0:-1]
        points_N52 = _turned_back(points_N52, quarters, *size) - pad
        corners_N22 = _turned_back(rearrange(boxes_N4, "n (e x) -> n e x", x=2), quarters, *size) - pad
        return torch.stack([corners_N22.amin(1), corners_N22.amax(1)], 1), points_N52, confidence_N, upright_N

    def _upright(self, picture_3HW: torch.Tensor, smallest_px: float) -> tuple[torch.Tensor, ...]:
        """Boxes (N, 4), keypoints (N, 5, 2), confidences (N,) of the upright faces, and how upright they are (N,), up to 1."""
        boxes_N4, score_N, level_N = self._proposals(picture_3HW, smallest_px)
        boxes_N4, score_N = (x[batched_nms(boxes_N4, score_N, level_N, _OVERLAP_IN_LEVEL)] for x in (boxes_N4, score_N))
        boxes_N4 = boxes_N4[nms(boxes_N4, score_N, _OVERLAP)]
        halvings = _halvings(picture_3HW)

        squares_N4 = _squares(boxes_N4)
        offsets_N4, score_N = _answers(self.rnet, halvings, squares_N4, _R_SIDE)
        keep_N = score_N > _R_THRESHOLD
        boxes_N4, score_N = _boxes(squares_N4, offsets_N4)[keep_N], score_N[keep_N]
        boxes_N4 = boxes_N4[nms(boxes_N4, score_N, _OVERLAP)]

        squares_N4 = _squares(boxes_N4)
        offsets_N4, points_N10, score_N = _answers(self.onet, halvings, squares_N4, _O_SIDE)
        boxes_N4 = _boxes(squares_N4, offsets_N4)
        best_N = _without_overlap(boxes_N4, score_N)
        boxes_N4 = boxes_N4[best_N]
        points_N52, score_N, gain_N = self._second_look(halvings, boxes_N4, _points(squares_N4, points_N10)[best_N])
        upright_N = score_N * _slants(points_N52).cos() * torch.where(gain_N > 0, _DOUBT, 1.0)
        keep_N = (score_N > _SURE) & (gain_N < _TURNED)
        return boxes_N4[keep_N], points_N52[keep_N], score_N[keep_N], upright_N[keep_N]

    def _second_look(
        self, halvings: list[torch.Tensor], boxes_N4: torch.Tensor, points_N52: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keypoints (N, 5, 2) and probabilities (N,) of the faces straightened by the keypoints found first.

        Not in the paper. Keypoints of a face slanted by 30 degrees were off by 5.5 % of the distance from eyes to mouth, and
        are by 2.2 % at the second look (45 degrees: 11 % and 2.4 %). A face that lies on its side is sometimes found as an
        upright one with keypoints at random: it looks more like a face when turned further. By how much its log-odds then
        grow is the third answer (N,).
        """
        squares_N4 = _squares(boxes_N4)
        squares_N4[:, 3] = _slants(points_N52)
        _, points_N10, score_N = _answers(self.onet, halvings, squares_N4, _O_SIDE)
        quarter_4 = squares_N4.new_tensor([0, 0, 0, math.pi / 2])
        further_N4 = torch.cat([squares_N4 + quarters * quarter_4 for quarters in (1, 2, 3)])
        further_3N = rearrange(_answers(self.onet, halvings, further_N4, _O_SIDE)[2], "(q n) -> q n", q=3)
        return _points(squares_N4, points_N10), score_N, further_3N.amax(0).logit(1e-6) - score_N.logit(1e-6)

    def _proposals(self, picture_3HW: torch.Tensor, smallest_px: float) -> tuple[torch.Tensor, ...]:
        """Boxes (N, 4), scores (N,) and pyramid level (N,) of the first network."""
        height, width = picture_3HW.shape[1:]
        scale, found = _P_SIDE / smallest_px, []
        while min(height, width) * scale >= _P_SIDE:
            level_3hw = _resized(picture_3HW, [round(height * scale), round(width * scale)])
            scale_2 = picture_3HW.new_tensor([level_3hw.shape[2] / width, level_3hw.shape[1] / height])
            offsets_14hw, score_1hw = self.pnet(level_3hw[None])
            y_N, x_N = torch.where(score_1hw[0] > _P_THRESHOLD)
            corner_N2 = torch.stack([x_N, y_N], 1).to(picture_3HW) * _P_STRIDE
            squares_N4 = _squares(torch.cat([corner_N2, corner_N2 + _P_SIDE], 1))
            boxes_N4 = _boxes(squares_N4, offsets_14hw[0, :, y_N, x_N].T) / scale_2.repeat(2)
            found.append((boxes_N4, score_1hw[0, y_N, x_N], torch.full_like(x_N, len(found))))
            scale *= _PYRAMID_FACTOR
        if not found:
            return picture_3HW.new_zeros(0, 4), picture_3HW.new_zeros(0), picture_3HW.new_zeros(0, dtype=torch.long)
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _searchable(image_HW3: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture in [-1, 1], (3, H, W), of at most `_MOST_PIXELS`, and by how much its (x, y) are smaller."""
    height, width = image_HW3.shape[:2]
    scale = min(1.0, (_MOST_PIXELS / (height * width)) ** 0.5)
    size = [max(1, round(side * scale)) for side in (height, width)]
    # one channel at a time: a copy of a whole 8000 x 6000 picture takes half a gigabyte
    channels = [_resized(image_HW3[None, :, :, c].to(like), size) for c in range(3)]
    picture_3HW = torch.cat(channels).clamp(0, 1)
    return (picture_3HW * 255 - 127.5) / 128, like.new_tensor([size[1] / width, size[0] / height])


def _resized(picture_CHW: torch.Tensor, size: list[int]) -> torch.Tensor:
    return F.interpolate(picture_CHW[None], size, mode="bilinear", antialias=True, align_corners=False)[0]


def _turned_back(points_NK2: torch.Tensor, quarters: int, width: int, height: int) -> torch.Tensor:
    """Points of a picture that `torch.rot90` turned, as points of the picture before, which is `width` x `height`."""
    x_NK, y_NK = points_NK2.unbind(-1)
    sources = ((x_NK, y_NK), (width - y_NK, x_NK), (width - x_NK, height - y_NK), (y_NK, height - x_NK))
    return torch.stack(sources[quarters], -1)


def _squares(boxes_N4: torch.Tensor) -> torch.Tensor:
    """The upright squares about boxes: middle (x, y), side, and turn (clockwise, in radians)."""
    middle_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2
    side_N1 = (boxes_N4[:, 2:] - boxes_N4[:, :2]).amax(1, keepdim=True)
    return torch.cat([middle_N2, side_N1, torch.zeros_like(side_N1)], 1)


def _boxes(squares_N4: torch.Tensor, offsets_N4: torch.Tensor) -> torch.Tensor:
    """The edges of upright squares moved by a network's answer, which is in shares of their side."""
    middle_N2, side_N1 = squares_N4[:, :2], squares_N4[:, 2:3]
    return torch.cat([middle_N2 - side_N1 / 2, middle_N2 + side_N1 / 2], 1) + offsets_N4 * side_N1


def _points(squares_N4: torch.Tensor, points_N10: torch.Tensor) -> torch.Tensor:
    """Keypoints (N, 5, 2) of a network's answer: five x, then five y, in shares of the square it saw."""
    return _placed(squares_N4, rearrange(points_N10, "n (x p) -> n p x", x=2))


def _placed(squares_N4: torch.Tensor, inside_NK2: torch.Tensor) -> torch.Tensor:
    """Points given in shares of a square, as points of the picture."""
    x_N1, y_N1, side_N1, turn_N1 = squares_N4.split(1, 1)
    u_NK, v_NK = (inside_NK2 - 0.5).unbind(-1)
    cos_N1, sin_N1 = turn_N1.cos() * side_N1, turn_N1.sin() * side_N1
    return torch.stack([x_N1 + cos_N1 * u_NK - sin_N1 * v_NK, y_N1 + sin_N1 * u_NK + cos_N1 * v_NK], -1)


def _slants(points_N52: torch.Tensor) -> torch.Tensor:
    """By how much the faces are turned clockwise, in radians."""
    down_N2 = points_N52[:, 3:].mean(1) - points_N52[:, :2].mean(1)
    right_N2 = points_N52[:, [1, 4]].mean(1) - points_N52[:, [0, 3]].mean(1)
    # both directions say it; their mean is less shaken by one bad point than either
    return torch.atan2(right_N2[:, 1] - down_N2[:, 0], right_N2[:, 0] + down_N2[:, 1])


def _halvings(picture_3HW: torch.Tensor) -> list[torch.Tensor]:
    """The picture, half of it, a quarter ...: boxes of any size are cut from one about as fine as a network's input."""
    halvings = [picture_3HW]
    while min(halvings[-1].shape[1:]) > _R_SIDE:
        halvings.append(_resized(halvings[-1], [side // 2 for side in halvings[-1].shape[1:]]))
    return halvings


def _cuts(halvings: list[torch.Tensor], squares_N4: torch.Tensor, side: int) -> torch.Tensor:
    """The squares (N, 3, side, side) of a picture, grey beyond it. Each pixel is the mean of four samples."""
    u_s = (torch.arange(2 * side).to(squares_N4) + 0.5) / (2 * side)
    inside_1K2 = rearrange(list(torch.meshgrid(u_s, u_s, indexing="xy")), "x u v -> 1 (u v) x")
    source_NK2 = _placed(squares_N4, inside_1K2)
    size_2 = source_NK2.new_tensor(halvings[0].shape[:0:-1])
    level_N = (squares_N4[:, 2] / (2 * side)).clamp_min(1).log2().long().clamp_max(len(halvings) - 1)
    cuts_N3ss = source_NK2.new_empty(len(squares_N4), 3, 2 * side, 2 * side)
    for level in level_N.unique().tolist():
        here_N = level_N == level
        grid_1nK2 = (source_NK2[here_N] * 2 / size_2 - 1)[None]
        found_3nK = F.grid_sample(halvings[level][None], grid_1nK2, align_corners=False)[0]
        cuts_N3ss[here_N] = rearrange(found_3nK, "c n (u v) -> n c u v", v=2 * side)
    return F.avg_pool2d(cuts_N3ss, 2)


def _answers(network: _Network, halvings: list[torch.Tensor], squares_N4: torch.Tensor, side: int) -> tuple[torch.Tensor, ...]:
    """A network's answers for squares of a picture."""
    answers = [network(_cuts(halvings, squares_n4, side)) for squares_n4 in squares_N4.split(_CHUNK)]
    return tuple(torch.cat(parts) for parts in zip(*answers, strict=True))


def _without_overlap(boxes_N4: torch.Tensor, score_N: torch.Tensor) -> list[int]:
    """Indices of the sure faces, best first: none shares more than `_OVERLAP` of the smaller one with a better one."""
    kept: list[int] = []
    area_N = (boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(1)
    for index in score_N.argsort(descending=True, stable=True).tolist():
        if score_N[index] <= _O_THRESHOLD:
            break
        corner_K2 = torch.maximum(boxes_N4[index, :2], boxes_N4[kept, :2])
        common_K = (torch.minimum(boxes_N4[index, 2:], boxes_N4[kept, 2:]) - corner_K2).clamp_min(0).prod(1)
        if (common_K <= _OVERLAP * torch.minimum(area_N[index], area_N[kept])).all():
            kept.append(index)
    return kept


def load_face_detector() -> FaceDetector:
    """The detector with the weights of the installed `mtcnn` package, on the CPU.

    Raises:
        EncoderFileError: the package, joblib or lz4 is missing, or a file is not the known one.
    """
    folder = _weights_folder()
    detector = FaceDetector()
    for name, sha256 in _FILES.items():
        path = folder / f"{name}.lz4"
        if not path.is_file():
            raise EncoderFileError(f"{path} does not exist; wanted the face detector's weights. Run: {_INSTALL}")
        content = path.read_bytes()
        # a pickle can run code when opened: only the very file that was looked at is opened
        if (found := hashlib.sha256(content).hexdigest()) != sha256:
            raise EncoderFileError(f"{path} has SHA-256 {found[:12]}...; wanted {sha256[:12]}..., the face detector's weights "
                                   f"of mtcnn 1.0.0. Run: {_INSTALL}")
        _fill(getattr(detector, name), _unpickled(content))
    return detector.eval().requires_grad_(False)


def _weights_folder() -> Path:
    missing = [name for name in ("mtcnn", "joblib", "lz4") if importlib.util.find_spec(name) is None]
    if missing:
        raise EncoderFileError(f"the face detector's weights are in the package mtcnn; not installed: {', '.join(missing)}. "
                               f"Run: {_INSTALL}")
    locations = importlib.util.find_spec("mtcnn").submodule_search_locations or [""]
    return Path(next(iter(locations))) / "assets" / "weights"


def _unpickled(content: bytes) -> list[np.ndarray]:
    import joblib  # comes with mtcnn, which is needed only here

    return joblib.load(io.BytesIO(content))


def _fill(network: _Network, arrays: list[np.ndarray]) -> None:
    """Keras keeps convolutions as (height, width, in, out), linear layers as (in, out), both before their bias."""
    values = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
    channels = 0
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            channels = layer.out_channels
            weight = rearrange(next(values), "h w i o -> o i h w")
        elif isinstance(layer, nn.PReLU):
            layer.weight.data = next(values).flatten()
            continue
        elif isinstance(layer, nn.Linear):
            weight = next(values).T
            if layer in network.trunk:  # its inputs were flattened as (width, height, channels)
                side = round((layer.in_features / channels) ** 0.5)
                weight = rearrange(weight, "o (w h c) -> o (c h w)", w=side, c=channels)
        else:
            continue
        layer.weight.data, layer.bias.data = weight.contiguous(), next(values)
