"""CLIP vision towers that modules name, told apart by their tensor shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training pictures


@dataclass(frozen=True)
class ClipTower:
    """Sizes of a CLIP vision transformer; `hidden_act` is what shapes do not tell."""

    title: str
    hidden: int
    layers: int
    patch_px: int
    input_px: int
    projected: int
    heads: int
    mlp: int
    hidden_act: str

    @property
    def vectors(self) -> int:
        """Of the hidden states: the class token and one for each patch."""
        return (self.input_px // self.patch_px) ** 2 + 1

    def describe(self) -> str:
        """Name and size for messages."""
        return f"{self.title} (hidden {self.hidden}, projected {self.projected}, {self.layers} layers, {self.input_px} px)"


CLIP_TOWERS = {
    "clip-vit-h-14": ClipTower("CLIP ViT-H/14", 1280, 32, 14, 224, 1024, 16, 5120, "gelu"),
    "clip-vit-l-14": ClipTower("CLIP ViT-L/14", 1024, 24, 14, 224, 768, 16, 4096, "quick_gelu"),
    "clip-vit-l-14-336": ClipTower("CLIP ViT-L/14 at 336 px", 1024, 24, 14, 336, 768, 16, 4096, "quick_gelu"),
    "clip-vit-bigg-14": ClipTower("CLIP ViT-bigG/14", 1664, 48, 14, 224, 1280, 16, 8192, "gelu"),
    "clip-miniature": ClipTower("the CLIP of SD1.5 in miniature", 160, 5, 8, 64, 128, 5, 640, "quick_gelu"),  # lab/miniature
}


def encoder_title(family: str | None) -> str:
    """What a message calls an encoder family."""
    if not family:
        return "an unnamed encoder"
    return CLIP_TOWERS[family].describe() if family in CLIP_TOWERS else family
