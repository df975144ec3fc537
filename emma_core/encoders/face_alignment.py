"""Five keypoints of a face become the 112 x 112 picture that face recognisers are trained on.

Shapes: H x W the picture, F faces, S the side of the aligned picture; points are (x, y) in pixels, the centre of the first
pixel is (0, 0), in the order of `options.KEYPOINTS`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

from ..errors import ImageInputError, short
from ..files.json_file import JsonFault, loads
from .options import KEYPOINTS

TEMPLATE_SIZE_PX = 112
# ArcFace (arXiv 1801.07698), as published with its code
ARCFACE_TEMPLATE = (
    (38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041),
)
# MTCNN's boxes of five people in seven pictures, drawn into the aligned one: middle (55, 67) from its edge, 78 wide, 103 high
_BOX_MIDDLE = (56.0, 67.0)
_BOX_SIDE = 103.0
_LEAST_LIKENESS = 1e-3
_FARTHEST_PX = 1e6  # that a keypoint may be from the picture's corner
_EXAMPLE = "for example 38 52 74 52 56 72 42 92 71 92"

Points = tuple[tuple[float, float], ...]


def similarity_transform(from_52: torch.Tensor, to_52: torch.Tensor) -> torch.Tensor:
    """The rotation, scale and shift (2, 3) that bring points nearest to others, in the sense of least squares.

    Umeyama, IEEE PAMI 13(4), 1991, eq. 40-43; in the plane and without reflection its answer has a closed form.

    Raises:
        ImageInputError: the points do not tell a rotation (all at one place, or unlike a face), or are not finite.
    """
    source_52, target_52 = from_52.double(), to_52.double()
    mean_2, to_mean_2 = source_52.mean(0), target_52.mean(0)
    (x_5, y_5), (u_5, v_5) = (source_52 - mean_2).T, (target_52 - to_mean_2).T
    spread = (x_5 * x_5 + y_5 * y_5).sum()
    along, across = (x_5 * u_5 + y_5 * v_5).sum(), (x_5 * v_5 - y_5 * u_5).sum()
    likeness = torch.hypot(along, across) / (spread * (u_5 * u_5 + v_5 * v_5).sum()).sqrt()
    if not likeness > _LEAST_LIKENESS:  # also true of NaN, which points at one place give
        places = ", ".join(f"({x:g}, {y:g})" for x, y in from_52.tolist())
        raise ImageInputError(f"the face keypoints {places} do not tell how the face lies; wanted the {', '.join(KEYPOINTS)} "
                              "of one face. Correct the keypoints.")
    a, b = along / spread, across / spread
    turn_22 = torch.stack([torch.stack([a, -b]), torch.stack([b, a])])
    return torch.cat([turn_22, (to_mean_2 - turn_22 @ mean_2)[:, None]], 1).to(from_52.dtype)


def align_faces(image_HW3: torch.Tensor, keypoints_F52: torch.Tensor, size_px: int = TEMPLATE_SIZE_PX) -> torch.Tensor:
    """Faces (F, S, S, 3) with their keypoints on the template: bilinear, black beyond the picture, as published.

    Raises:
        ImageInputError: keypoints that do not tell how the face lies.
    """
    height, width = image_HW3.shape[:2]
    # template points scale about the picture's edge, not about the centre of its first pixel
    template_52 = (torch.tensor(ARCFACE_TEMPLATE, dtype=torch.float64) + 0.5) * size_px / TEMPLATE_SIZE_PX - 0.5
    pixel_S = torch.arange(size_px, dtype=torch.float64)
    aligned_KK2 = torch.stack(torch.meshgrid(pixel_S, pixel_S, indexing="xy"), -1)
    sources = []
    for keypoints_52 in keypoints_F52.cpu().double():
        back_23 = similarity_transform(template_52, keypoints_52)
        sources.append(aligned_KK2 @ back_23[:, :2].T + back_23[:, 2])
    grid_FSS2 = (torch.stack(sources) * 2 + 1) / torch.tensor([width, height]) - 1
    # the faces one below the other: a batch of F would need F copies of the picture
    grid_1KS2 = rearrange(grid_FSS2, "f s t c -> 1 (f s) t c").to(image_HW3)
    faces_3KS = F.grid_sample(rearrange(image_HW3, "h w c -> 1 c h w"), grid_1KS2, align_corners=False)[0]
    return rearrange(faces_3KS, "c (f s) t -> f s t c", s=size_px)


def keypoints_from_box(box: tuple[float, float, float, float]) -> torch.Tensor:
    """The keypoints (5, 2) of an upright face in a detector's box (left, top, right, bottom edge), float32."""
    left, top, right, bottom = box
    scale = max(right - left, bottom - top) / _BOX_SIDE
    middle_2 = torch.tensor([left + right, top + bottom]) / 2
    return (torch.tensor(ARCFACE_TEMPLATE) + 0.5 - torch.tensor(_BOX_MIDDLE)) * scale + middle_2 - 0.5


def keypoints_of_mask(mask_HW: torch.Tensor) -> torch.Tensor:
    """The keypoints (5, 2) of an upright face that fills a mask (white where the face is), float32.

    Raises:
        ImageInputError: nothing in the mask is white.
    """
    if not mask_HW.max() > 0:
        raise ImageInputError("the mask is empty; wanted white where the face is. Draw it over the face, or take it away.")
    y_N, x_N = torch.where(mask_HW > mask_HW.max() / 2)
    return keypoints_from_box((x_N.min().item(), y_N.min().item(), x_N.max().item() + 1, y_N.max().item() + 1))


def parse_keypoints(text: str) -> tuple[tuple[Points, ...], ...]:
    """Faces of pictures, as `FaceChoice.keypoints` wants them.

    Args:
        text: a line for each picture; its faces divided by ";"; each face ten numbers, x and y of the five keypoints,
            divided by spaces or commas. Or JSON: pictures, in each its faces, in each five [x, y]. Empty: no keypoints.
    Raises:
        ImageInputError: naming the line (or the picture) and the face that are wrong.
    """
    text = text.strip()
    if text.startswith("["):
        return _from_json(text)
    lines = text.splitlines()
    return tuple(_from_line(line, f"line {number} of the keypoints") for number, line in enumerate(lines, 1))


def _from_line(line: str, where: str) -> tuple[Points, ...]:
    faces = []
    for number, part in enumerate(line.split(";"), 1):
        words = part.replace(",", " ").split()
        if len(words) != 10:
            raise ImageInputError(f"{where}, face {number}: {len(words)} numbers; wanted 10, x and y of the "
                                  f"{', '.join(KEYPOINTS)}, {_EXAMPLE}. Correct the line.")
        faces.append(_face(list(zip(words[::2], words[1::2], strict=True)), f"{where}, face {number}"))
    return tuple(faces)


def _from_json(text: str) -> tuple[tuple[Points, ...], ...]:
    try:
        pictures = loads(text)
    except JsonFault as found:
        raise ImageInputError(f"the text of the keypoints {found}; wanted pictures, in each its faces, in each five [x, y]. "
                              "Correct it.") from None
    return tuple(
        tuple(_face(face, f"picture {p} of the keypoints, face {f}") for f, face in enumerate(_some(faces, f"picture {p}"), 1))
        for p, faces in enumerate(_some(pictures, "the text"), 1)
    )


def _some(found: Any, where: str) -> list:
    if not isinstance(found, list) or not found:
        raise ImageInputError(f"{where} of the keypoints holds {short(found, 40)}; wanted lists: pictures, in each its "
                              "faces, in each five [x, y]. Correct it.")
    return found


def _face(pairs: Any, where: str) -> Points:
    try:
        points = tuple((float(x), float(y)) for x, y in pairs)
    except (TypeError, ValueError, OverflowError) as found:
        raise ImageInputError(f"{where}: {short(str(found))}; wanted five x and y, {_EXAMPLE}. Correct the numbers.") from found
    if len(points) != len(KEYPOINTS) or not all(abs(value) <= _FARTHEST_PX for point in points for value in point):
        raise ImageInputError(f"{where} holds {short(points)}; wanted five finite x and y in pixels, {_EXAMPLE}. Correct the "
                              "numbers.")
    _check_not_mirrored(points, where)
    return points


def _check_not_mirrored(points: Points, where: str) -> None:
    """However a face is turned, its mouth lies clockwise of the line from left to right eye."""
    left, right, _, left_corner, right_corner = (complex(*point) for point in points)
    across, down = right - left, (left_corner + right_corner - left - right) / 2
    # in a profile the eyes may lie on each other, in either order: only clearly mirrored points are refused
    if (across.conjugate() * down).imag < -0.5 * abs(across) * abs(down):
        raise ImageInputError(f"{where}: the keypoints are those of a mirrored face; wanted the {', '.join(KEYPOINTS)}, left "
                              "and right as the picture shows them. Swap left and right.")
