"""Other ways to use two modules at once, which the sum of eqs. (7) and (8) is measured against.

Each takes a connector, a prompt's T5 features, timesteps and an assembly, as `tokens_over_schedule` does.

Shapes: B rows, N text tokens of width D, T timesteps, K latent tokens of width W, C reference tokens, E channels of the time
embedding, M modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from emma_core.model.assembly import Assembly, Reference, TokenSource, tokens_over_schedule

_NOT_ZERO = 1e-12


def averaged(source: TokenSource, text_1ND: torch.Tensor, timestep_T: torch.Tensor, assembly: Assembly) -> torch.Tensor:
    """The mean of the contributions in place of their sum."""
    count = max(1, len(assembly.references))
    shared = [replace(reference, strength=reference.strength / count) for reference in assembly.references]
    return tokens_over_schedule(source, text_1ND, timestep_T, Assembly(shared))


def sequential(source: TokenSource, text_1ND: torch.Tensor, timestep_T: torch.Tensor, assembly: Assembly) -> torch.Tensor:
    """Each block of a module acts on what the modules before it have made of the connector's block."""
    for reference in assembly.references:
        source = _Sequential(source, reference)
    return tokens_over_schedule(source, text_1ND, timestep_T, Assembly())


def strongest(source: TokenSource, text_1ND: torch.Tensor, timestep_T: torch.Tensor, assembly: Assembly) -> torch.Tensor:
    """At each token only the module whose gate lambda * g * A (and lambda * g * F) is largest in size acts."""
    if not assembly.references:
        return tokens_over_schedule(source, text_1ND, timestep_T, assembly)
    return tokens_over_schedule(_Strongest(source, assembly.references), text_1ND, timestep_T, Assembly())


def strongest_balanced(
    source: TokenSource, text_1ND: torch.Tensor, timestep_T: torch.Tensor, assembly: Assembly
) -> torch.Tensor:
    """As `strongest`, each gate divided by its module's mean over the tokens of the block first."""
    if not assembly.references:
        return tokens_over_schedule(source, text_1ND, timestep_T, assembly)
    return tokens_over_schedule(_Strongest(source, assembly.references, balanced=True), text_1ND, timestep_T, Assembly())


class _WithModules:
    """A connector with references built in; what is not said here is the connector's."""

    def __init__(self, source: TokenSource, references: Sequence[Reference]):
        self._source, self._references = source, references
        self._contexts: list[torch.Tensor] = []

    def __getattr__(self, name: str):
        return getattr(self._source, name)

    def project_text(self, text_BND: torch.Tensor) -> torch.Tensor:
        text_BNW = self._source.project_text(text_BND)
        self._contexts = [reference.module.context(reference.features, text_BNW) for reference in self._references]
        return text_BNW

    def block(self, index: int, latents_BKW, text_BNW, activated_temb_BE) -> torch.Tensor:
        entry_BKW = self._source.block(index, latents_BKW, text_BNW, activated_temb_BE)
        contexts = [context_1CW.expand(len(entry_BKW), -1, -1) for context_1CW in self._contexts]
        return self._inject(index, entry_BKW, contexts, activated_temb_BE)

    def _inject(self, index: int, entry_BKW, contexts: list[torch.Tensor], activated_temb_BE) -> torch.Tensor:
        raise NotImplementedError


class _Sequential(_WithModules):
    """One module after the others."""

    def __init__(self, source: TokenSource, reference: Reference):
        super().__init__(source, [reference])

    def _inject(self, index, entry_BKW, contexts, activated_temb_BE):
        module, strength = self._references[0].module, self._references[0].strength
        gate_BK1 = strength * module.gate(index, entry_BKW)
        attended_BKW = entry_BKW + gate_BK1 * module.attention(index, entry_BKW, contexts[0], activated_temb_BE)
        return attended_BKW + gate_BK1 * module.feed_forward(index, attended_BKW, activated_temb_BE)


class _Strongest(_WithModules):
    """The module with the largest gate takes the token."""

    def __init__(self, source: TokenSource, references: Sequence[Reference], balanced: bool = False):
        super().__init__(source, references)
        self._balanced = balanced

    def _inject(self, index, entry_BKW, contexts, activated_temb_BE):
        modules = [reference.module for reference in self._references]
        gates = [reference.strength * module.gate(index, entry_BKW)
                 for reference, module in zip(self._references, modules, strict=True)]
        takes = self._largest([gate * module.blocks[index].attn_gate for gate, module in zip(gates, modules, strict=True)])
        attended_BKW = entry_BKW
        for module, context_BCW, gate, takes_BK1 in zip(modules, contexts, gates, takes, strict=True):
            attended_BKW = attended_BKW + takes_BK1 * gate * module.attention(index, entry_BKW, context_BCW, activated_temb_BE)
        takes = self._largest([gate * module.blocks[index].ffn_gate for gate, module in zip(gates, modules, strict=True)])
        out_BKW = attended_BKW
        for module, gate, takes_BK1 in zip(modules, gates, takes, strict=True):
            out_BKW = out_BKW + takes_BK1 * gate * module.feed_forward(index, attended_BKW, activated_temb_BE)
        return out_BKW

    def _largest(self, gates: list[torch.Tensor]) -> list[torch.Tensor]:
        """1 where this one of the gates is the largest in size, else 0."""
        size_MBK1 = torch.stack([gate.abs() for gate in gates])
        if self._balanced:
            size_MBK1 = size_MBK1 / size_MBK1.mean(dim=2, keepdim=True).clamp_min(_NOT_ZERO)
        first_BK1 = size_MBK1.argmax(0)
        return [(first_BK1 == number).to(gates[0].dtype) for number in range(len(gates))]
