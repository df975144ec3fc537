"""A folder of pictures for Train EMMA Module, read, checked and cached as the command line does.

Shapes: B pictures of height H and width W in pixels, h x w their latents; N text tokens of width D.
"""

import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from einops import rearrange
from PIL import Image

from ..emma_core.errors import TrainingDataError
from ..emma_core.files.picture_file import open_picture, picture_tensor
from ..emma_core.files.tensor_file import fingerprint_of_weights
from ..emma_core.training.config import DataConfig, EncoderConfig, TrainConfig
from ..emma_core.training.examples import Example, describe, read_examples, require
from ..emma_core.training.parts import options_of, weights_mark
from ..emma_core.training.prepare import Encoders, prepare
from ..emma_core.training.prepared import Prepared
from .images import rgb_pictures
from .latents import normal, scaled
from .own_text import OwnTexts
from .picture_folders import WIRED, folder_path

_PROBE = f"a photo of a cat, 3 dogs and ({string.printable.strip()}) naïve 猫"


@dataclass(frozen=True, eq=False)
class TrainingFolder:
    """The EMMA_TRAINING_SET that travels through the graph: checked pictures, and what encodes them.

    Args:
        examples: pictures, captions, groups, references.
        data: sizes, variants of references.
        masked: whether references lose their background.
        vae, clip: VAE and CLIP.
    """

    examples: tuple[Example, ...]
    data: DataConfig
    masked: bool
    vae: Any
    clip: Any

    def __repr__(self) -> str:
        """Short: the host shows what is wired into a node that failed."""
        return f"<EMMA_TRAINING_SET of {len(self.examples)} pictures>"

    def captions(self) -> list[str]:
        """Every text once, the empty one first: it takes the place of dropped ones."""
        return list(dict.fromkeys(["", *(text for example in self.examples for text in example.captions)]))


def load_training_folder(
    name: str, data: Mapping[str, Any], masked: bool, vae, clip, images: Sequence[torch.Tensor] = (),
    texts: Sequence[str] = (),
) -> tuple[TrainingFolder, str]:
    """The pictures of a folder below the input folder, or wired ones, and what is in them, in words.

    Args:
        name: of `picture_folders.folder_names`.
        data: settings of `DataConfig`.
        masked: whether references lose their background.
        images, texts: IMAGEs of any sizes and a text for each (or one for all), where ``name`` is `WIRED`.
    Raises:
        TrainingDataError: every problem that stops training; pictures both wired and named, or neither.
        ImageInputError: wired pictures that are none.
    """
    if (name == WIRED) != bool(len(images)):
        raise TrainingDataError("no pictures: no folder is chosen, and none are wired. Choose a folder below input, or wire "
                                "`images`." if name == WIRED else f"the folder {name} is chosen, and pictures are wired too. "
                                f"Choose `{WIRED}`, or remove the wires.")
    folder = _written(images, texts) if name == WIRED else folder_path(name)
    settings = DataConfig(folder=str(folder), workers=0, **data)
    examples, problems = read_examples(settings)
    require(examples, problems)
    return TrainingFolder(tuple(examples), settings, masked, vae, clip), describe(examples, problems, settings)


def cache_folder() -> Path:
    """Of latents, texts and features, for all runs in the graph."""
    return Path(folder_paths.get_output_directory()) / "emma_training" / "cache"


@dataclass(frozen=True, eq=False)
class FolderSet(Prepared):
    """A prepared folder; its texts are ELLA's, or with ``own`` the MODEL's own."""

    own: OwnTexts | None = None

    @property
    def latents(self) -> list[torch.Tensor]:
        """Zeros of the latents' shapes, which take no memory."""
        return [torch.zeros(()).expand(self.latent(index).shape) for index in range(len(self))]

    def text(self, caption: str) -> torch.Tensor:
        return super().text(caption) if self.own is None else self.own.tokens(self.own.index(caption)).float()

    def reference_images(self) -> Iterator[torch.Tensor]:
        """IMAGEs (1, H, W, 3) of the references, by their indices."""
        return (picture_tensor(open_picture(picture)) for picture in self.pictures.pictures)

    def fingerprint(self) -> str:
        """Of everything in it: keys of the cache are made of contents."""
        parts = [str(store.folder.name) for store in self.stores if store is not None]
        captions = [[list(example.captions), example.group] for example in self.examples]
        variants = {str(index): keys for index, keys in self.variant_keys.items()}
        references = [self.references(index) for index in range(len(self))]
        described = json.dumps([parts, self.latent_keys, captions, variants, references])
        marks = fingerprint_of_weights(self.own.marks()) if self.own else ""
        return hashlib.sha256(f"{described} {marks}".encode("utf-8", "surrogatepass")).hexdigest()


def prepared_folder(folder: TrainingFolder, config: TrainConfig, encoder, model, own: OwnTexts | None) -> FolderSet:
    """Everything encoded that the cache lacks.

    Args:
        encoder: LoadedEncoder.
        model: MODEL.
        own: the texts, where they are the MODEL's own.
    Raises:
        TrainingDataError: every picture that cannot be used, latents that are not the MODEL's.
        ReferenceMismatchError, TrainingError: see `prepare`.
        InterruptProcessingException: the host's Cancel; what is encoded is kept.
    """
    encoders = Encoders(
        encode_latents=lambda pixels_B3HW: _latents(folder.vae, model, pixels_B3HW),
        # the MODEL's own texts stay in memory, with their pooled vectors: the cache holds an empty mark of each
        encode_texts=lambda captions: [torch.zeros(1, 0, 1) if own else text_of(folder.clip, text)[0][0] for text in captions],
        reference_encoder=encoder.encoder,
        latents_settings=f"{fingerprint_of_weights(folder.vae.first_stage_model.state_dict())} {folder.vae.vae_dtype} "
                         f"{type(model.model.latent_format).__name__}",
        texts_settings="own" if own else _mark_of(folder.clip),
    )
    with torch.inference_mode(False):
        found = prepare(folder.examples, folder.data, EncoderConfig(masked=folder.masked), encoders, options_of(config),
                        cache_folder(), _progress())
    return FolderSet(**{field.name: getattr(found, field.name) for field in fields(Prepared)}, own=own)


def text_of(clip, text: str) -> list[list]:
    """A text as the stock CLIP Text Encode gives it, but in tensors that autograd takes."""
    with torch.inference_mode():
        entries = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return [[normal(tokens), {name: normal(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                              for name, value in options.items()}] for tokens, options in entries]


def _latents(vae, model, pixels_B3HW: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        samples = vae.encode(rearrange(pixels_B3HW / 2 + 0.5, "b c h w -> b h w c"))
        return normal(scaled(model, samples))


def _mark_of(clip) -> str:
    """Changes when the texts that a CLIP gives do."""
    patches = str(clip.patcher.patches_uuid) if clip.patcher.patches else ""
    ids = json.dumps(clip.tokenize(_PROBE), default=str) + json.dumps(clip.tokenize(""), default=str)
    return f"{weights_mark(clip.cond_stage_model)} {clip.layer_idx} {patches} {hashlib.sha256(ids.encode()).hexdigest()}"


def _progress():
    bars: dict[str, comfy.utils.ProgressBar] = {}

    def tell(what: str, done: int, total: int) -> None:
        if total:
            bars.setdefault(what, comfy.utils.ProgressBar(total)).update_absolute(done)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return tell


def _written(images: Sequence[torch.Tensor], texts: Sequence[str]) -> Path:
    """A folder of the cache with these pictures and texts, named after them."""
    pictures = [picture for image in images for picture in rgb_pictures(image)]
    if len(texts) not in (0, 1, len(pictures)):
        raise TrainingDataError(f"{len(texts)} texts for {len(pictures)} pictures; wanted one for each, one for all, or none.")
    texts = list(texts or [""]) * (len(pictures) if len(texts) < 2 else 1)
    arrays = [(picture * 255).round().byte().numpy() for picture in pictures]
    digest = hashlib.sha256()
    for array, text in zip(arrays, texts, strict=True):
        digest.update(f"{array.shape} {text}".encode("utf-8", "surrogatepass") + np.ascontiguousarray(array).tobytes())
    folder = cache_folder() / "pictures" / digest.hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    for number, (array, text) in enumerate(zip(arrays, texts, strict=True), 1):
        Image.fromarray(array).save(folder / f"{number:05d}.png")
        (folder / f"{number:05d}.txt").write_text(text, encoding="utf-8")
    return folder
