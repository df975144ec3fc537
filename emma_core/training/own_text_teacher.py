"""The base with its own text encoder as the teacher of an ELLA: what it predicts of a caption by its own tokens is the target.

A teacher's prediction has no noise of its own, as the noise that is otherwise to be predicted has. What the base's own text
encoder cannot read, it does not teach.

Shapes: N own tokens of width W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..base.backbones import Backbone
from ..base.lora import merge_text_lora
from ..base.own_text import load_own_text
from ..base.parts import Parts
from ..text.encoder import usual_dtype
from .config import TrainConfig
from .draws import BatchRow
from .own_latents import OwnLatents
from .own_text import Stored, Texts, encode_captions, of_one_length
from .parts import weights_mark
from .prepared import Prepared
from .shards import Processes
from .store import FeatureStore
from .student import TeacherTarget

KIND = "own text encoder"


def encode_for_teacher(
    config: TrainConfig, parts: Parts, data: Prepared | OwnLatents, cache: Path,
    progress: Callable[[str, int, int], None] | None = None, processes: Processes | None = None,
) -> Stored:
    """All captions of ``data`` as the base's own text encoder reads them, encoded once and kept in the cache.

    Args:
        config: of the run; a LoRA on the base changes its text encoder too.
        parts: of the run; the text encoder is loaded beside them and let go again.
        cache: folder of the caches.
        progress: told what is encoded, how much of it is done, and how much there is.
        processes: those that share the work.
    Raises:
        TextEncoderFileError, FileError: see `load_own_text` and `merge_text_lora`.
        TrainingError: the cache cannot be written.
    """
    processes = processes or Processes()
    encoder = load_own_text(Path(config.base.checkpoint), parts.backbone.spec, usual_dtype(parts.device))
    if config.base.lora:
        merge_text_lora(encoder, Path(config.base.lora))
    encoder.model.to(parts.device)
    mark = f"{config.base.checkpoint} {weights_mark(encoder.model)} {encoder.tokenizer_fingerprint}"
    store = processes.first_alone(lambda: FeatureStore(cache / "teacher_texts", {"encoder": mark}))
    captions = {"", *(caption for index in range(len(data)) for caption in data.captions(index))}
    encode_captions(encoder, store, captions, progress or (lambda what, done, total: None), processes)
    return Stored(store)


def own_text_target(backbone: Backbone, texts: Texts) -> TeacherTarget:
    """The teacher's target.

    Args:
        backbone: the frozen base, which predicts.
        texts: the captions, see `encode_for_teacher`.
    """
    def predict(noised_B4hw, timestep_B, context_BKW, rows: Sequence[BatchRow]) -> torch.Tensor:
        target_B4hw = torch.empty_like(noised_B4hw, dtype=torch.float32)
        for rows_G, text_GNW in of_one_length([texts.text(row.caption) for row in rows]):
            rows_G = rows_G.to(noised_B4hw.device)
            target_B4hw[rows_G] = backbone.predict_noise(
                noised_B4hw[rows_G], timestep_B[rows_G], text_GNW.to(context_BKW)).float()
        return target_B4hw

    return TeacherTarget(KIND, predict)
