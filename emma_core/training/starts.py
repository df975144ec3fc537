"""Modules that begin: as nothing, from ELLA's blocks, at random, or from another module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import TrainingConfigError, short
from ..files.json_file import parse_json
from ..files.module_file import load_module
from ..model.conditions import CONDITIONS
from ..model.connector import Connector
from ..model.gated_resampler import GatedResampler
from ..model.module_config import FeatureSpec, ModuleConfig
from ..model.own_tokens import OwnTokens
from ..model.token_resampler import resampler_for
from .config import TrainConfig

# (standard deviation) of new weight matrices, where they are not copied
_RANDOM_DEVIATION = 0.02
_HEAD_WIDTH = 64


def wanted_features(config: TrainConfig) -> dict[str, int]:
    """Feature name -> tokens per vector, of `module.features` or of the condition.

    Raises:
        TrainingConfigError: no features given for a custom condition, or not JSON of that kind.
    """
    settings = config.module
    if not settings.features:
        if settings.condition not in CONDITIONS:
            raise TrainingConfigError('a custom condition needs module.features, for instance {"global": 4}. Name them.')
        return dict(CONDITIONS[settings.condition].features)
    wanted = f'module.features = {short(settings.features)}; wanted JSON such as {{"global": 4}}'
    features = parse_json(settings.features, wanted, TrainingConfigError, advice="Correct it.")
    if not all(type(count) is int for count in features.values()):
        raise TrainingConfigError(f"{wanted}.")
    if not features or min(features.values()) < 1:
        raise TrainingConfigError(f"module.features = {settings.features!r}; wanted one feature or more, of 1 token or more.")
    return features


def begin_module(
    config: TrainConfig, connector: Connector | OwnTokens, dims: Mapping[str, int], encoder: Mapping[str, Any],
    generator: torch.Generator, token_size: float = 1.0,
) -> GatedResampler:
    """The module that learns, in float32; with `module.start` the other module's weights, else it begins as nothing.

    Args:
        config: of the run.
        connector: ELLA, or the model's own tokens.
        dims: dim of each feature that the encoder gives.
        encoder: its description for the metadata.
        generator: of new random weights.
        token_size: of the model's own tokens, see `size_of_tokens`.
    Raises:
        TrainingConfigError: the module to start from is of another size or reads other features.
    """
    settings, tokens = config.module, wanted_features(config)
    missing = sorted(set(tokens) - set(dims))
    if missing:
        raise TrainingConfigError(f"the {settings.condition} module reads {', '.join(tokens)}; the encoder gives "
                                  f"{', '.join(sorted(dims))}. Choose another encoder, or name module.features.")
    described = ModuleConfig(
        condition=settings.condition, features={name: FeatureSpec(dims[name], count) for name, count in tokens.items()},
        gate_scale=settings.gate_scale, separable_gates=settings.separable_gates, encoder=encoder,
        **sizes_of_blocks(config, connector),
    )
    module = resampler_for(described)
    if settings.start:
        _continue_from(module, load_module(settings.start), settings.start)
    elif isinstance(connector, OwnTokens):
        _begin_on_own_tokens(module, settings.gate_bias, token_size, generator)
    else:
        _begin_blocks(module, connector, settings.blocks, settings.gate_bias, generator)
    for block in module.blocks:
        block.gate.requires_grad_(settings.separable_gates)  # without separable gates g = 1, whatever they hold
    return module.train()


def size_of_tokens(text_1ND: torch.Tensor) -> float:
    """Root mean square of a text's usual token: text encoders differ by orders of magnitude, and single tokens do."""
    size_N = text_1ND[0].float().square().mean(-1).sqrt()
    return float(size_N[size_N > 0].median()) if bool((size_N > 0).any()) else 1.0


def sizes_of_blocks(config: TrainConfig, connector: Connector | OwnTokens) -> dict[str, Any]:
    """Of the blocks: ELLA's, or as configured."""
    if isinstance(connector, OwnTokens):
        width = config.module.inner
        return {"width": width, "heads": max(1, width // _HEAD_WIDTH), "layers": config.module.layers, "time_width": width,
                "source": connector.source, "time": connector.time}
    return {"width": connector.width, "heads": connector.config.heads, "layers": connector.layers,
            "time_width": connector.time_width, "ella": {"sha256": connector.sha256, "latents": connector.latents}}


@torch.no_grad()
def _begin_on_own_tokens(module: GatedResampler, gate_bias: float, token_size: float, generator: torch.Generator) -> None:
    """Every matrix keeps the size of what it reads, adaptive norms begin as plain ones, and Out gives the tokens' size."""
    for name, weight in module.named_parameters():
        if weight.ndim > 1 and ".linear." not in name:
            weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
        else:
            weight.zero_()
    for block in module.blocks:
        block.proj_out.weight.mul_(token_size)
        block.gate.weight.zero_()
        block.gate.bias.fill_(gate_bias)


@torch.no_grad()
def _begin_blocks(module: GatedResampler, connector: Connector, kind: str, gate_bias: float, generator) -> None:
    for block, source in zip(module.blocks, connector.connector.perceiver_blocks, strict=True):
        weights = block.state_dict()
        for name, value in source.state_dict().items():
            if kind == "ella":
                weights[name].copy_(value)
            elif value.ndim > 1 and ".linear." not in name:
                weights[name].normal_(0, _RANDOM_DEVIATION, generator=generator)
            else:
                weights[name].zero_()  # biases, and the adaptive norms, which then begin as plain norms
        block.gate.bias.fill_(gate_bias)
    for projection in module.proj.values():
        projection.weight.normal_(0, projection.in_features ** -0.5, generator=generator)
        projection.bias.zero_()


def check_start(start: ModuleConfig, name: str, config: TrainConfig, connector: Connector | OwnTokens) -> None:
    """Refuse a module to start from that has other blocks or reads other features than the run's, before data are encoded.

    Raises:
        TrainingConfigError: what it has, and what the run has.
    """
    tokens = {feature: spec.tokens_per_vector for feature, spec in start.features.items()}
    wanted, sizes = wanted_features(config), sizes_of_blocks(config, connector)
    if (start.width, start.layers, tokens) != (sizes["width"], sizes["layers"], wanted) or (
            start.source != sizes.get("source") or start.time != sizes.get("time")):
        raise _other_start(start, name, sizes["width"], sizes["layers"], wanted)


@torch.no_grad()
def _continue_from(module: GatedResampler, start: GatedResampler, name: str) -> None:
    own, other = module.state_dict(), start.state_dict()
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    if shapes != {key: tuple(value.shape) for key, value in other.items()}:
        raise _other_start(start.config, name, module.config.width, module.config.layers, module.config.features)
    module.load_state_dict(other)


def _other_start(start: ModuleConfig, name: str, width: int, layers: int, features: Iterable[str]) -> TrainingConfigError:
    reads = ", ".join(start.features)
    if start.source:
        reads += f", on the own tokens of {start.source.family} (width {start.source.width})"
    return TrainingConfigError(
        f"{name} has width {start.width}, {start.layers} blocks and the features {reads}; this run has "
        f" width {width}, {layers} blocks and {', '.join(features)}. Start from a module of the same sizes, or from none."
    )
