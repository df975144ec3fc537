"""Everything frozen that training reads, computed once and cached: latents, text encodings, features of references.

Shapes: B pictures of height H and width W in pixels, h x w their latents; N tokens or V vectors of dim D.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps

from ..base.parts import AUTOENCODER, REFERENCE_ENCODER, TEXT_ENCODER
from ..encoders.base import Encoded, PictureEncoder, ReferenceEncoder, check_features
from ..encoders.options import EncodeOptions, Framing
from ..encoders.pictures import Preparation, prepare_pictures
from ..errors import ImageInputError, TrainingDataError
from ..files.picture_file import open_mask, open_picture
from .buckets import bucket_of, fit, random_crop
from .config import DataConfig, EncoderConfig
from .examples import Example, PictureSet, Problem, contents_of, listing, require
from .prepared import Prepared, Tensors, key_of, text_key
from .shards import Processes, Source, fill, in_workers
from .store import FeatureStore, Filling

BATCH = 8
_VERSION = 1  # of how pictures are resized and cropped here

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Encoders:
    """The frozen models, and texts that change when what they give changes.

    Args:
        encode_latents: (B, 3, H, W) in [-1, 1] -> (B, 4, h, w), as the diffusion model reads them.
        encode_texts: captions -> for each (1, N, D).
        reference_encoder: None where nothing is learnt from references.
        latents_settings, texts_settings, reference_settings: fingerprints, precision, lengths; of the reference encoder
            what its description does not tell.
        place: called with the name of the model (AUTOENCODER, TEXT_ENCODER, REFERENCE_ENCODER) that is used next.
        encode_pooled: captions -> for each its pooled vector (1, P), or nothing where the base reads none.
    """

    encode_latents: Callable[[torch.Tensor], torch.Tensor]
    encode_texts: Callable[[list[str]], list[torch.Tensor]]
    reference_encoder: ReferenceEncoder | None = None
    latents_settings: str = ""
    texts_settings: str = ""
    reference_settings: str = ""
    place: Callable[[str], None] = lambda name: None
    encode_pooled: Callable[[list[str]], list[torch.Tensor]] = lambda captions: []


@dataclass(frozen=True, slots=True)
class PictureJob:
    """One picture to read and encode.

    Args:
        key: of its entry in the cache.
        label: the picture's name in messages.
        size: (width, height) of a target; None: a reference, which keeps its own.
        crop_seed: of a random crop; "": the whole picture.
        extra: an augmentation, which may be left out.
    """

    key: str
    label: str
    picture: Source
    mask: Source | None = None
    size: tuple[int, int] | None = None
    crop_seed: str = ""
    mirrored: bool = False
    extra: bool = False


def prepare(
    examples: Sequence[Example], data: DataConfig, encoder_config: EncoderConfig, encoders: Encoders,
    options: EncodeOptions | None, cache: str | Path, progress: Progress | None = None, processes: Processes | None = None,
) -> Prepared:
    """Compute what the cache lacks and give access to all of it; what is done stays in the cache, whatever happens.

    Each process computes its part, and waits for the others.

    Args:
        examples: see `examples.read_examples`.
        encoder_config: whether references are masked.
        options: features wanted, and how; None only without a reference encoder.
        cache: folder of the caches.
        progress: called with what is computed, how many are done, how many there are, of this process.
        processes: those that share the work, with the same examples and a cache that all can reach.
    Raises:
        TrainingDataError: every picture that cannot be used: unreadable by now, without a face, without a mask.
        ReferenceMismatchError: a feature that the encoder does not give.
        TrainingError: the cache cannot be written, or holds damaged entries (start again: they are computed again); another
            process failed.
    """
    require(examples, ())
    return _Preparing(tuple(examples), data, encoder_config.masked, encoders, options, Path(cache),
                      progress or (lambda what, done, total: None), processes or Processes()).run()


class _Preparing:
    """The passes over a set: texts, latents, references; problems are collected and raised at the end."""

    def __init__(self, examples, data, masked, encoders, options, cache, progress, processes):
        self.examples, self.data, self.encoders, self.options = examples, data, encoders, options
        self.progress, self.processes, self.problems, self.left_out = progress, processes, {}, set()
        self.pictures = PictureSet.of(examples, data.own_reference)
        self.masked = masked and encoders.reference_encoder is not None
        self.latents, self.texts, self.features = processes.first_alone(lambda: self._stores(cache))
        masks = [mask for mask in self.pictures.masks if mask and self.masked]
        self.looks = contents_of(tuple(dict.fromkeys([*self.pictures.pictures, *masks])), data.workers, processes)

    def _stores(self, cache: Path) -> tuple[FeatureStore, FeatureStore, FeatureStore | None]:
        encoders = self.encoders
        latents = FeatureStore(cache / "latents", {"version": _VERSION, "vae": encoders.latents_settings})
        texts = FeatureStore(cache / "texts", {"version": _VERSION, "encoder": encoders.texts_settings})
        if encoders.reference_encoder is None:
            return latents, texts, None
        check_features(encoders.reference_encoder, self.options)
        return latents, texts, FeatureStore(cache / "references", {
            "version": _VERSION, "encoder": dict(encoders.reference_encoder.description),
            "settings": encoders.reference_settings, "options": asdict(self.options)})

    @torch.no_grad()
    def run(self) -> Prepared:
        prepared = self._computed()
        if not all(self.processes.together(prepared.hold)):
            prepared = self._computed()
            self.processes.each(prepared.hold)
        return prepared

    def _computed(self) -> Prepared:
        self._texts()
        sizes = tuple(bucket_of(*self.looks[example.picture].size, self.data) for example in self.examples)
        latent_jobs = [self._latent_jobs(index, size) for index, size in enumerate(sizes)]
        self._pass("latents", self.latents, itertools.chain(*latent_jobs), _read_target, self._encode_latents)
        variants = {index: self._reference_jobs(index) for index in self.pictures.used()} if self.features else {}
        if self.features:
            read, encode = self._reference_ways()
            self._pass("references", self.features, itertools.chain(*variants.values()), read, encode)
        told = self.processes.together(lambda: (self.problems, self.left_out))
        problems = {label: text for found, _ in told for label, text in found.items()}
        if problems:
            raise TrainingDataError(listing([Problem(label, text, True) for label, text in problems.items()]))
        left_out = {key for _, keys in told for key in keys}
        kept = {index: tuple(job.key for job in jobs if job.key not in left_out) for index, jobs in variants.items()}
        return Prepared(self.examples, sizes, self.pictures, tuple(tuple(job.key for job in jobs) for jobs in latent_jobs),
                        kept, (self.latents, self.texts, self.features), len(left_out))

    def _label(self, index: int) -> str:
        return self.examples[index].name if index < len(self.examples) else self.pictures.pictures[index].name

    def _latent_jobs(self, index: int, size: tuple[int, int]) -> list[PictureJob]:
        picture = self.pictures.pictures[index]
        return [PictureJob(key_of(self.looks[picture].digest, *size, mirrored), self._label(index), picture, size=size,
                    mirrored=mirrored) for mirrored in (False, True)[:1 + self.data.flip]]

    def _reference_jobs(self, index: int) -> list[PictureJob]:
        """Variant 0 is the whole picture; mirrored and cropped ones follow."""
        picture, mask = self.pictures.pictures[index], self.pictures.masks[index] if self.masked else None
        if self.masked and mask is None:
            self.problems[self._label(index)] = "has no mask, but encoder.masked is on; add one or switch it off"
            return []
        content = self.looks[picture].digest + (self.looks[mask].digest if mask else "")
        of_faces = all(name.startswith("face") for name in self.options.features)
        variants = [("", False), ("", True)][:1 + self.data.reference_flip]
        for number in range(0 if of_faces else self.data.reference_crops):
            seed = f"{content} crop {number}"
            variants.append((seed, self.data.reference_flip and random.Random(f"{seed} mirrored").random() < 0.5))
        return [PictureJob(key_of(content, seed, mirrored), self._label(index), picture, mask, crop_seed=seed,
                           mirrored=mirrored, extra=place > 0) for place, (seed, mirrored) in enumerate(variants)]

    def _texts(self) -> None:
        captions = {text_key(text): text for text in ["", *(text for item in self.examples for text in item.captions)]}

        def encode(keys: Sequence[str], filling: Filling) -> None:
            if keys:
                self.encoders.place(TEXT_ENCODER)
            for start in range(0, len(keys), BATCH):
                batch = keys[start:start + BATCH]
                texts = [captions[key] for key in batch]
                found = zip_longest(batch, self.encoders.encode_texts(texts), self.encoders.encode_pooled(texts))
                for key, text_1ND, pooled_1P in found:
                    filling.add(key, {"text": text_1ND} | ({} if pooled_1P is None else {"pooled": pooled_1P}))

        fill("texts", self.texts, captions, encode, self.progress, self.processes)

    def _pass(self, what: str, store: FeatureStore, jobs: Iterable[PictureJob], read: Callable, encode: Callable) -> None:
        """Read the missing pictures in processes, encode them in batches, write them every FLUSH_ENTRIES."""
        by_key = {job.key: job for job in jobs}

        def work(keys: Sequence[str], filling: Filling) -> None:
            todo = sorted((by_key[key] for key in keys), key=lambda job: job.size or ())
            if todo:
                self.encoders.place(AUTOENCODER if store is self.latents else REFERENCE_ENCODER)
            for batch in _batches(self._usable(todo, read, filling)):
                for (job, _), (made, fault) in zip(batch, encode(batch), strict=True):
                    if not all(torch.isfinite(tensor).all() for tensor in made.values()):
                        fault = f"its {what} hold NaN or infinity; try another picture, or fp32"
                    if fault:
                        self._fault(job, fault, filling)
                    else:
                        filling.add(job.key, made)

        fill(what, store, by_key, work, self.progress, self.processes)

    def _usable(self, jobs: Sequence[PictureJob], read: Callable, filling: Filling) -> Iterator[tuple[PictureJob, tuple]]:
        for job, parts, fault in in_workers(jobs, partial(_read, read=read), self.data.workers):
            if fault:
                self._fault(job, fault, filling)
            else:
                yield job, parts

    def _fault(self, job: PictureJob, fault: str, filling: Filling) -> None:
        filling.skip()
        if job.extra:
            self.left_out.add(job.key)
        else:
            self.problems[job.label] = fault

    def _encode_latents(self, batch: list[tuple[PictureJob, tuple]]) -> list[tuple[Tensors, str]]:
        pixels_BHW3 = torch.from_numpy(np.stack([parts[0] for _, parts in batch]))
        pixels_B3HW = rearrange(pixels_BHW3, "b h w c -> b c h w").float() / 127.5 - 1
        return [({"latent": latent_4hw}, "") for latent_4hw in self.encoders.encode_latents(pixels_B3HW)]

    def _reference_ways(self) -> tuple[Callable, Callable]:
        """How references are read and encoded: whole-picture encoders leave their resizing to the reading processes."""
        encoder = self.encoders.reference_encoder
        if isinstance(encoder, PictureEncoder) and type(encoder).encode is PictureEncoder.encode:
            read = partial(_read_seen, preparation=encoder.preparation, framing=self.options.framing)
            return read, self._encode_seen
        return _read_reference, self._encode_references

    def _encode_seen(self, batch: list[tuple[PictureJob, tuple]]) -> list[tuple[Tensors, str]]:
        seen_B3SS = torch.from_numpy(np.stack([parts[0] for _, parts in batch]))
        features = self.encoders.reference_encoder.features_of(seen_B3SS, self.options)
        return [({name: features[name][row] for name in self.options.features}, "") for row in range(len(batch))]

    def _encode_references(self, batch: list[tuple[PictureJob, tuple]]) -> list[tuple[Tensors, str]]:
        image_BHW3 = torch.from_numpy(np.stack([parts[0] for _, parts in batch])).float() / 255
        mask_BHW = torch.from_numpy(np.stack([parts[1] for _, parts in batch])).float() / 255 if self.masked else None
        try:
            made = self.encoders.reference_encoder.encode(image_BHW3, mask_BHW, self.options, [job.label for job, _ in batch])
        except ImageInputError as found:
            if len(batch) == 1:
                return [({}, str(found))]
            return [answer for one in batch for answer in self._encode_references([one])]
        return [({name: encoded.features[name][0] for name in self.options.features}, _not_one(encoded)) for encoded in made]


def _read(job: PictureJob, read: Callable[[PictureJob], tuple]) -> tuple[PictureJob, tuple, str]:
    """A job as arrays, in a reading process; what cannot be read is told, not raised."""
    try:
        return job, read(job), ""
    except Exception as found:  # each of Pillow's formats raises kinds of its own for damage
        return job, (), f"cannot be read any more ({found}); check the file"


def _read_target(job: PictureJob) -> tuple[np.ndarray]:
    """(H, W, 3) in 0..255."""
    return (np.asarray(_mirrored(fit(open_picture(job.picture), job.size), job)),)


def _read_reference(job: PictureJob) -> tuple[np.ndarray, ...]:
    """(H, W, 3) and, with a mask, (H, W), in 0..255, cropped and mirrored."""
    picture = open_picture(job.picture)
    images = [picture, open_mask(job.mask).resize(picture.size)] if job.mask else [picture]
    if job.crop_seed:
        mask_HW = np.asarray(images[1], dtype=np.float64) if job.mask else None
        box = random_crop(*picture.size, random.Random(job.crop_seed), mask_HW)
        images = [image.crop(box) for image in images]
    return tuple(np.asarray(_mirrored(image, job)) for image in images)


def _read_seen(job: PictureJob, preparation: Preparation, framing: Framing) -> tuple[np.ndarray]:
    """(3, S, S) in [0, 1]: what the encoder sees of a reference."""
    image_1HW3, mask_1HW = ([torch.from_numpy(array.copy())[None].float() / 255 for array in _read_reference(job)] + [None])[:2]
    return (prepare_pictures(image_1HW3, mask_1HW, preparation, framing)[0].numpy(),)


def _mirrored(image: Image.Image, job: PictureJob) -> Image.Image:
    return ImageOps.mirror(image) if job.mirrored else image


def _not_one(encoded: Encoded) -> str:
    counts = {len(tensor_RVD) for tensor_RVD in encoded.features.values()}
    return "" if counts == {1} else f"became {max(counts)} references; wanted one: choose which of its faces is meant"


def _batches(items: Iterable[tuple[PictureJob, tuple]]) -> Iterator[list[tuple[PictureJob, tuple]]]:
    """Neighbours whose arrays have the same shapes, BATCH at most."""
    batch: list[tuple[PictureJob, tuple]] = []
    for item in items:
        if batch and (len(batch) == BATCH or [part.shape for part in item[1]] != [part.shape for part in batch[0][1]]):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
