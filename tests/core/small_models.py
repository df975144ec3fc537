"""Small random connectors, modules and inputs with gates that are not zero."""

import torch

from emma_core import Connector, ConnectorConfig, FeatureSpec, GatedResampler, ModuleConfig
from emma_core.model.source_spec import SourceSpec, TimeSpec
from emma_core.model.token_resampler import resampler_for

SMALL = ConnectorConfig(width=64, latents=8, layers=3, heads=4, text_dim=40, time_channels=32, time_width=48)
TOKEN_WIDTH = 96
STYLE = {"global": FeatureSpec(24, 4)}
OBJECT = {"global": FeatureSpec(24), "local": FeatureSpec(20)}


def random_tensor(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill_(model: torch.nn.Module, seed: int) -> None:
    """Random weights that keep activations near 1; every global gate is 0.5 or -0.5."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith(("attn_gate", "ffn_gate")):
                weight.copy_(0.5 * noise.sign())
            else:
                weight.copy_(noise * (0.1 if weight.ndim < 2 else weight.shape[-1] ** -0.5))


def small_connector(seed: int = 1, config: ConnectorConfig = SMALL) -> Connector:
    connector = Connector(config)
    fill_(connector, seed)
    return connector.eval().requires_grad_(False)


def small_config(condition: str = "style", features=None, **changes) -> ModuleConfig:
    return ModuleConfig(condition=condition, width=SMALL.width, heads=SMALL.heads, layers=SMALL.layers,
                        features=features or STYLE, time_width=SMALL.time_width).replace(**changes)


def small_module(condition: str = "style", seed: int = 2, features=None, **changes) -> GatedResampler:
    module = GatedResampler(small_config(condition, features, **changes))
    fill_(module, seed)
    return module.eval().requires_grad_(False)


def token_config(condition: str = "style", features=None, **changes) -> ModuleConfig:
    """On tokens of width 96 of a made-up family; blocks of width 32."""
    return ModuleConfig(condition=condition, width=32, heads=4, layers=2, features=features or STYLE, time_width=48,
                        source=SourceSpec("small", TOKEN_WIDTH), time=TimeSpec("ddpm")).replace(**changes)


def token_module(condition: str = "style", seed: int = 12, features=None, **changes) -> GatedResampler:
    module = resampler_for(token_config(condition, features, **changes))
    fill_(module, seed)
    return module.eval().requires_grad_(False)


def small_tokens(rows: int = 1, tokens: int = 11, seed: int = 13) -> torch.Tensor:
    """What a text encoder gives, with one token much larger than the others."""
    tokens_BSD = random_tensor((rows, tokens, TOKEN_WIDTH), seed)
    tokens_BSD[:, 0] *= 40
    return tokens_BSD


def small_text(rows: int = 1, tokens: int = 11, seed: int = 3) -> torch.Tensor:
    return random_tensor((rows, tokens, SMALL.text_dim), seed)


def small_features(module: GatedResampler, rows: int = 1, vectors: int = 5, seed: int = 4) -> dict[str, torch.Tensor]:
    return {name: random_tensor((rows, 1 if name == "global" else vectors, spec.dim), seed + index)
            for index, (name, spec) in enumerate(module.config.features.items())}
