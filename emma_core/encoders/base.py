"""What every reference encoder offers, and encoding of many pictures in chunks, each picture once.

Shapes: B pictures of height H and width W, S the encoder's input size, R references of one picture (1, or its faces),
V vectors of a feature, D its dim.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import nn

from ..errors import ReferenceMismatchError
from .kinds import suggestion
from .options import EncodeOptions
from .pictures import Preparation, check_pictures, prepare_pictures

CACHE_BYTES = 256 << 20
AT_ONCE = 8


@dataclass(frozen=True, eq=False)
class Encoded:
    """One picture's features, name -> (R, V, D), and what the encoder saw of it, (R, S, S, 3) in [0, 1]."""

    features: Mapping[str, torch.Tensor]
    seen_RSS3: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.seen_RSS3.nbytes + sum(tensor.nbytes for tensor in self.features.values())


class ReferenceEncoder(Protocol):
    """An encoder of reference pictures.

    ``model`` is what memory management moves; ``description`` is {family, fingerprint, input_size} as in a module's
    metadata; ``bytes_per_picture`` is the working memory that one more picture at once takes, about.
    """

    model: nn.Module
    description: Mapping[str, Any]
    feature_names: tuple[str, ...]
    bytes_per_picture: int

    def encode(
        self, image_BHW3: torch.Tensor, mask_BHW: torch.Tensor | None, options: EncodeOptions, labels: Sequence[str] = ()
    ) -> list[Encoded]:
        """One `Encoded` for each picture; ``labels`` name the pictures in messages."""


class PictureEncoder(ABC):
    """An encoder of whole pictures: they are prepared, and each becomes one reference."""

    model: nn.Module
    description: Mapping[str, Any]
    feature_names: tuple[str, ...]
    bytes_per_picture: int
    preparation: Preparation

    @abstractmethod
    def features_of(self, seen_B3SS: torch.Tensor, options: EncodeOptions) -> Mapping[str, torch.Tensor]:
        """Features of prepared pictures in [0, 1]: those in ``options.features``, each (B, V, D)."""

    @torch.no_grad()
    def encode(
        self, image_BHW3: torch.Tensor, mask_BHW: torch.Tensor | None, options: EncodeOptions, labels: Sequence[str] = ()
    ) -> list[Encoded]:
        """As `ReferenceEncoder.encode`.

        Raises:
            ImageInputError: unusable pictures or masks.
            ReferenceMismatchError: a feature that this encoder does not give.
        """
        check_features(self, options)
        seen_B3SS = prepare_pictures(image_BHW3, mask_BHW, self.preparation, options.framing)
        features = self.features_of(seen_B3SS, options)
        seen_BSS3 = rearrange(seen_B3SS, "b c h w -> b h w c")
        return [Encoded({name: features[name][row:row + 1] for name in options.features}, seen_BSS3[row:row + 1])
                for row in range(len(seen_BSS3))]


class FeatureCache:
    """What was encoded before, by content; the least recently used goes first when ``most_bytes`` are reached."""

    def __init__(self, most_bytes: int = CACHE_BYTES):
        self._entries: OrderedDict[str, Encoded] = OrderedDict()
        self._most_bytes = most_bytes
        self._bytes = 0

    def get(self, key: str) -> Encoded | None:
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: str, encoded: Encoded) -> None:
        if encoded.nbytes > self._most_bytes or key in self._entries:
            return
        self._entries[key] = encoded
        self._bytes += encoded.nbytes
        while self._bytes > self._most_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.nbytes


def check_features(encoder: ReferenceEncoder, options: EncodeOptions) -> None:
    """Refuse features that the encoder does not give.

    Raises:
        ReferenceMismatchError: what is wanted and what it gives.
    """
    missing = [name for name in options.features if name not in encoder.feature_names]
    if missing:
        raise ReferenceMismatchError(f"the features {', '.join(missing)} are needed; this encoder gives "
                                     f"{', '.join(sorted(encoder.feature_names))}. Load the encoder named in the module, or "
                                     f"for a new one {suggestion(options.features)}.")


def encode_pictures(
    encoder: ReferenceEncoder, image_BHW3: torch.Tensor, mask_BHW: torch.Tensor | None, options: EncodeOptions,
    cache: FeatureCache | None = None, at_once: int = AT_ONCE, after_chunk: Callable[[int], None] | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Features and what was seen of many pictures, on the CPU in float32; equal and known pictures are encoded once.

    Args:
        encoder: any reference encoder.
        image_BHW3: RGB in [0, 1].
        mask_BHW: one for each picture or one for all, or None.
        options: which features, and how.
        cache: of this encoder alone.
        at_once: pictures in one chunk.
        after_chunk: called with the number of pictures done; what it raises ends the work.
    Returns:
        Features, name -> (references, V, D), pictures in order, and what was seen (references, S, S, 3).
    Raises:
        ImageInputError, ReferenceMismatchError: see `ReferenceEncoder.encode`.
    """
    check_pictures(image_BHW3, mask_BHW)
    check_features(encoder, options)
    count = len(image_BHW3)
    masks = [None if mask_BHW is None else mask_BHW[index if len(mask_BHW) > 1 else 0] for index in range(count)]
    of_each = [_options_of(options, index, count) for index in range(count)]
    keys = [_digest(*parts) for parts in zip(image_BHW3, masks, of_each, strict=True)]
    cache = FeatureCache() if cache is None else cache
    known = {key: found for key in keys if (found := cache.get(key)) is not None}
    first: dict[str, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    todo = [index for key, index in first.items() if key not in known]
    after_chunk = after_chunk or (lambda done: None)
    after_chunk(count - len(todo))
    for chunk in _chunks(todo, of_each, at_once):
        chosen_mask = None if mask_BHW is None else torch.stack([masks[index] for index in chunk])
        labels = [f"picture {index + 1} of {count}" for index in chunk]
        made = encoder.encode(image_BHW3[chunk], chosen_mask, of_each[chunk[0]], labels)
        for index, encoded in zip(chunk, made, strict=True):
            known[keys[index]] = _on_cpu(encoded)
            cache.put(keys[index], known[keys[index]])
        after_chunk(len(chunk))
    ordered = [known[key] for key in keys]
    features = {name: torch.cat([encoded.features[name] for encoded in ordered]) for name in options.features}
    return features, torch.cat([encoded.seen_RSS3 for encoded in ordered])


def _options_of(options: EncodeOptions, index: int, count: int) -> EncodeOptions:
    """The options of one picture: of keypoints, its own."""
    keypoints = options.faces.keypoints
    if len(keypoints) <= 1:
        return options
    if len(keypoints) != count:
        raise ReferenceMismatchError(f"keypoints for {len(keypoints)} pictures, but there are {count}; wanted one line for "
                                     "each picture, or one line for all. Correct the keypoints.")
    return replace(options, faces=replace(options.faces, keypoints=(keypoints[index],)))


def _chunks(todo: list[int], of_each: list[EncodeOptions], at_once: int) -> list[list[int]]:
    """Runs of pictures with the same options, ``at_once`` at most."""
    chunks: list[list[int]] = []
    for index in todo:
        if chunks and len(chunks[-1]) < at_once and of_each[chunks[-1][0]] == of_each[index]:
            chunks[-1].append(index)
        else:
            chunks.append([index])
    return chunks


def _digest(image_HW3: torch.Tensor, mask_HW: torch.Tensor | None, options: EncodeOptions) -> str:
    digest = hashlib.sha256(repr(options).encode())
    for tensor in (image_HW3, mask_HW):
        if tensor is not None:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _on_cpu(encoded: Encoded) -> Encoded:
    """A copy in float32 that shares no memory with its chunk."""
    features = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in encoded.features.items()}
    return Encoded(features, encoded.seen_RSS3.to("cpu", torch.float32, copy=True))
