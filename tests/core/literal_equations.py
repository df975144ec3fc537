"""ELLA and EMMA written down equation by equation, slow and plain: what the fast code must agree with.

One row at one timestep at a time, `torch.nn.MultiheadAttention`, weights under the names they have in the files.

Shapes: K latent tokens, N text tokens, S context tokens, W width, D dim of a feature, E channels of the time embedding.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn


class AdaLN(nn.Module):
    def __init__(self, width: int, time_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(time_width, 2 * width)

    def forward(self, x_1SW, temb_1E):
        shift_1W, scale_1W = self.linear(nn.functional.silu(temb_1E)).chunk(2, dim=1)
        return self.norm(x_1SW) * (1 + scale_1W[:, None]) + shift_1W[:, None]


class Block(nn.Module):
    """One ELLA block, eqs. (1) and (2)."""

    def __init__(self, width: int, heads: int, time_width: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_1, self.ln_2, self.ln_ff = (AdaLN(width, time_width) for _ in range(3))

    def attention(self, latents_1KW, context_1SW, temb_1E):
        q_1KW = self.ln_1(latents_1KW, temb_1E)
        kv_1SW = torch.cat([q_1KW, self.ln_2(context_1SW, temb_1E)], dim=1)
        return self.attn(q_1KW, kv_1SW, kv_1SW, need_weights=False)[0]

    def feed_forward(self, latents_1KW, temb_1E):
        return self.mlp["c_proj"](torch.relu(self.mlp["c_fc"](self.ln_ff(latents_1KW, temb_1E))) ** 2)

    def forward(self, latents_1KW, text_1NW, temb_1E):
        latents_1KW = latents_1KW + self.attention(latents_1KW, text_1NW, temb_1E)  # (1)
        return latents_1KW + self.feed_forward(latents_1KW, temb_1E)  # (2)


class GatedBlock(Block):
    """Attention, feed-forward and gates of one EMMA block."""

    def __init__(self, width: int, heads: int, time_width: int):
        super().__init__(width, heads, time_width)
        self.gate = nn.Linear(width, 1)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ffn_gate = nn.Parameter(torch.zeros(1))


class EmmaModule(nn.Module):
    """The blocks and feature projections of one module file; ``config`` is its `ModuleConfig`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(GatedBlock(config.width, config.heads, config.time_width)
                                    for _ in range(config.layers))
        self.proj = nn.ModuleDict({name: nn.Linear(spec.dim, spec.tokens_per_vector * config.width)
                                   for name, spec in config.features.items()})

    def block(self, index: int) -> GatedBlock:
        return cast(GatedBlock, self.blocks[index])

    def context(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tokens = [self.proj[name](features[name]).reshape(1, -1, self.config.width) for name in self.config.features]
        return torch.cat(tokens, dim=1)


class TokenBlock(GatedBlock):
    """A gated block at an inner width, on wide tokens."""

    def __init__(self, token_width: int, width: int, heads: int, time_width: int):
        super().__init__(width, heads, time_width)
        self.norm = nn.LayerNorm(token_width, eps=1e-6, elementwise_affine=False)
        self.proj_in, self.proj_out = nn.Linear(token_width, width), nn.Linear(width, token_width)

    def read(self, tokens_1SD):
        return self.proj_in(self.norm(tokens_1SD))


class TokenModule(nn.Module):
    """The weights of one module on a checkpoint's own tokens; ``config`` is its `ModuleConfig`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(TokenBlock(config.source.width, config.width, config.heads, config.time_width)
                                    for _ in range(config.layers))
        self.proj = nn.ModuleDict({name: nn.Linear(spec.dim, spec.tokens_per_vector * config.width)
                                   for name, spec in config.features.items()})
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(320, config.time_width),
                                             "linear_2": nn.Linear(config.time_width, config.time_width)})

    def block(self, index: int) -> TokenBlock:
        return cast(TokenBlock, self.blocks[index])

    def context(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tokens = [self.proj[name](features[name]).reshape(1, -1, self.config.width) for name in self.config.features]
        return torch.cat(tokens, dim=1)

    def time(self, timestep: float) -> torch.Tensor:
        return embedded_time(self.time_embedding, timestep, 320)


class Used(NamedTuple):
    """A module, its features (1, vectors, dim each) and the user's strength."""

    module: Any
    features: Mapping[str, torch.Tensor]
    strength: float


class Perceiver(nn.Module):
    """The resampler's weights; its layout gives the file its key names."""

    def __init__(self, config):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(config.latents, config.width))
        self.time_aware_linear = nn.Linear(config.time_width, config.width)
        self.proj_in = nn.Linear(config.text_dim, config.width)
        self.perceiver_blocks = nn.ModuleList(Block(config.width, config.heads, config.time_width)
                                              for _ in range(config.layers))


class EllaConnector(nn.Module):
    """The connector of an ELLA file with EMMA blocks after its own; ``config`` is its `ConnectorConfig`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(config.time_channels, config.time_width),
                                             "linear_2": nn.Linear(config.time_width, config.time_width)})
        self.connector = Perceiver(config)

    def time(self, timestep: float) -> torch.Tensor:
        return embedded_time(self.time_embedding, timestep, self.config.time_channels)

    def forward(self, text_1ND, timestep: float, assembly: Sequence[Used] = ()):
        temb_1E = self.time(timestep)
        text_1NW = self.connector.proj_in(text_1ND)
        latents_1KW = self.connector.latents + self.connector.time_aware_linear(nn.functional.silu(temb_1E))[:, None]
        contexts = [used.module.context(used.features) for used in assembly]
        for index, block in enumerate(self.connector.perceiver_blocks):
            latents_1KW = block(latents_1KW, text_1NW, temb_1E)
            if len(assembly) == 1:
                latents_1KW = gated_block(index, latents_1KW, assembly[0], contexts[0], temb_1E)
            elif assembly:
                latents_1KW = assembled_block(index, latents_1KW, assembly, contexts, temb_1E)
        return latents_1KW


def embedded_time(layers, timestep: float, channels: int) -> torch.Tensor:
    half = channels // 2
    frequency_H = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
    wave_1C = torch.cat([torch.cos(timestep * frequency_H), torch.sin(timestep * frequency_H)])[None]
    return layers["linear_2"](nn.functional.silu(layers["linear_1"](wave_1C)))


def tokens_with_modules(tokens_1SD, timestep: float, assembly: Sequence[Used]):
    """c_crossattn' = blocks(c_crossattn, references, time): eqs. (7) and (8), which are (3) to (6) for one module.

    Blocks follow one another; a module with fewer of them is silent in the later ones.
    """
    for index in range(max((used.module.config.layers for used in assembly), default=0)):
        here = [used for used in assembly if index < used.module.config.layers]
        entry_1SD = first_1SD = tokens_1SD
        for used in here:  # (7)
            block, inner_1SW = used.module.block(index), used.module.block(index).read(entry_1SD)
            attended_1SD = block.proj_out(block.attention(inner_1SW, used.module.context(used.features),
                                                          used.module.time(timestep)))
            first_1SD = first_1SD + token_gate(used, block, inner_1SW) * block.attn_gate * attended_1SD
        tokens_1SD = first_1SD
        for used in here:  # (8)
            block = used.module.block(index)
            fed_1SD = block.proj_out(block.feed_forward(block.read(first_1SD), used.module.time(timestep)))
            tokens_1SD = tokens_1SD + token_gate(used, block, block.read(entry_1SD)) * block.ffn_gate * fed_1SD
    return tokens_1SD


def token_gate(used: Used, block: TokenBlock, inner_1SW) -> torch.Tensor:
    """s * lambda * g, with g = Linear(In(L0))."""
    g = block.gate(inner_1SW) if used.module.config.separable_gates else torch.ones(1)
    return used.strength * used.module.config.gate_scale * g


def separable_gate(used: Used, index: int, entry_1KW) -> torch.Tensor:
    """g = Linear(L0), or 1 in the paper's ablation."""
    return used.module.block(index).gate(entry_1KW) if used.module.config.separable_gates else torch.ones(1)


def gated_block(index: int, entry_1KW, used: Used, context_1SW, temb_1E):
    """Eqs. (3) to (6); a user's strength multiplies lambda."""
    block = used.module.block(index)
    scale = used.strength * used.module.config.gate_scale
    g = separable_gate(used, index, entry_1KW)
    first_1KW = entry_1KW + scale * g * block.attn_gate * block.attention(entry_1KW, context_1SW, temb_1E)  # (3), (5)
    return first_1KW + scale * g * block.ffn_gate * block.feed_forward(first_1KW, temb_1E)  # (4), (6)


def assembled_block(index: int, entry_1KW, assembly: Sequence[Used], contexts, temb_1E):
    """Eqs. (7) and (8)."""
    first_1KW = entry_1KW
    for used, context_1SW in zip(assembly, contexts, strict=True):  # (7)
        block = used.module.block(index)
        first_1KW = first_1KW + (used.strength * used.module.config.gate_scale * separable_gate(used, index, entry_1KW)
                                 * block.attn_gate * block.attention(entry_1KW, context_1SW, temb_1E))
    second_1KW = first_1KW
    for used in assembly:  # (8)
        block = used.module.block(index)
        second_1KW = second_1KW + (used.strength * used.module.config.gate_scale
                                   * separable_gate(used, index, entry_1KW)
                                   * block.ffn_gate * block.feed_forward(first_1KW, temb_1E))
    return second_1KW
