"""How much a run writes, told from its settings and the headers of its files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from ..base.config import spec_of, uses_ella
from ..base.spec import SD15, BaseSpec
from ..encoders.clip_vision import clip_tower_of
from ..encoders.families import CLIP_TOWERS
from ..encoders.weights import weights_path
from ..errors import EmmaError, TrainingError
from ..files.connector_file import read_connector_config
from ..model.connector import Connector, ConnectorConfig
from ..model.module_config import FeatureSpec, ModuleConfig
from ..model.own_tokens import OwnTokens
from ..model.token_resampler import resampler_for
from ..playground import PLAYGROUND_DIR
from ..text.clip_layout import LENGTH as CLIP_LENGTH
from .buckets import bucket_of
from .checks import encoder_file
from .config import TrainConfig
from .examples import Example, PictureSet
from .own_latents import prompts_of
from .starts import sizes_of_blocks, wanted_features

_NUMBER = 4  # bytes of one, in float32
_TEXT_TOKENS = 32  # of a usual caption
_LATENT_CHANNELS, _PIXELS_PER_LATENT = 4, 8
_USUAL_TOWER = CLIP_TOWERS["clip-vit-h-14"]
_MOMENTS = 2  # that AdamW keeps of each weight


def cache_bytes(config: TrainConfig, examples: Sequence[Example]) -> int:
    """Of latents, texts and reference features, about."""
    sizes = [bucket_of(*example.size_px, config.data) for example in examples] * (1 + config.data.flip)
    texts = {caption for example in examples for caption in example.captions}
    if config.teacher.own_latents:
        try:
            prompts = prompts_of(config.teacher)
        except EmmaError:  # told by the checks
            prompts = []
        side_px = config.data.resolution_px
        sizes += [(side_px, side_px)] * (len(prompts) * config.teacher.samples)
        texts |= set(prompts)
    latents = sum(width * height // _PIXELS_PER_LATENT ** 2 for width, height in sizes) * _LATENT_CHANNELS
    numbers = latents + len(texts) * _text_numbers(config)
    if config.what == "module":
        variants = 1 + config.data.reference_crops + config.data.reference_flip
        references = len(PictureSet.of(examples, config.data.own_reference).used())
        numbers += references * variants * sum(_feature_numbers(config))
    return numbers * _NUMBER


def _text_numbers(config: TrainConfig) -> int:
    """Of one caption: T5's, or the rows of the checkpoint's own text encoders; both where these teach an ELLA."""
    spec = _spec_of(config)
    own = CLIP_LENGTH * spec.context_width + spec.pooled_width
    if config.what == "ella" or uses_ella(config.base, config.ella):
        return _TEXT_TOKENS * _ella_sizes(config).text_dim + own * config.teacher.own_text
    return own


def checkpoint_bytes(config: TrainConfig, numbers: int) -> int:
    """Of the checkpoints that are kept, and the one that is being written, of what learns with so many numbers."""
    copies = 1 + _MOMENTS + bool(config.train.average)
    return (config.report.keep + 1) * numbers * copies * _NUMBER


def check_room(folder: Path, needed: int) -> None:
    """Refuse a disk that cannot hold what a run writes.

    Args:
        folder: of the run, which need not be there.
        needed: bytes.
    Raises:
        TrainingError: what is needed and what is free.
    """
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(above).free
    if needed > free:
        raise TrainingError(f"cache and checkpoints need about {needed / 1e9:.1f} GB, {above} has {free / 1e9:.1f} GB free. "
                            "Make room, choose another folder, or keep fewer checkpoints.")


def learning_numbers(config: TrainConfig) -> int:
    """How many numbers learn, about: a module on an ELLA has as many blocks of the same size as that."""
    if config.what == "module" and not uses_ella(config.base, config.ella):
        return numbers_of_blocks(config, _spec_of(config).own_tokens)
    with torch.device("meta"):
        connector = Connector(_ella_sizes(config))
    if config.what == "ella":
        return sum(value.numel() for value in connector.parameters())
    return numbers_of_blocks(config, connector)


def _ella_sizes(config: TrainConfig) -> ConnectorConfig:
    try:
        return read_connector_config(config.ella.file or PLAYGROUND_DIR / "ella.safetensors")
    except EmmaError:  # told by the checks; the released one's sizes then
        return ConnectorConfig()


def numbers_of_blocks(config: TrainConfig, source: Connector | OwnTokens) -> int:
    """How many numbers a module on an ELLA or on a model's own tokens has, about."""
    if isinstance(source, Connector):
        return sum(value.numel() for value in source.connector.perceiver_blocks.parameters())
    made_of = ModuleConfig(condition=config.module.condition, features={"global": FeatureSpec(_USUAL_TOWER.projected)},
                           **sizes_of_blocks(config, source))
    with torch.device("meta"):
        return sum(value.numel() for value in resampler_for(made_of).parameters())


def _spec_of(config: TrainConfig) -> BaseSpec:
    try:
        return spec_of(config.base)
    except EmmaError:  # told by the checks
        return SD15


def _feature_numbers(config: TrainConfig) -> list[int]:
    """Numbers of each feature of one reference."""
    try:
        tower = clip_tower_of(weights_path(encoder_file(config)))
        features = wanted_features(config)
    except EmmaError:  # another kind of encoder, or a fault that the checks tell
        tower, features = None, {"global": 1}
    tower = tower or _USUAL_TOWER
    return [tower.vectors * tower.hidden if name == "local" else tower.projected for name in features]
