"""How reference pictures are encoded: which features, how a picture is framed, which of its faces is meant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import ImageInputError

AS_TRAINED = "as trained"
FRAMES = (AS_TRAINED, "center", "top", "bottom", "left", "right", "pad", "stretch")
BACKGROUNDS = (AS_TRAINED, "mean colour", "white", "black")
LAYERS = ("last", "penultimate")
FACES = ("largest", "by index", "all")
KEYPOINTS = ("left eye", "right eye", "nose", "left mouth corner", "right mouth corner")
_MOST_MARGIN = 4.0


@dataclass(frozen=True)
class Framing:
    """How a picture of any size becomes the encoder's square, and what stands behind a masked object.

    Args:
        frame: the part kept of a picture that is not square (the short side fills the square), "pad" (the whole
            picture, the background beside it), "stretch", or "as trained": what the encoder was trained with.
        background: the colour behind a mask and beside a padded picture; "mean colour" is the encoder's.
        crop_to_mask: show only the masked object, `margin` around it.
        margin: in shares of the object's longer side, 0 to 4.
    Raises:
        ImageInputError: an unknown choice, a margin out of range.
    """

    frame: str = AS_TRAINED
    background: str = AS_TRAINED
    crop_to_mask: bool = False
    margin: float = 0.1

    def __post_init__(self):
        _check_choice("frame", self.frame, FRAMES)
        _check_choice("background", self.background, BACKGROUNDS)
        if not 0 <= self.margin <= _MOST_MARGIN:
            raise ImageInputError(f"a margin of {self.margin} around the mask; wanted 0 to {_MOST_MARGIN:g} (shares of the "
                                  "object's longer side). Correct it.")


@dataclass(frozen=True)
class FaceChoice:
    """Which face of a picture is meant, and where it is if the user says so.

    Args:
        which: "largest", "by index", or "all" (each becomes a reference of its own).
        index: for "by index", from 0, left to right.
        keypoints: for each picture (or one entry for all) its faces, each five (x, y) in pixels in the order of
            `KEYPOINTS`; left and right as the picture shows them. Empty: faces are detected.
    Raises:
        ImageInputError: an unknown choice, a negative index.
    """

    which: str = "largest"
    index: int = 0
    keypoints: tuple[tuple[tuple[tuple[float, float], ...], ...], ...] = ()

    def __post_init__(self):
        _check_choice("face", self.which, FACES)
        if self.index < 0:
            raise ImageInputError(f"face {self.index}; wanted 0 (the leftmost) or more. Correct the index.")


@dataclass(frozen=True)
class EncodeOptions:
    """What an encoder is asked for.

    Args:
        features: names of the features wanted ("global", "local", "face", ...).
        layer: of hidden states, "last" or "penultimate".
        framing: for encoders of whole pictures.
        faces: for encoders of faces.
    Raises:
        ImageInputError: an unknown layer.
    """

    features: tuple[str, ...]
    layer: str = LAYERS[0]
    framing: Framing = field(default_factory=Framing)
    faces: FaceChoice = field(default_factory=FaceChoice)

    def __post_init__(self):
        _check_choice("layer", self.layer, LAYERS)


def _check_choice(what: str, found: Any, known: tuple[str, ...]) -> None:
    if found not in known:
        raise ImageInputError(f"{what} {found!r} is not known; choose one of {', '.join(known)}.")
