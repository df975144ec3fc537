"""Reference encoders under the host's memory management.

Shapes: B pictures of height H and width W, S the encoder's input size; features are (B, vectors, dim).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from einops import rearrange

from ..emma_core.encoders.base import Encoded, FeatureCache, PictureEncoder, ReferenceEncoder
from ..emma_core.encoders.clip_vision import (
    bytes_per_picture,
    canonical_names,
    clip_preparation,
    load_clip_vision,
    read_clip_vision,
    recognise_clip,
)
from ..emma_core.encoders.families import CLIP_TOWERS, MEAN, STD
from ..emma_core.encoders.loading import encoder_kind
from ..emma_core.encoders.matching import encode_for_module
from ..emma_core.encoders.miniature import load as load_miniature
from ..emma_core.encoders.options import FaceChoice, Framing
from ..emma_core.encoders.pictures import Preparation, crop_note
from ..emma_core.encoders.playground import load_playground_encoder
from ..emma_core.encoders.weights import weights_path
from ..emma_core.errors import EncoderFileError
from ..emma_core.files.tensor_file import fingerprint_of_weights
from ..emma_core.model.reference_features import ReferenceFeatures
from ..emma_core.playground import PLAYGROUND_DIR
from .images import object_masks, rgb_pictures
from .loaded import LoadedEncoder, LoadedModule, patcher_for

MOST_AT_ONCE = 16
FREE_SHARE = 0.5  # of the free memory that one chunk of pictures may take
_UNKNOWN_TOWER_BYTES = 128 << 20
# what is kept of the host's own CLIP_VISION objects, for as long as they live
_STOCK: weakref.WeakKeyDictionary[Any, tuple[Mapping[str, Any], FeatureCache]] = weakref.WeakKeyDictionary()


class HostClipVision(PictureEncoder):
    """The host's CLIP_VISION: `global` is the projected embedding, `local` the hidden states of the declared layer.

    Args:
        clip_vision: the host's object.
        description: {family, fingerprint, input_size}.
    """

    feature_names = ("global", "local")

    def __init__(self, clip_vision, description: Mapping[str, Any]):
        self._clip_vision = clip_vision
        self.model = clip_vision.model
        self.description = description
        tower = CLIP_TOWERS.get(description["family"])
        self.preparation = clip_preparation(tower) if tower else Preparation(clip_vision.image_size, MEAN, STD)
        self.bytes_per_picture = bytes_per_picture(tower) if tower else _UNKNOWN_TOWER_BYTES

    def features_of(self, seen_B3SS, options) -> dict[str, torch.Tensor]:
        # pictures that have the right size already are only normalised by the host
        output = self._clip_vision.encode_image(rearrange(seen_B3SS, "b c h w -> b h w c"), crop=True)
        local = output["penultimate_hidden_states" if options.layer == "penultimate" else "last_hidden_state"]
        return {"global": output["image_embeds"][:, None], "local": local}


class ManagedEncoder:
    """A reference encoder that the host loads before use; short of memory, it encodes fewer pictures at once."""

    def __init__(self, encoder: ReferenceEncoder, patcher):
        self._encoder = encoder
        self._patcher = patcher
        self.model = encoder.model
        self.description = encoder.description
        self.feature_names = encoder.feature_names
        self.bytes_per_picture = encoder.bytes_per_picture
        # of encoders of whole pictures; those of faces look for them
        self.preparation = encoder.preparation if isinstance(encoder, PictureEncoder) else None

    def at_once(self) -> int:
        """Pictures that fit into the free memory together."""
        free = comfy.model_management.get_free_memory(self._patcher.load_device)
        return int(min(MOST_AT_ONCE, max(1, free * FREE_SHARE // self.bytes_per_picture)))

    def encode(self, image_BHW3, mask_BHW, options, labels: Sequence[str] = ()) -> list[Encoded]:
        """As `ReferenceEncoder.encode`."""
        count = len(image_BHW3)
        # layers that are not the host's own cannot run in part on another device
        comfy.model_management.load_models_gpu([self._patcher], memory_required=count * self.bytes_per_picture,
                                               force_full_load=True)
        try:
            return self._encoder.encode(image_BHW3, mask_BHW, options, labels)
        except torch.cuda.OutOfMemoryError:
            if count == 1:
                raise
        comfy.model_management.soft_empty_cache()
        logging.warning("EMMA: out of memory with %d reference pictures at once; encoding them in halves.", count)
        encoded = []
        for part in (slice(None, count // 2), slice(count // 2, None)):
            encoded += self.encode(image_BHW3[part], None if mask_BHW is None else mask_BHW[part], options, labels[part])
        return encoded


def load_playground_reference_encoder() -> LoadedEncoder:
    """The shipped encoder, of whichever kind it is."""
    return load_reference_encoder(str(PLAYGROUND_DIR / "encoder.safetensors"))


def load_reference_encoder(path: str, open_clip_model: str | None = None) -> LoadedEncoder:
    """A reference encoder file or folder, recognised by its tensors; CLIP runs in the host's implementation.

    Raises:
        EncoderFileError: see `emma_core.encoders.loading.load_encoder`.
    """
    kind = encoder_kind(path, open_clip_model)
    if kind.name in _OWN_WAYS:
        return _OWN_WAYS[kind.name](weights_path(path))
    encoder = kind.load(Path(path), open_clip_model)
    return _managed(encoder, patcher_for(encoder.model))


def _load_playground(path: Path) -> LoadedEncoder:
    encoder = load_playground_encoder(path, operations=comfy.ops.manual_cast)
    return _managed(encoder, patcher_for(encoder.model))


def _load_clip(path: Path) -> LoadedEncoder:
    tensors, family = read_clip_vision(path)
    description = _clip_description(tensors, family)  # before the host loads them: it takes out what it has loaded
    clip_vision = comfy.clip_vision.load_clipvision_from_sd(tensors)
    if clip_vision is None:  # of a size that the host has no configuration for
        return _of_transformers(load_clip_vision(path))
    return _managed(HostClipVision(clip_vision, description), clip_vision.patcher)


def _load_miniature(path: Path) -> LoadedEncoder:
    return _of_transformers(load_miniature(path))


def _of_transformers(encoder: ReferenceEncoder) -> LoadedEncoder:
    # the patcher sets attributes that transformers' models have as properties
    return _managed(encoder, patcher_for(torch.nn.ModuleList([encoder.model])))


_OWN_WAYS = {"playground": _load_playground, "clip": _load_clip, "miniature": _load_miniature}


def as_encoder(encoder) -> LoadedEncoder:
    """EMMA_ENCODER, or the host's CLIP_VISION as one.

    Raises:
        EncoderFileError: a CLIP_VISION that is no CLIP.
    """
    if isinstance(encoder, LoadedEncoder):
        return encoder
    if encoder not in _STOCK:
        _STOCK[encoder] = (_stock_description(encoder), FeatureCache())
    description, cache = _STOCK[encoder]
    return LoadedEncoder(ManagedEncoder(HostClipVision(encoder, description), encoder.patcher), encoder.patcher, cache)


def encode_reference(
    module: LoadedModule, encoder, image: torch.Tensor, mask: torch.Tensor | None, combine: str,
    framing: Framing | None = None, faces: FaceChoice | None = None, tell: Callable[[str], None] = lambda note: None,
) -> tuple[ReferenceFeatures, torch.Tensor]:
    """Features that the module needs, of one or several pictures, and what the encoder saw.

    Args:
        tell: told what the log is told of pictures that are cropped.
    Raises:
        ReferenceMismatchError: the encoder is not the one the module needs.
        ImageInputError: unusable picture or mask; no face.
    """
    image_BHW3 = rgb_pictures(image)
    mask_BHW = object_masks(mask, image_BHW3)
    config = module.module.config
    loaded = as_encoder(encoder)
    if config.encoder.get("masked") and mask_BHW is None:
        logging.warning("EMMA: the %s module was trained on objects without their background; connect a MASK of the object "
                        "for the best likeness.", config.condition)
    framing = framing or Framing()
    if loaded.encoder.preparation and not (framing.crop_to_mask and mask_BHW is not None):
        note = crop_note(*image_BHW3.shape[1:3], loaded.encoder.preparation, framing)
        if note:
            logging.warning("EMMA Encode Reference Image: %s", note)
            tell(note)
    progress = comfy.utils.ProgressBar(len(image_BHW3))

    def after_chunk(done: int) -> None:
        if done:
            progress.update(done)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return encode_for_module(loaded.encoder, config, image_BHW3, mask_BHW, combine, framing, faces, cache=loaded.cache,
                             at_once=loaded.encoder.at_once(), after_chunk=after_chunk)


def _managed(encoder: ReferenceEncoder, patcher) -> LoadedEncoder:
    return LoadedEncoder(ManagedEncoder(encoder, patcher), patcher)


def _clip_description(tensors: Mapping[str, torch.Tensor], family: str) -> dict[str, Any]:
    return {"family": family, "fingerprint": fingerprint_of_weights(tensors), "input_size": CLIP_TOWERS[family].input_px}


def _stock_description(clip_vision) -> dict[str, Any]:
    tower = getattr(clip_vision.model, "vision_model", None)
    if getattr(getattr(tower, "embeddings", None), "class_embedding", None) is None:
        raise EncoderFileError("this CLIP_VISION is no CLIP model (SigLIP and DINOv2 are others). Load the image encoder "
                               "named by the EMMA module (CLIP ViT-H/14 for the released conditions).")
    tensors = canonical_names(clip_vision.get_sd())
    family = recognise_clip(tensors)
    if family is not None:
        return _clip_description(tensors, family)
    hidden = tower.embeddings.class_embedding.shape[-1]
    projected = tensors["visual_projection.weight"].shape[0] if "visual_projection.weight" in tensors else hidden
    return {"family": f"clip-{hidden}-{projected}", "fingerprint": fingerprint_of_weights(tensors),
            "input_size": clip_vision.image_size}
