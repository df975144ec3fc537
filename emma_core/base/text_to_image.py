"""Pictures without ComfyUI from the files that a user names: a base, perhaps an ELLA, modules, reference encoders.

Shapes: B pictures H x W, T timesteps, latents 4 x h x w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..encoders.loading import load_encoders
from ..encoders.matching import encode_for_module, encoder_for
from ..files.module_file import load_module
from ..files.writing import write_picture
from ..model.gated_resampler import GatedResampler
from .config import BaseConfig, EllaConfig
from .parts import AUTOENCODER, TEXT_ENCODER, UNET, load_base_parts
from .pipeline import Pipeline, Request, Sampling, generate, pipeline_for
from .precision import precision_on


class TextToImage:
    """A frozen base with its ELLA and reference encoders, loaded.

    Args:
        base, ella: as in a training configuration; the playground brings its own, and without an ELLA the base's text encoders
            are used.
        encoder_files: reference encoders; each module takes the one that it was trained with.
        open_clip_model: open_clip's name of an encoder, where its file does not tell.
        precision: of the diffusion model: fp32, fp16, bf16.
    Raises:
        EmmaError: a file that cannot be used, parts that do not fit together, see the loaders.
    """

    def __init__(self, base: BaseConfig, ella: EllaConfig, encoder_files: Sequence[str], open_clip_model: str,
                 precision: str, device: torch.device):
        on_device = precision_on(precision, device)
        self._device, self._autocast_dtype = device, on_device.autocast
        self._parts = load_base_parts(base, ella, on_device.weights, device)
        self._connector = self._parts.connector_on_device()
        self._encoders = load_encoders(encoder_files, open_clip_model or None)

    def load_module(self, file: str) -> GatedResampler:
        """A module for this ELLA or these tokens, of which the reference encoder is here.

        Raises:
            EmmaError: it cannot be read, fits another ELLA or base, or none of the encoders is its own.
        """
        module = load_module(file, device=self._device)
        self._connector.check_fits(module)
        encoder_for(module, self._encoders)
        return module

    def features(
        self, module: GatedResampler, image_1HW3: torch.Tensor, mask_1HW: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """What a module reads of a picture in [0, 1]: feature name -> (1, vectors, dim).

        Raises:
            ImageInputError, NoFaceError: the picture cannot be used.
            ReferenceMismatchError: the encoder is not the module's.
        """
        encoder = encoder_for(module, self._encoders)
        self._parts.place()  # a small card does not hold a large encoder beside them
        encoder.model.to(self._device)
        try:
            reference, _ = encode_for_module(encoder, module.config, image_1HW3, mask_1HW)
        finally:
            encoder.model.to("cpu")
        return {name: tensor.to(self._device) for name, tensor in reference.features.items()}

    def draw(self, requests: Sequence[Request], sampling: Sampling, weighted: bool = False) -> list[Image.Image]:
        """A picture for each request.

        Args:
            weighted: brackets in prompts give weights, as in ComfyUI.
        Raises:
            TextInputError: a weight that is no finite number.
            ReferenceMismatchError: a reference does not fit.
        """
        self._parts.place(UNET, AUTOENCODER, TEXT_ENCODER)
        with self._autocast():
            pictures_BHW3 = generate(self._pipeline(weighted), requests, sampling)
        levels = (pictures_BHW3.float() * 255).round().byte().numpy()
        return [Image.fromarray(picture) for picture in levels]

    def _autocast(self, enabled: bool = True) -> torch.autocast:
        return torch.autocast(self._device.type, self._autocast_dtype, enabled and self._autocast_dtype is not None)

    def _pipeline(self, weighted: bool) -> Pipeline:
        encoder = self._parts.text_encoder
        encode = encoder.encode_weighted if weighted else encoder.encode

        def texts(prompts: Sequence[str]) -> list[torch.Tensor]:
            with self._autocast(False):  # text encoders have a precision of their own
                return [features.float() for features in encode(prompts)]

        def pooled(prompts: Sequence[str]) -> list[torch.Tensor]:
            with self._autocast(False):
                return [vector.float() for vector in self._parts.pooled(prompts, weighted)]

        return pipeline_for(self._parts.backbone, self._connector, texts, pooled)


def save_picture(picture: Image.Image, path: Path, words: Mapping[str, str]) -> None:
    """As PNG, with what it shows in its text entries, `emma_` before each name; the file appears when it is whole."""
    about = PngInfo()
    for name, text in words.items():
        about.add_itxt(f"emma_{name}", text.encode("utf-8", "replace").decode("utf-8"))  # names of files may be no text
    write_picture(path, picture, pnginfo=about)
