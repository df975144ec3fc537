"""Assembling EMMA modules: gated contributions, trained apart, are added up inside every block (eqs. 7, 8), or where the
assembly's `Addition` says.

Nothing here knows ELLA: any `TokenSource` can carry modules, an ELLA (`connector`) or a checkpoint's tokens (`own_tokens`).

Shapes: B rows (one prompt at one timestep each), P rows of a pass, M references, R references per feature (1, or one per row),
N text tokens, K latent tokens, C reference tokens, W token width, E channels of the time embedding.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from einops import repeat

from ..errors import ReferenceMismatchError
from .addition import PREDICTIONS, TOKENS, Addition, Difference, Part, TokenTerms
from .gated_resampler import GatedResampler
from .reference_features import features_in_words
from .strength_keyframes import StrengthKeyframes, acts_between

# enough rows to keep matrix products busy; on CPUs, few enough for the hidden layer to stay in the cache
ROWS_PER_PASS = 64
ROWS_PER_PASS_ON_CPU = 16


class TokenSource(Protocol):
    """What carries EMMA modules after each of its blocks: a timestep-aware connector, or a checkpoint's own tokens.

    ``layers`` is 0 where there are only the modules' blocks, one after the other; ``activated_time_embedding`` gives None where
    modules bring their own; ``kept_FK`` is False where a token is padding, None where none is; ``strength_timestep`` gives the
    timesteps 999 to 0 that percents and keyframes are counted on.
    """

    @property
    def name(self) -> str: ...
    @property
    def layers(self) -> int: ...
    @property
    def kept_FK(self) -> torch.Tensor | None: ...
    def check_fits(self, module: GatedResampler) -> None: ...
    def strength_timestep(self, timestep_B: torch.Tensor) -> torch.Tensor: ...
    def activated_time_embedding(self, timestep_B: torch.Tensor) -> torch.Tensor | None: ...
    def project_text(self, text_BND: torch.Tensor) -> torch.Tensor: ...
    def start(self, text_BNW: torch.Tensor, activated_temb_BE: torch.Tensor | None) -> torch.Tensor: ...
    def block(
        self, index: int, latents_BKW: torch.Tensor, text_BNW: torch.Tensor, activated_temb_BE: torch.Tensor | None
    ) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class Reference:
    """Features of one or several pictures, for one module.

    Args:
        module: the module that reads them.
        features: feature name -> (R, vectors, dim); R is 1, or one per row of the batch (frames of a video).
        strength: multiplies the module's contribution; a float, or (R,) one per row.
        start_percent, end_percent: part of the sampling where it acts, 0 (pure noise) to 1 (picture).
        keyframes: factors on the strength that change over the sampling.
    Raises:
        ReferenceMismatchError: features the module does not declare, or of another size; strengths that are not
            numbers or not one per reference; an empty range.
    """

    module: GatedResampler
    features: Mapping[str, torch.Tensor]
    strength: float | torch.Tensor = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    keyframes: StrengthKeyframes = field(default_factory=StrengthKeyframes)

    def __post_init__(self):
        self.module.config.check_features(self.features)
        if not 0.0 <= self.start_percent <= self.end_percent <= 1.0:
            raise ReferenceMismatchError(
                f"a reference acts from {self.start_percent} to {self.end_percent} of the sampling; wanted "
                "0 <= start <= end <= 1. Exchange or correct the two percents."
            )
        strength = torch.as_tensor(self.strength)
        if not torch.isfinite(strength).all():
            raise ReferenceMismatchError(f"the strength {self.strength} is not finite. Use a number such as 1.0.")
        if not strength.numel() or len({strength.numel(), self.features_rows} - {1}) > 1:
            raise ReferenceMismatchError(
                f"{strength.numel()} strengths for {self.features_rows} references; wanted one for all, or one per reference."
            )

    def __repr__(self) -> str:
        """Short: a host shows what is wired into a node that failed."""
        strength = f"{self.strength:g}" if isinstance(self.strength, int | float) else f"of {self.rows} rows"
        return f"<reference for {self.module.name}: {features_in_words(self.features)}; strength {strength}>"

    @property
    def features_rows(self) -> int:
        """1, or the number of rows (frames) that have features of their own."""
        return max(tensor.shape[0] for tensor in self.features.values())

    @property
    def rows(self) -> int:
        """R: 1, or the number of rows (frames) that this reference was made for."""
        return max(self.features_rows, torch.as_tensor(self.strength).numel())

    def weight_of_rows(self, timestep_B: torch.Tensor) -> torch.Tensor:
        """(B,) strength where the reference acts at the row's timestep, 0 elsewhere."""
        acts_B = acts_between(timestep_B, self.start_percent, self.end_percent)
        strength = torch.as_tensor(self.strength, dtype=torch.float32, device=timestep_B.device).flatten()
        row_B = torch.arange(timestep_B.shape[0], device=timestep_B.device) % strength.numel()
        return strength[row_B] * acts_B * self.keyframes.of_rows(timestep_B)

    def of_row(self, row: int) -> "Reference":
        """The reference of one row (frame) alone."""
        if self.rows == 1:
            return self
        # cloned: matrix products may round by where their numbers lie in memory
        features = {name: tensor[row % len(tensor)].clone()[None] for name, tensor in self.features.items()}
        strength = torch.as_tensor(self.strength).flatten()
        return replace(self, features=features, strength=float(strength[row % len(strength)]))

    def of_rows(self, rows: Sequence[int]) -> "Reference":
        """The reference of some rows (frames), in this order."""
        if self.rows == 1 or list(rows) == list(range(self.rows)):
            return self
        features = {name: tensor[[row % len(tensor) for row in rows]] for name, tensor in self.features.items()}
        strength = torch.as_tensor(self.strength).flatten()
        return replace(self, features=features, strength=strength[[row % len(strength) for row in rows]])


@dataclass(frozen=True, eq=False)
class Assembly:
    """An unordered sum of references; empty means ELLA alone.

    Args:
        references: what is added up.
        addition: where; without it inside the blocks, as the paper does.
    """

    references: tuple[Reference, ...] = field(default_factory=tuple)
    addition: Addition = field(default_factory=Addition)

    def __init__(self, references: Iterable[Reference] = (), addition: Addition | None = None):
        object.__setattr__(self, "references", tuple(references))
        object.__setattr__(self, "addition", addition or Addition())

    def __repr__(self) -> str:
        return f"<assembly of {len(self.references)} references, added up in the {self.addition.way}>"

    @property
    def rows(self) -> int:
        """1, or the number of rows (frames) of its per-row references."""
        return max((reference.rows for reference in self.references), default=1)

    def with_reference(self, reference: Reference) -> "Assembly":
        """This assembly plus one more reference."""
        return Assembly([*self.references, reference], self.addition)

    def of_row(self, row: int) -> "Assembly":
        """What one row (frame) has of it."""
        return Assembly((reference.of_row(row) for reference in self.references), self.addition)

    def of_rows(self, rows: Sequence[int]) -> "Assembly":
        """What some rows (frames) have of it, in this order."""
        return Assembly((reference.of_rows(rows) for reference in self.references), self.addition)

    @property
    def adds_predictions(self) -> bool:
        """Whether the model may have to be evaluated for each reference."""
        return PREDICTIONS in (self.addition.way, self.addition.then) and len(self.references) > 1

    @property
    def counts_steps(self) -> bool:
        """Whether a strength depends on the other timesteps of the schedule."""
        return any(reference.keyframes.counts_steps for reference in self.references)

    def on_schedule(self, schedule: Sequence[float]) -> "Assembly":
        """The same references, the steps of their keyframes counted on the sampler's timesteps."""
        counted = (replace(reference, keyframes=reference.keyframes.on(schedule)) for reference in self.references)
        return Assembly(counted, self.addition)

    def parts(self, timestep_B: torch.Tensor) -> list[Part]:
        """What of it runs alone at these rows, see `Addition.parts_of`."""
        weights = [reference.weight_of_rows(timestep_B) for reference in self.references]
        weight_MB = torch.stack(weights) if weights else timestep_B.new_zeros(0, len(timestep_B))
        is_base_M = torch.tensor([reference.module.config.draws_subject for reference in self.references], dtype=torch.bool,
                                 device=timestep_B.device)
        return self.addition.parts_of(weight_MB, is_base_M, timestep_B)


@dataclass(frozen=True, eq=False)
class _ActiveReference:
    """A reference prepared for the rows in which it acts."""

    module: GatedResampler
    rows_A: torch.Tensor | None  # None: all rows
    context_ACW: torch.Tensor
    weight_AK1: torch.Tensor  # or (A, 1, 1), where it is the same for all tokens
    activated_temb_AE: torch.Tensor
    kept_AK: torch.Tensor | None

    def of_rows(self, x_BKW: torch.Tensor) -> torch.Tensor:
        return x_BKW if self.rows_A is None else x_BKW[self.rows_A]

    def add(self, total_BKW: torch.Tensor, addend_AKW: torch.Tensor) -> torch.Tensor:
        addend_AKW = addend_AKW.to(total_BKW.dtype)  # the model's own tokens keep theirs
        if self.rows_A is None:
            return total_BKW + addend_AKW
        return total_BKW.index_add(0, self.rows_A, addend_AKW)


def check_counts(counts: Iterable[tuple[str, int]], rows: int, place: str, each: str) -> None:
    """Refuse what is neither there once, for all rows, nor once for each.

    Args:
        counts: (name, how many there are).
        rows: how many there should be.
        place, each: what they are for, and what one of it is called.
    Raises:
        ReferenceMismatchError: another count.
    """
    for what, count in counts:
        if count not in (1, rows):
            raise ReferenceMismatchError(
                f"{count} {what} for {place}; wanted 1 or {rows}. Use one for all, or one per {each}."
            )


def token_terms(
    source: TokenSource, text_BND: torch.Tensor, timestep_B: torch.Tensor | float, assembly: Assembly
) -> TokenTerms:
    """What B rows predict with; text, timesteps and references have B rows or one that serves all.

    Raises:
        ConnectorMismatchError: a module or the text does not fit the connector.
        ReferenceMismatchError: row counts that are neither 1 nor B.
    """
    timestep_B = torch.as_tensor(timestep_B, device=text_BND.device).reshape(-1)
    rows = max(text_BND.shape[0], timestep_B.shape[0], assembly.rows)
    check_counts(
        (("prompts", text_BND.shape[0]), ("timesteps", timestep_B.shape[0]),
         *(("references", reference.rows) for reference in assembly.references)), rows, f"a batch of {rows} rows", "row")
    return _terms_of_rows(source, text_BND, timestep_B.expand(rows), assembly)


def assembled_tokens(
    source: TokenSource, text_BND: torch.Tensor, timestep_B: torch.Tensor | float, assembly: Assembly
) -> torch.Tensor:
    """Tokens (B, K, W) that say all; arguments as of `token_terms`.

    Raises:
        ConnectorMismatchError, ReferenceMismatchError: as `token_terms`, and where predictions are to be added up.
    """
    return token_terms(source, text_BND, timestep_B, assembly).single()


def terms_over_schedule(
    source: TokenSource, text_FND: torch.Tensor, timestep_T: torch.Tensor, assembly: Assembly
) -> list[TokenTerms]:
    """What F frames (or prompts) predict with at each of T timesteps, in one pass.

    Everything that does not depend on the timestep is computed once.

    Raises:
        ConnectorMismatchError, ReferenceMismatchError: as `token_terms`.
    """
    frames = max(text_FND.shape[0], assembly.rows)
    check_counts(
        (("prompts", text_FND.shape[0]), *(("references", reference.rows) for reference in assembly.references)), frames,
        f"{frames} frames", "frame")
    timestep_T = torch.as_tensor(timestep_T, device=text_FND.device).reshape(-1)
    return _terms_of_rows(source, text_FND, repeat(timestep_T, "t -> (t f)", f=frames), assembly).by_timestep(frames)


def tokens_over_schedule(
    source: TokenSource, text_FND: torch.Tensor, timestep_T: torch.Tensor, assembly: Assembly
) -> torch.Tensor:
    """Tokens (T, F, K, W) that say all, as `terms_over_schedule`.

    Raises:
        ConnectorMismatchError, ReferenceMismatchError: as `assembled_tokens`.
    """
    return torch.stack([terms.single() for terms in terms_over_schedule(source, text_FND, timestep_T, assembly)])


def _terms_of_rows(
    source: TokenSource, text_FND: torch.Tensor, timestep_B: torch.Tensor, assembly: Assembly
) -> TokenTerms:
    """Row b uses text b mod F and reference b mod R."""
    for reference in assembly.references:
        source.check_fits(reference.module)
    strength_timestep_B = source.strength_timestep(timestep_B)
    parts = assembly.parts(strength_timestep_B)
    row_N = torch.cat([part.row_A for part in parts])
    weight_MN = torch.cat([part.weight_MA for part in parts], dim=1)
    tokens_NKW = _tokens_of_rows(source, text_FND, timestep_B[row_N], assembly.references, row_N, weight_MN)
    base_BKW, *others = tokens_NKW.split([len(part.row_A) for part in parts])
    differences = [Difference(part.row_A, tokens_AKW) for part, tokens_AKW in zip(parts[1:], others, strict=True)]
    terms = TokenTerms(base_BKW, tuple(differences))
    return terms.in_the_tokens(assembly.addition.is_way(TOKENS, strength_timestep_B))


def _tokens_of_rows(
    source: TokenSource, text_FND: torch.Tensor, timestep_N: torch.Tensor, references: Sequence[Reference],
    row_N: torch.Tensor, weight_MN: torch.Tensor,
) -> torch.Tensor:
    """(N, K, W), references added up inside the blocks by their weights; in even passes of at most ROWS_PER_PASS rows."""
    text_FNW = source.project_text(text_FND)
    contexts = [reference.module.context(reference.features, text_FNW) for reference in references]
    passes = []
    limit = ROWS_PER_PASS_ON_CPU if row_N.device.type == "cpu" else ROWS_PER_PASS
    for at_P in torch.arange(len(row_N), device=row_N.device).chunk(max(1, math.ceil(len(row_N) / limit))):
        temb_PE = source.activated_time_embedding(timestep_N[at_P])
        active = [
            _activate(source, reference.module, context_RCW, weight_N[at_P], row_N[at_P],
                      reference.module.activated_time(timestep_N[at_P], temb_PE))
            for reference, context_RCW, weight_N in zip(references, contexts, weight_MN, strict=True)
            if bool((weight_N[at_P] != 0).any())
        ]
        passes.append(_run_blocks(source, _rows_of(text_FNW, row_N[at_P]), temb_PE, active))
    return passes[0] if len(passes) == 1 else torch.cat(passes)


def _rows_of(x_R: torch.Tensor, row_P: torch.Tensor) -> torch.Tensor:
    count = x_R.shape[0]
    return x_R.expand(row_P.shape[0], *x_R.shape[1:]) if count == 1 else x_R[row_P % count]


def _activate(source, module, context_RCW, weight_P, row_P, temb_PE) -> _ActiveReference:
    acts_P = weight_P != 0
    rows_A = None if bool(acts_P.all()) else acts_P.nonzero().flatten()
    if rows_A is not None:
        weight_P, row_P, temb_PE = weight_P[rows_A], row_P[rows_A], temb_PE[rows_A]
    weight_AK1, kept_AK = weight_P.to(temb_PE.dtype)[:, None, None], None
    if source.kept_FK is not None:
        kept_AK = _rows_of(source.kept_FK, row_P)
        weight_AK1 = weight_AK1 * kept_AK[:, :, None]
    return _ActiveReference(module, rows_A, _rows_of(context_RCW, row_P), weight_AK1, temb_PE, kept_AK)


def _run_blocks(
    source: TokenSource, text_BNW: torch.Tensor, temb_BE: torch.Tensor | None, active: list[_ActiveReference]
) -> torch.Tensor:
    latents_BKW = source.start(text_BNW, temb_BE)
    for index in range(max([source.layers, *(len(one.module.blocks) for one in active)])):
        latents_BKW = source.block(index, latents_BKW, text_BNW, temb_BE)
        here = [one for one in active if index < len(one.module.blocks)]
        if here:
            latents_BKW = _inject(index, latents_BKW, here)
    return latents_BKW


def _inject(index: int, entry_BKW: torch.Tensor, active: list[_ActiveReference]) -> torch.Tensor:
    """One EMMA block of every module, on the same entry L0."""
    # L1 = L0 + sum_m s_m * lambda_m * g_m(L0) * A_m * Attn_m(L0, C_m, temb)    (7)
    attended_BKW = entry_BKW
    gates = []
    for one in active:
        entry_AKW = one.of_rows(entry_BKW)
        gate_AK1 = one.weight_AK1 * one.module.gate(index, entry_AKW)
        gates.append(gate_AK1)
        attention_AKW = one.module.attention(index, entry_AKW, one.context_ACW, one.activated_temb_AE, one.kept_AK)
        attended_BKW = one.add(attended_BKW, gate_AK1 * attention_AKW)
    # L2 = L1 + sum_m s_m * lambda_m * g_m(L0) * F_m * FFN_m(L1, temb)          (8)
    out_BKW = attended_BKW
    for one, gate_AK1 in zip(active, gates, strict=True):
        feed_forward_AKW = one.module.feed_forward(index, one.of_rows(attended_BKW), one.activated_temb_AE)
        out_BKW = one.add(out_BKW, gate_AK1 * feed_forward_AKW)
    return out_BKW
