"""Socket types of the pack and what its schemas share."""

from comfy_api.latest import io

CATEGORY = "EMMA"

Ella = io.Custom("ELLA")
Module = io.Custom("EMMA_MODULE")
Encoder = io.Custom("EMMA_ENCODER")
Reference = io.Custom("EMMA_REFERENCE")
Assembly = io.Custom("EMMA_ASSEMBLY")


def advanced(widget: io.Input) -> io.Input:
    """A widget that the editor shows on demand; set afterwards, as the oldest host takes no such argument."""
    widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return widget
