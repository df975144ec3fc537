"""What a reference encoder sees: background removed, framed to a square, resized as open_clip resizes.

Shapes: B pictures of height H and width W, S the encoder's input size, C channels; masks are (B, H, W), 1 = the object.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from ..errors import EmmaWarning, ImageInputError
from .options import AS_TRAINED, Framing

WHITE, BLACK = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
_CROPS = {"center": (0.5, 0.5), "top": (0.0, 0.5), "bottom": (1.0, 0.5), "left": (0.5, 0.0), "right": (0.5, 1.0)}
_LEVELS = 255
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_MUCH_LONGER = 1.8  # wider than 16 : 9, from where a person at one side is lost
_LONGEST_SHAPE = 32  # a picture longer than 32 times its short side is cut before it is enlarged
_FAINT = 0.5  # of a mask's brightest value: darker, it is one of other levels
_LEAST_SEEN = 0.0002  # of what the encoder sees: ten pixels of 224 x 224
_OBJECT = 0.5  # of a mask's largest value: what counts as the object when cropping to it


@dataclass(frozen=True)
class Preparation:
    """How an encoder wants its pictures.

    Args:
        size_px: S.
        mean, std: of red, green, blue; the encoder reads (x - mean) / std.
        interpolation: "bicubic" or "bilinear", antialiased.
        frame, background: what "as trained" means (see `Framing`).
    """

    size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    frame: str = "center"
    background: str = "mean colour"

    def normalise(self, seen_B3SS: torch.Tensor) -> torch.Tensor:
        """Pictures in [0, 1] -> the encoder's input."""
        mean_311 = torch.tensor(self.mean, device=seen_B3SS.device, dtype=seen_B3SS.dtype)[:, None, None]
        std_311 = torch.tensor(self.std, device=seen_B3SS.device, dtype=seen_B3SS.dtype)[:, None, None]
        return (seen_B3SS - mean_311) / std_311

    def fill(self, background: str) -> tuple[float, float, float]:
        """The background's colour."""
        choice = self.background if background == AS_TRAINED else background
        return {"white": WHITE, "black": BLACK, "mean colour": self.mean}[choice]


def prepare_pictures(
    image_BHW3: torch.Tensor, mask_BHW: torch.Tensor | None, preparation: Preparation, framing: Framing
) -> torch.Tensor:
    """Pictures in [0, 1] -> (B, 3, S, S) in [0, 1].

    The short side is resized to S and the rest cropped as open_clip's "shortest" does, padded as its "longest", or
    stretched as its "squash"; cropping to the mask pads the object's surroundings to a square.

    Raises:
        ImageInputError: no picture, not RGB, masks of another number or size, or one that leaves nothing to see.
    """
    check_pictures(image_BHW3, mask_BHW)
    seen = []
    for index, image_HW3 in enumerate(image_BHW3):
        mask_HW = None if mask_BHW is None else mask_BHW[index if len(mask_BHW) > 1 else 0]
        seen.append(_prepare(rearrange(image_HW3, "h w c -> 1 c h w").float(), mask_HW, preparation, framing))
    return torch.cat(seen)


def crop_note(height: int, width: int, preparation: Preparation, framing: Framing) -> str | None:
    """What is to be said of a picture that is much longer one way than the other and is cropped: most of it is not seen."""
    frame = preparation.frame if framing.frame == AS_TRAINED else framing.frame
    short, long = sorted((height, width))
    if frame not in _CROPS or long < _MUCH_LONGER * short:
        return None
    return (f"cropped: of {width} x {height} the encoder sees {short} x {short}, {short / long:.0%} of the picture. Choose "
            "another frame (pad shows all of it), or crop the picture.")


def check_pictures(image_BHW3: torch.Tensor, mask_BHW: torch.Tensor | None) -> None:
    """Refuse what is no batch of RGB pictures with masks of their size, one for all or one for each.

    Raises:
        ImageInputError: what was found and what was wanted.
    """
    if image_BHW3.ndim != 4 or image_BHW3.shape[-1] != 3 or 0 in image_BHW3.shape:
        raise ImageInputError(
            f"reference pictures of shape {tuple(image_BHW3.shape)}; wanted (pictures, height, width, 3) with at least "
            "one picture. Give RGB pictures."
        )
    if mask_BHW is not None and (mask_BHW.ndim != 3 or mask_BHW.shape[1:] != image_BHW3.shape[1:3]
                                 or mask_BHW.shape[0] not in (1, image_BHW3.shape[0])):
        raise ImageInputError(
            f"a mask of shape {tuple(mask_BHW.shape)} for pictures of shape {tuple(image_BHW3.shape)}; wanted one mask, or "
            "one for each picture, (masks, height, width) of the same size. Resize the mask to the picture."
        )


def mask_box(mask_HW: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, left, bottom, right (exclusive) of the object in a mask.

    Raises:
        ImageInputError: the mask is empty.
    """
    if not mask_HW.max() > 0:
        raise ImageInputError("the mask is all black; white marks the object to keep. Paint the mask, or disconnect it.")
    rows, columns = (mask_HW >= _OBJECT * mask_HW.max()).nonzero(as_tuple=True)
    return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1


def _prepare(image_13HW, mask_HW, preparation: Preparation, framing: Framing) -> torch.Tensor:
    fill = preparation.fill(framing.background)
    if mask_HW is None:
        return _framed(image_13HW, None, fill, preparation, framing)
    keep_HW = _stretched(mask_HW).to(image_13HW)
    box = mask_box(mask_HW) if framing.crop_to_mask else None
    kept_13SS = _framed(keep_HW.expand(1, 3, -1, -1), box, BLACK, preparation, framing)
    if not kept_13SS.mean() >= _LEAST_SEEN:
        raise ImageInputError(f"the mask leaves {kept_13SS.mean():.3%} of what the encoder sees; white marks the object to "
                              "keep. Invert or paint the mask, crop to it, choose another frame, or disconnect it.")
    return _framed(image_13HW * keep_HW + _colour(fill, image_13HW) * (1 - keep_HW), box, fill, preparation, framing)


def _stretched(mask_HW: torch.Tensor) -> torch.Tensor:
    """The mask, or if it is faint, such as one of levels 0 and 1 of 255, as bright as it was meant."""
    brightest = mask_HW.max()
    if not 0 < brightest < _FAINT:
        return mask_HW
    warnings.warn(f"a mask whose brightest value is {brightest:.3g} instead of 1 is stretched; save masks with white objects, "
                  "255 in 8 bits", EmmaWarning, stacklevel=2)
    return mask_HW / brightest


def _framed(image_13HW, box, fill, preparation: Preparation, framing: Framing) -> torch.Tensor:
    """The encoder's square of a picture, or of the surroundings of a box."""
    size_px = preparation.size_px
    frame = preparation.frame if framing.frame == AS_TRAINED else framing.frame
    if box is not None:
        side = max(box[2] - box[0], box[3] - box[1]) * (1 + 2 * framing.margin)
        return _placed(image_13HW, box, side, size_px, fill, preparation.interpolation)
    if frame == "pad":
        height, width = image_13HW.shape[-2:]
        return _placed(image_13HW, (0, 0, height, width), max(height, width), size_px, fill, preparation.interpolation)
    if frame == "stretch":
        return _resized(image_13HW, (size_px, size_px), preparation.interpolation)
    return _cropped(image_13HW, size_px, _CROPS[frame], preparation.interpolation)


def _cropped(image_13HW, size_px: int, position: tuple[float, float], interpolation: str) -> torch.Tensor:
    """Short side to S, then S x S of the rest."""
    image_13HW = _without_excess(image_13HW, position)
    height, width = image_13HW.shape[-2:]
    short = min(height, width)
    resized = (max(size_px, int(size_px * height / short)), max(size_px, int(size_px * width / short)))
    image_13HW = _resized(image_13HW, resized, interpolation)
    top, left = (round((extent - size_px) * share) for extent, share in zip(resized, position, strict=True))
    return image_13HW[..., top:top + size_px, left:left + size_px]


def _without_excess(image_13HW: torch.Tensor, position: tuple[float, float]) -> torch.Tensor:
    """A very long picture without the ends that cropping would remove anyway."""
    most = _LONGEST_SHAPE * min(image_13HW.shape[-2:])
    for dim, share in zip((-2, -1), position, strict=True):
        extent = image_13HW.shape[dim]
        if extent > most:
            image_13HW = image_13HW.narrow(dim, round((extent - most) * share), most)
    return image_13HW


def _placed(image_13HW, box, side: float, size_px: int, fill, interpolation: str) -> torch.Tensor:
    """A square of `side` pixels around the box's centre, resized to S; beyond the picture lies the fill."""
    scale = size_px / side
    spans, offsets = [], []
    for (start, end), extent in zip(((box[0], box[2]), (box[1], box[3])), image_13HW.shape[-2:], strict=True):
        edge = (start + end - side) / 2
        first, last = max(0, int(edge)), min(extent, -int(-(edge + side) // 1))
        length = min(size_px, max(1, round((last - first) * scale)))
        before, after = max(0.0, first - edge), max(0.0, edge + side - last)
        spans.append((first, last, length))
        offsets.append(int((size_px - length) * before / (before + after)) if before + after else 0)
    (top, bottom, height), (left, right, width) = spans
    part = _resized(image_13HW[..., top:bottom, left:right], (height, width), interpolation)
    canvas = _colour(fill, part).expand(1, 3, size_px, size_px).clone()
    canvas[..., offsets[0]:offsets[0] + height, offsets[1]:offsets[1] + width] = part
    return canvas


def _resized(image_13HW: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """By Pillow, as the published pipelines do: antialiased, in 8 bits."""
    levels_HW3 = (rearrange(image_13HW, "1 c h w -> h w c").clamp(0, 1) * _LEVELS).round().to("cpu", torch.uint8).numpy()
    resized = Image.fromarray(levels_HW3).resize((size[1], size[0]), _FILTERS[interpolation])
    resized_HW3 = torch.from_numpy(np.array(resized)).to(image_13HW.device)
    return rearrange(resized_HW3, "h w c -> 1 c h w").to(image_13HW.dtype) / _LEVELS


def _colour(fill: tuple[float, float, float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(fill, dtype=like.dtype, device=like.device).view(1, 3, 1, 1)
