"""The text of a base without an ELLA, as the command line trains on it: what its denoiser is told beside the tokens.

Shapes: N text tokens of width D, P width of the pooled vector, T timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..base.lora import text_lora_of, with_text_lora
from ..base.own_text import beside_text, sizes_of
from ..base.schedule import TIMESTEPS
from ..base.spec import BaseSpec
from ..files.tensor_file import sha256_of_file
from ..text.clip_encoder import ClipTextEncoder
from .draws import BatchRow
from .prepared import Prepared, Tensors, text_key
from .shards import Processes, fill
from .store import FeatureStore, Filling
from .student import OwnText
from .teacher import TeacherText

if TYPE_CHECKING:
    from .own_latents import OwnLatents

_BATCH = 8


class Texts(Protocol):
    """Encoded captions: tokens (1, N, D), and pooled vectors (1, P) of a base that reads them."""

    def text(self, caption: str) -> torch.Tensor: ...
    def pooled(self, caption: str) -> torch.Tensor: ...


def own_text(spec: BaseSpec, data: Prepared | OwnLatents, texts: Texts | None = None) -> OwnText:
    """What goes with the tokens of a base's own text encoders.

    Args:
        spec: of the base; SDXL's reads a pooled vector and sizes.
        data: tells the sizes of targets, before they were scaled and as they are.
        texts: whose pooled vectors; by default the data's.
    """
    def beside(row: BatchRow) -> Mapping[str, Any]:
        if not spec.pooled_width:
            return {}
        sizes = (data.size_before(row.target), data.bucket(row.target))
        return beside_text((texts or data).pooled(row.caption), sizes_of([sizes]))

    return OwnText(torch.arange(TIMESTEPS).float(), beside, lambda caption: None)


def teacher_texts(
    paths: Iterable[Path], strength: float, encoder: ClipTextEncoder, spec: BaseSpec, data: Prepared | OwnLatents, cache: Path,
    mark: str, progress: Callable[[str, int, int], None] | None = None, processes: Processes | None = None,
) -> list[TeacherText]:
    """Of each LoRA, by what it does to the text encoders; captions are encoded once and kept in the cache.

    Args:
        paths, strength: of the LoRAs.
        encoder: the base's text encoders, which stay as they are.
        spec, data: see `own_text`.
        cache: folder of the caches.
        mark: of the text encoders.
    Raises:
        FileError: see `read_text_lora`.
        TrainingError: the cache cannot be written.
    """
    captions = {"", *(caption for index in range(len(data)) for caption in data.captions(index))}
    processes, found = processes or Processes(), []
    for path in paths:
        changes = text_lora_of(encoder, path)
        if not any(changes):
            found.append(TeacherText(own_text(spec, data)))
            continue
        settings = {"encoder": mark, "lora": sha256_of_file(path), "strength": strength}
        store = processes.first_alone(lambda settings=settings: FeatureStore(cache / "teacher_texts", settings))
        with with_text_lora(encoder, changes, strength):
            encode_captions(encoder, store, captions, progress or (lambda what, done, total: None), processes)
        texts = Stored(store)
        found.append(TeacherText(own_text(spec, data, texts), texts.text))
    return found


def of_one_length(texts: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(G,) indices of the texts (1, N, D) of each length, and these texts (G, N, D); one of over 77 tokens has a multiple."""
    for length in sorted({text_1ND.shape[1] for text_1ND in texts}):
        rows = [index for index, text_1ND in enumerate(texts) if text_1ND.shape[1] == length]
        yield torch.tensor(rows), torch.cat([texts[row] for row in rows])


def encode_captions(
    encoder: ClipTextEncoder, store: FeatureStore, captions: Iterable[str], progress: Callable[[str, int, int], None],
    processes: Processes,
) -> None:
    """Each caption's tokens, and its pooled vector where there is one, into the cache; what lies there is not encoded again."""
    by_key = {text_key(caption): caption for caption in captions}

    def work(keys, filling: Filling) -> None:
        for start in range(0, len(keys), _BATCH):
            batch = keys[start:start + _BATCH]
            prompts = [by_key[key] for key in batch]
            for key, text, pooled in zip(batch, encoder.encode(prompts), encoder.pooled(prompts), strict=True):
                filling.add(key, encoded_text(text, pooled))

    fill("the teacher's texts", store, by_key, work, progress, processes)


def encoded_text(text_1ND: torch.Tensor, pooled_1P: torch.Tensor) -> Tensors:
    """An entry of a cache of texts; nothing is kept of a pooled vector of width 0."""
    entry = {"text": text_1ND.float().cpu()}
    return entry | ({"pooled": pooled_1P.float().cpu()} if pooled_1P.shape[-1] else {})


@dataclass(frozen=True, eq=False)
class Stored:
    """Captions in a cache, as `Texts`."""

    store: FeatureStore

    def text(self, caption: str) -> torch.Tensor:
        return self.store.get(text_key(caption))["text"]

    def pooled(self, caption: str) -> torch.Tensor:
        return self.store.get(text_key(caption))["pooled"]
