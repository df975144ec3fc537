"""IMAGE and MASK of the host, checked and brought to what encoders take.

Shapes: B pictures of height H and width W, C channels.
"""

import torch
import torch.nn.functional as F

from ..emma_core.errors import ImageInputError

WHITE = 1.0


def rgb_pictures(image_BHWC: torch.Tensor) -> torch.Tensor:
    """Any IMAGE as RGB (B, H, W, 3) in [0, 1]; grey is repeated, transparency becomes white.

    Raises:
        ImageInputError: empty batch or picture, other channel counts, NaN, values in 0..255.
    """
    if image_BHWC.ndim == 3:
        image_BHWC = image_BHWC[None]
    if image_BHWC.ndim != 4 or 0 in image_BHWC.shape:
        raise ImageInputError(f"the image batch is empty or misshapen (shape {tuple(image_BHWC.shape)}); wanted (pictures, "
                              "height, width, channels) with at least one picture. Check the node before this one.")
    if not torch.isfinite(image_BHWC).all():
        raise ImageInputError("a reference picture holds NaN or infinite values; wanted 0 to 1. The node that made it "
                              "failed (a VAE in float16 is a common cause): repair it there.")
    if image_BHWC.max() > 2.0:
        raise ImageInputError(f"a reference picture holds values up to {image_BHWC.max():.0f}; wanted 0 to 1. "
                              "Divide it by 255.")
    image_BHWC = image_BHWC.float().clamp(0, 1)
    channels = image_BHWC.shape[-1]
    if channels == 3:
        return image_BHWC
    if channels == 1:
        return image_BHWC.expand(-1, -1, -1, 3)
    if channels == 4:
        colour, alpha = image_BHWC[..., :3], image_BHWC[..., 3:]
        return colour * alpha + WHITE * (1 - alpha)
    raise ImageInputError(f"a reference picture has {channels} channels; wanted 1 (grey), 3 (RGB) or 4 (RGBA). "
                          "Convert it to RGB.")


def object_masks(mask: torch.Tensor | None, image_BHW3: torch.Tensor) -> torch.Tensor | None:
    """A MASK (white = the object) as (B, H, W) of the pictures' size, or None.

    Raises:
        ImageInputError: empty, all black, NaN, or neither one mask nor one per picture.
    """
    if mask is None:
        return None
    mask_MHW = mask.float()
    if mask_MHW.ndim == 4 and mask_MHW.shape[1] == 1:
        mask_MHW = mask_MHW[:, 0]
    if mask_MHW.ndim == 2:
        mask_MHW = mask_MHW[None]
    pictures, height, width, _ = image_BHW3.shape
    if mask_MHW.ndim != 3 or 0 in mask_MHW.shape or not torch.isfinite(mask_MHW).all():
        raise ImageInputError(f"the mask is empty, misshapen or not finite (shape {tuple(mask.shape)}); wanted (masks, "
                              "height, width) with values 0 to 1. Check the node that makes it.")
    if mask_MHW.shape[0] not in (1, pictures):
        raise ImageInputError(f"{mask_MHW.shape[0]} masks for {pictures} reference pictures; wanted 1 or {pictures}.")
    for index, one in enumerate(mask_MHW):
        if one.max() <= 0:
            raise ImageInputError(
                f"mask {index + 1} is all black, so nothing of the picture would be left; white marks the object to keep. "
                "Load Image gives a black mask for pictures without transparency, and the inverse of it otherwise: add "
                "Invert Mask, or disconnect the mask to use the whole picture."
            )
    resized = F.interpolate(mask_MHW[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
    return resized.clamp(0, 1).expand(pictures, -1, -1)
