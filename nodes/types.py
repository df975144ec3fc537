"""Socket types of the pack and what its schemas share."""

from comfy_api.latest import io

CATEGORY = "EMMA"
ADVANCED = {"advanced": True}  # shown by the editor on demand

Ella = io.Custom("ELLA")
Module = io.Custom("EMMA_MODULE")
Encoder = io.Custom("EMMA_ENCODER")
Reference = io.Custom("EMMA_REFERENCE")
Assembly = io.Custom("EMMA_ASSEMBLY")
