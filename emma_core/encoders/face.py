"""Faces of pictures -> identity features: found, aligned and encoded with AdaFace.

Shapes: B pictures, H x W their size, F faces of one picture, R faces encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange

from ..errors import ImageInputError
from .adaface import FEATURES, AdaFace
from .base import Encoded, check_features
from .face_alignment import align_faces, keypoints_of_mask
from .face_detection import FaceDetector
from .options import KEYPOINTS, EncodeOptions, FaceChoice
from .pictures import check_pictures

_CHUNK = 32


class FaceReferenceEncoder:
    """AdaFace behind detection and alignment: a `ReferenceEncoder`.

    Features: `face` (R, 1, 512), of unit length; `face_map` (R, 49, 512), the last map row by row; `face_norm` (R, 1, 1),
    the embedding's length before, which tells how clear the face is.
    """

    feature_names = FEATURES
    bytes_per_picture = 32 << 20

    def __init__(self, backbone: AdaFace, detector: FaceDetector | Callable[[], FaceDetector]):
        """`detector` may be a function that loads one: it is called when a face must be found, once."""
        self.model = backbone
        self.description = {"family": f"adaface-ir-{backbone.layers}", "fingerprint": backbone.fingerprint,
                            "input_size": backbone.input_size_px}
        self._detector = detector

    @torch.no_grad()
    def encode(
        self, image_BHW3: torch.Tensor, mask_BHW: torch.Tensor | None, options: EncodeOptions, labels: Sequence[str] = ()
    ) -> list[Encoded]:
        """RGB pictures in [0, 1] -> for each the features of its face, or faces, and the aligned faces they are of.

        Keypoints in the options say where the faces are; without them a mask does (white on one face of each picture, one
        mask for all if it is one); without both they are detected. R is 1, or more where all faces are asked for.

        Raises:
            ImageInputError: not RGB pictures, a mask of another size, no face, or too few faces or keypoints.
            ReferenceMismatchError: a feature that this encoder does not give.
        """
        check_features(self, options)
        check_pictures(image_BHW3, mask_BHW)
        aligned = []
        for index, image_HW3 in enumerate(image_BHW3):
            try:
                keypoints_F52, size_F = self._faces(image_BHW3, mask_BHW, options.faces, index)
                aligned.append(align_faces(image_HW3, keypoints_F52[_chosen(size_F, options.faces)]))
            except ImageInputError as found:
                label = labels[index] if labels else f"picture {index + 1} of {len(image_BHW3)}"
                raise ImageInputError(f"{label}: {found}") from found
        counts = [len(faces_R112x3) for faces_R112x3 in aligned]
        features = self._features(torch.cat(aligned), options.features)
        parts = {name: tensor.split(counts) for name, tensor in features.items()}
        return [Encoded({name: part[index] for name, part in parts.items()}, seen) for index, seen in enumerate(aligned)]

    def _faces(
        self, image_BHW3: torch.Tensor, mask_BHW: torch.Tensor | None, choice: FaceChoice, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keypoints (F, 5, 2) of one picture's faces, from left to right, and how large the faces are beside each other."""
        if choice.keypoints:
            return _given(choice.keypoints, index, image_BHW3)
        if mask_BHW is not None:
            return keypoints_of_mask(mask_BHW[index if len(mask_BHW) > 1 else 0])[None], torch.ones(1)
        if not isinstance(self._detector, FaceDetector):
            self._detector = self._detector()
        faces = self._detector.detect(image_BHW3[index])
        if not faces:
            raise ImageInputError("no face found; wanted one at least. Crop nearer to the face, give a brighter or sharper "
                                  "picture, draw a mask over the face, or give its five keypoints.")
        boxes_F4 = torch.tensor([face.box for face in faces])
        return torch.tensor([face.keypoints for face in faces]), (boxes_F4[:, 2:] - boxes_F4[:, :2]).prod(1)

    def _features(self, seen_R112x3: torch.Tensor, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        weight = self.model.input_layer[0].weight
        answers = []
        for faces_r112x3 in seen_R112x3.split(_CHUNK):
            bgr_r3SS = rearrange(faces_r112x3.flip(3), "r h w c -> r c h w")
            answers.append(self.model(((bgr_r3SS - 0.5) / 0.5).to(weight)))
        embedding_RD, norm_R1, map_RChw = (torch.cat(parts) for parts in zip(*answers, strict=True))
        features = {"face": embedding_RD[:, None], "face_map": rearrange(map_RChw, "r c h w -> r (h w) c"),
                    "face_norm": norm_R1[:, None]}
        return {name: features[name] for name in names}


def _given(
    keypoints: tuple[tuple[tuple[tuple[float, float], ...], ...], ...], index: int, image_BHW3: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The user's keypoints (F, 5, 2) of one picture, from left to right, and the faces' sizes (F,)."""
    count, (height, width) = len(image_BHW3), image_BHW3.shape[1:3]
    if len(keypoints) not in (1, count):
        raise ImageInputError(f"keypoints for {len(keypoints)} pictures; wanted them for {count}, or one entry for all. Add or "
                              "remove lines.")
    keypoints_F52 = torch.tensor(keypoints[index if len(keypoints) > 1 else 0])
    if keypoints_F52.ndim != 3 or keypoints_F52.shape[1:] != (len(KEYPOINTS), 2):
        raise ImageInputError(f"keypoints of shape {tuple(keypoints_F52.shape)}; wanted (faces, {len(KEYPOINTS)}, 2) with at "
                              "least one face. Give x and y of five points for each face.")
    middle_F2 = keypoints_F52.mean(1)
    for x, y in middle_F2.tolist():
        if not (0 <= x < width and 0 <= y < height):
            raise ImageInputError(f"face keypoints about ({x:g}, {y:g}); wanted them inside the picture, which is {width} x "
                                  f"{height} pixels. Correct the keypoints, or resize them with the picture.")
    order_F = middle_F2[:, 0].argsort(stable=True)
    return keypoints_F52[order_F], (keypoints_F52 - middle_F2[:, None]).square().sum((1, 2))[order_F]


def _chosen(size_F: torch.Tensor, choice: FaceChoice) -> list[int]:
    """Indices of the faces that are meant."""
    if choice.which == "all":
        return list(range(len(size_F)))
    if choice.which == "largest":
        return [int(size_F.argmax())]
    if choice.index >= len(size_F):
        raise ImageInputError(f"face {choice.index} is meant, but the picture has {len(size_F)}; wanted 0 (the leftmost) to "
                              f"{len(size_F) - 1}. Choose another index, or the largest face.")
    return [choice.index]
