"""A training set whose latents, texts and features of references are computed: read by index, from the disk or from memory.

Shapes: N tokens or V vectors of dim D, h x w latents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import TrainingError
from .examples import Example, PictureSet
from .store import FeatureStore

MEMORY_BYTES = 2 << 30
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A training set by index: targets 0 to len - 1, then references that are no targets.

    Args:
        examples, sizes_px: of the targets.
        pictures: targets and references under one index.
        latent_keys: of each target; a second one is mirrored.
        variant_keys: of each reference.
        stores: of latents, texts and features; the last is None where nothing is learnt from references.
        left_out: how many augmentations could not be encoded, for instance without a face.
        memory: entries by key that need not be read again.
    """

    examples: tuple[Example, ...]
    sizes_px: tuple[tuple[int, int], ...]
    pictures: PictureSet
    latent_keys: tuple[tuple[str, ...], ...]
    variant_keys: Mapping[int, tuple[str, ...]]
    stores: tuple[FeatureStore, FeatureStore, FeatureStore | None]
    left_out: int = 0
    memory: dict[str, Tensors] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def reference_set(self) -> Prepared:
        """The prepared pictures that references come from."""
        return self

    def latent(self, index: int, flipped: bool = False) -> torch.Tensor:
        """(4, h, w) of a target; mirrored ones are there if `data.flip` is set."""
        return self._entry(self.stores[0], self.latent_keys[index][flipped])["latent"]

    def bucket(self, index: int) -> tuple[int, int]:
        """Width and height in pixels that a target is trained at."""
        return self.sizes_px[index]

    def group(self, index: int) -> str:
        """What a target's references have in common with it: an identity, a style."""
        example = self.examples[index]
        return example.name if example.group is None else example.group

    def captions(self, index: int) -> tuple[str, ...]:
        return self.examples[index].captions

    def text(self, caption: str) -> torch.Tensor:
        """(1, N, D) of a caption of the set, or of ""."""
        return self._entry(self.stores[1], text_key(caption))["text"]

    def pooled(self, caption: str) -> torch.Tensor:
        """(1, P) of a caption of the set, or of "", where the base reads such a vector."""
        return self._entry(self.stores[1], text_key(caption))["pooled"]

    def size_before(self, index: int) -> tuple[int, int]:
        """Width and height in pixels of a target before it was scaled."""
        return self.examples[index].size_px

    def references(self, index: int) -> tuple[int, ...]:
        """Indices of the pictures that may be a target's reference."""
        return self.pictures.references(index)

    def variants(self, reference: int) -> int:
        """How many variants a reference has: 0 is the whole picture, then mirrored and cropped ones."""
        return len(self.variant_keys.get(reference, ()))

    def features(self, reference: int, variant: int = 0) -> Tensors:
        """Feature name -> (V, D)."""
        return self._entry(self.stores[2], self.variant_keys[reference][variant])

    def mark(self) -> str:
        """A digest of what is in the pictures and the references."""
        return key_of(*self.latent_keys, *sorted(self.variant_keys.items()))

    def summary(self) -> dict[str, Any]:
        """Counts, for a module's metadata: no names, no paths."""
        captions = [caption for example in self.examples for caption in example.captions]
        groups = {example.group for example in self.examples} - {None}
        return {"pictures": len(self), "groups": len(groups),
                "captions": len(captions), "distinct_captions": len(set(captions)), "references": len(self.variant_keys),
                "reference_variants": sum(map(len, self.variant_keys.values())), "variants_left_out": self.left_out,
                "sizes_px": {f"{width}x{height}": self.sizes_px.count((width, height))
                             for width, height in sorted(set(self.sizes_px))}}

    def hold(self, most_bytes: int = MEMORY_BYTES) -> bool:
        """Keep everything in memory if it is no more than ``most_bytes``; else it is read when needed.

        Returns:
            False if entries were damaged: they are missing from their store then.
        """
        texts = {"", *(caption for example in self.examples for caption in example.captions)}
        keys_of = ([key for keys in self.latent_keys for key in keys], [text_key(caption) for caption in texts],
                   [key for keys in self.variant_keys.values() for key in keys])
        wanted = [(store, keys) for store, keys in zip(self.stores, keys_of, strict=True) if store is not None]
        if sum(store.nbytes(keys) for store, keys in wanted) > most_bytes:
            return True
        sound = True
        for store, keys in wanted:
            for key in keys:
                try:
                    self.memory[key] = store.get(key)
                except TrainingError:
                    sound = False
        return sound

    def _entry(self, store: FeatureStore | None, key: str) -> Tensors:
        return self.memory[key] if key in self.memory else store.get(key)


def key_of(*parts: Any) -> str:
    """The key of what is computed from these parts."""
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def text_key(caption: str) -> str:
    """The key of a caption's encoding."""
    return key_of("caption", caption)
