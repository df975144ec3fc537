"""Small pictures in a file's metadata, as model managers show them (ModelSpec's `modelspec.thumbnail`)."""

from __future__ import annotations

import base64
import binascii
import io

import torch
from PIL import Image

LARGEST_PX = 256
KEY = "modelspec.thumbnail"


def data_uri(picture_HW3: torch.Tensor) -> str:
    """A picture in [0, 1] as a JPEG data URI, at most LARGEST_PX wide and high."""
    image = Image.fromarray((picture_HW3.cpu() * 255).round().byte().numpy())
    image.thumbnail((LARGEST_PX, LARGEST_PX))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def jpeg_of(uri: str) -> bytes:
    """The picture of a data URI as `data_uri` makes it; nothing of any other text."""
    head, _, content = uri.partition(",")
    if head != "data:image/jpeg;base64":
        return b""
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error:
        return b""
