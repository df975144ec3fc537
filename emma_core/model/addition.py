"""Where references are added up: inside every block, behind the last block, or in the diffusion model's predictions.

Inside the blocks (eqs. 7, 8 of the EMMA paper) the modules of an assembly read what the others wrote, and lose much of what
each can do alone. The two other places let each module run alone, and add up what it changes. With base T (the text, and
every reference that says *what* is drawn) and M references that say *how*:

    blocks        e = predict(L), L of eqs. (7), (8)
    tokens        e = predict(L_T + sum_m (L_Tm - L_T))
    predictions   e = e_T + sum_m (e_Tm - e_T), e_T = predict(L_T), e_Tm = predict(L_Tm)

With M < 2 all three are the same, and `predictions` evaluates the model 1 + M times where M >= 2.

Shapes: B rows (one prompt at one timestep each), A some of the rows, N = B plus the rows of all differences, M references,
K latent tokens of width W, F rows of one timestep; predictions have any shape behind their rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from ..errors import ReferenceMismatchError
from .strength_keyframes import acts_between

BLOCKS, TOKENS, PREDICTIONS = WAYS = ("blocks", "tokens", "predictions")


@dataclass(frozen=True)
class Addition:
    """Where the references of an assembly are added up.

    Args:
        way: one of WAYS.
        until_percent: part of the sampling where it is that way, 0 (pure noise) to 1 (picture), in timesteps.
        then: the way behind that part.
    Raises:
        ReferenceMismatchError: no such way or part.
    """

    way: str = BLOCKS
    until_percent: float = 1.0
    then: str = BLOCKS

    def __post_init__(self):
        for way in (self.way, self.then):
            if way not in WAYS:
                raise ReferenceMismatchError(f"references cannot be added up in {way!r}; choose one of {', '.join(WAYS)}.")
        if not 0.0 <= self.until_percent <= 1.0:
            raise ReferenceMismatchError(f"references are added up in the {self.way} until {self.until_percent} of the "
                                         "sampling; wanted 0 to 1. Correct the percent.")

    def parts_of(self, weight_MB: torch.Tensor, is_base_M: torch.Tensor, timestep_B: torch.Tensor) -> "list[Part]":
        """What runs alone: first all rows with their base, then rows with one more reference, each row once in a part.

        A row with fewer than two references to add to its base has all of them in the first part.

        Args:
            weight_MB: strength of each reference in each row; 0 where it does not act.
            is_base_M: which references belong to the base.
            timestep_B: of the rows.
        """
        every_B = torch.arange(weight_MB.shape[1], device=weight_MB.device)
        if self.way == self.then == BLOCKS:
            return [Part(every_B, weight_MB)]
        apart_MB = (weight_MB != 0) & ~is_base_M[:, None]
        apart_MB &= ~self.is_way(BLOCKS, timestep_B) & (apart_MB.sum(0) > 1)
        if not bool(apart_MB.any()):
            return [Part(every_B, weight_MB)]
        parts, number_MB = [Part(every_B, weight_MB * ~apart_MB)], apart_MB.cumsum(0)
        for number in range(1, int(number_MB.max()) + 1):
            mine_MB = apart_MB & (number_MB == number)
            row_A = mine_MB.any(0).nonzero().flatten()
            parts.append(Part(row_A, (weight_MB * (mine_MB | ~apart_MB))[:, row_A]))
        return parts

    def is_way(self, way: str, timestep_B: torch.Tensor) -> torch.Tensor:
        """(B,) whether references are added up in this way at each timestep."""
        early_B = acts_between(timestep_B, 0.0, self.until_percent)
        return torch.where(early_B, self.way == way, self.then == way)


# part of the sampling in which most of what the references change is decided
EARLY_PERCENT = 0.2
# as nodes and commands name them
ADDITIONS = {BLOCKS: Addition(), TOKENS: Addition(TOKENS), PREDICTIONS: Addition(PREDICTIONS),
             "early predictions": Addition(PREDICTIONS, EARLY_PERCENT)}
RECOMMENDED = "early predictions"


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows, and how strong each reference is in them when they run alone."""

    row_A: torch.Tensor
    weight_MA: torch.Tensor


@dataclass(frozen=True, eq=False)
class Difference:
    """Tokens of some rows; what they predict differs from what the base predicts, and the difference is added to it."""

    row_A: torch.Tensor
    tokens_AKW: torch.Tensor


@dataclass(frozen=True, eq=False)
class TokenTerms:
    """Tokens (B, K, W) of rows, and the differences to add to what they predict; with none, the tokens say all.

    `rows` and `stacked` are what the model evaluates, `added` makes of its answers one prediction per row.
    """

    tokens_BKW: torch.Tensor
    differences: tuple[Difference, ...] = ()

    @property
    def rows(self) -> torch.Tensor:
        """(N,) the row of each evaluation, the base's first."""
        every_B = torch.arange(len(self.tokens_BKW), device=self.tokens_BKW.device)
        return torch.cat([every_B, *(one.row_A for one in self.differences)])

    @property
    def stacked(self) -> torch.Tensor:
        """(N, K, W) the tokens of each evaluation."""
        if not self.differences:
            return self.tokens_BKW
        return torch.cat([self.tokens_BKW, *(one.tokens_AKW for one in self.differences)])

    def added(self, predicted_N: torch.Tensor) -> torch.Tensor:
        """e = e_T + sum_m (e_Tm - e_T), (B, ...), of the predictions of all evaluations."""
        counts = [len(self.tokens_BKW), *(len(one.row_A) for one in self.differences)]
        base_B, *others = predicted_N.split(counts)
        total_B = base_B
        for one, predicted_A in zip(self.differences, others, strict=True):
            total_B = total_B.index_add(0, one.row_A, predicted_A - base_B[one.row_A])
        return total_B

    def repeated(self, length: int) -> "TokenTerms":
        """The same tokens again and again, to so many: what a cross-attention over them gives stays the same."""
        times = length // self.tokens_BKW.shape[1]
        if times == 1:
            return self
        return TokenTerms(self.tokens_BKW.repeat(1, times, 1),
                          tuple(Difference(one.row_A, one.tokens_AKW.repeat(1, times, 1)) for one in self.differences))

    def placed(self, place_B: torch.Tensor) -> "TokenTerms":
        """The same rows in another order: ``place_B`` is where each of them goes."""
        return TokenTerms(self.tokens_BKW[place_B.argsort()],
                          tuple(Difference(place_B[one.row_A], one.tokens_AKW) for one in self.differences))

    def in_the_tokens(self, summed_B: torch.Tensor) -> "TokenTerms":
        """In some rows the same sum made in the tokens, L_T + sum_m (L_Tm - L_T); these have no differences any more."""
        if not self.differences or not bool(summed_B.any()):
            return self
        tokens_BKW = torch.where(summed_B[:, None, None], self.added(self.stacked), self.tokens_BKW)
        kept = [(one, ~summed_B[one.row_A]) for one in self.differences]
        return TokenTerms(tokens_BKW, tuple(Difference(one.row_A[kept_A], one.tokens_AKW[kept_A])
                                            for one, kept_A in kept if bool(kept_A.any())))

    def copies(self) -> list[torch.Tensor]:
        """(B, K, W) each: the tokens, then for each difference the tokens with its rows in their place."""
        return [self.tokens_BKW, *(self.tokens_BKW.index_copy(0, one.row_A, one.tokens_AKW) for one in self.differences)]

    def single(self) -> torch.Tensor:
        """The tokens (B, K, W), where they say all.

        Raises:
            ReferenceMismatchError: there are differences to add to what they predict.
        """
        if self.differences:
            raise ReferenceMismatchError(
                "these references are added up in the model's predictions, which takes one evaluation for each of them, so "
                "that no single tokens say it all. Use `token_terms` in place of `tokens`, or add them up in the blocks."
            )
        return self.tokens_BKW

    def by_timestep(self, frames: int) -> "list[TokenTerms]":
        """Rows of T timesteps with F frames each, as the T timesteps."""
        return [TokenTerms(tokens_FKW, tuple(_between(self.differences, number * frames, (number + 1) * frames)))
                for number, tokens_FKW in enumerate(self.tokens_BKW.split(frames))]


def joined(terms: Sequence[TokenTerms]) -> TokenTerms:
    """Several terms as the rows of one."""
    starts = [0]
    for one in terms:
        starts.append(starts[-1] + len(one.tokens_BKW))
    moved = [[Difference(one.row_A + start, one.tokens_AKW) for one in term.differences]
             for term, start in zip(terms, starts, strict=False)]
    differences = []
    for numbered in zip_longest(*moved):
        there = [one for one in numbered if one is not None]
        differences.append(Difference(torch.cat([one.row_A for one in there]), torch.cat([one.tokens_AKW for one in there])))
    return TokenTerms(torch.cat([one.tokens_BKW for one in terms]), tuple(differences))


def _between(differences: Sequence[Difference], start: int, end: int):
    for one in differences:
        inside_A = (one.row_A >= start) & (one.row_A < end)
        if bool(inside_A.any()):
            yield Difference(one.row_A[inside_A] - start, one.tokens_AKW[inside_A])
