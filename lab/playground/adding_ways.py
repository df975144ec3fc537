"""Ways to add modules up over the steps of a sampling, each a function that says what the positive predicts at a step.

Beside those of `emma_core.model.addition`, to measure them with the same code, here are those that were tried and left.

Shapes: B pictures, latents 4 x h x w.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from emma_core.model.addition import BLOCKS

BALANCED = "strongest gate, balanced"


@dataclass(frozen=True)
class Shown:
    """What one evaluation of the UNet reads: the prompt and some references, each with its strength.

    Args:
        strengths: (condition, strength) of each reference.
        way: where these are added up, BLOCKS or TOKENS; or BALANCED: only the module with the largest gate acts on a token.
    """

    strengths: tuple[tuple[str, float], ...] = ()
    way: str = BLOCKS

    def __add__(self, other: Shown) -> Shown:
        return Shown(self.strengths + other.strengths, self.way)


TEXT = Shown()
Ask = Callable[..., list[torch.Tensor]]  # of any number of Shown, or of tuples of them whose tokens are joined
Way = Callable[[int, int, Ask], torch.Tensor]  # (number of the step, timestep, ask) -> what the positive predicts


def together(shown: Shown | tuple[Shown, ...]) -> Way:
    """One evaluation."""
    return lambda step, timestep, ask: ask(shown)[0]


def in_predictions(each: Sequence[Shown], base: Shown = TEXT) -> Way:
    """e = e_T + sum_m (e_Tm - e_T), with a base that may show references itself."""
    def predict(step: int, timestep: int, ask: Ask) -> torch.Tensor:
        base_B4hw, *others = ask(base, *(base + one for one in each))
        return base_B4hw + sum(other_B4hw - base_B4hw for other_B4hw in others)
    return predict


def above(limit: int, way: Way, then: Way) -> Way:
    """One way at noisy timesteps, another below."""
    return lambda step, timestep, ask: (way if timestep >= limit else then)(step, timestep, ask)


def at_steps(steps: set[int], way: Way, then: Way) -> Way:
    """One way at some steps, another at the others."""
    return lambda step, timestep, ask: (way if step in steps else then)(step, timestep, ask)


def taking_turns(each: Sequence[Shown], base: Shown = TEXT) -> Way:
    """In the predictions, but after the first step one module a step is evaluated; the others' differences are kept."""
    kept: dict[Shown, torch.Tensor] = {}
    turns = itertools.cycle(each)

    def predict(step: int, timestep: int, ask: Ask) -> torch.Tensor:
        now = [next(turns)] if kept else each
        base_B4hw, *others = ask(base, *(base + one for one in now))
        kept.update({one: other_B4hw - base_B4hw for one, other_B4hw in zip(now, others, strict=True)})
        return base_B4hw + sum(kept.values())
    return predict


def keeping_differences(each: Sequence[Shown], fresh: set[int], base: Shown = TEXT) -> Way:
    """In the predictions at some steps; between them only the text is evaluated, and the differences are kept."""
    kept: list[torch.Tensor] = []

    def predict(step: int, timestep: int, ask: Ask) -> torch.Tensor:
        if step not in fresh:
            return ask(base)[0] + kept[-1]
        base_B4hw, *others = ask(base, *(base + one for one in each))
        kept.append(sum(other_B4hw - base_B4hw for other_B4hw in others))
        return base_B4hw + kept[-1]
    return predict


def keeping_corrections(each: Sequence[Shown], fresh: set[int], summed: Shown) -> Way:
    """The sum, corrected by what the predictions had more at the last of some steps."""
    kept: list[torch.Tensor] = []

    def predict(step: int, timestep: int, ask: Ask) -> torch.Tensor:
        if step not in fresh:
            return ask(summed)[0] + kept[-1]
        summed_B4hw, text_B4hw, *others = ask(summed, TEXT, *each)
        full_B4hw = text_B4hw + sum(other_B4hw - text_B4hw for other_B4hw in others)
        kept.append(full_B4hw - summed_B4hw)
        return full_B4hw
    return predict


def alternating(each: Sequence[Shown]) -> Way:
    """One module a step; its strength has to make up for the others' steps."""
    return lambda step, timestep, ask: ask(each[step % len(each)])[0]


def mean_of(each: Sequence[Shown]) -> Way:
    """The mean of the modules' predictions: each runs alone, as many times as strong as there are modules."""
    return lambda step, timestep, ask: torch.stack(ask(*each)).mean(0)


def projected(each: Sequence[Shown], share: float) -> Way:
    """In the predictions, less what two modules' differences share.

    Args:
        share: 1 takes from each difference its part along the other; 0.5 half of it, so that what both say counts once.
    """
    def predict(step: int, timestep: int, ask: Ask) -> torch.Tensor:
        text_B4hw, *others = ask(TEXT, *each)
        first_B4hw, second_B4hw = (other_B4hw - text_B4hw for other_B4hw in others)
        return (text_B4hw + first_B4hw - share * along(first_B4hw, second_B4hw)
                + second_B4hw - share * along(second_B4hw, first_B4hw))
    return predict


def along(one_B4hw: torch.Tensor, other_B4hw: torch.Tensor) -> torch.Tensor:
    """The part of one row's difference that lies along the other."""
    inner_B = (one_B4hw * other_B4hw).sum((1, 2, 3)) / other_B4hw.square().sum((1, 2, 3)).clamp(min=1e-12)
    return inner_B[:, None, None, None] * other_B4hw
