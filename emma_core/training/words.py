"""What a run's numbers mean, in words: for the command line's last lines and the node's report."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from ..base.schedule import TIMESTEPS
from .config import TrainConfig
from .held_out import FEWEST, Growth
from .losses import BUCKETS

WIDTH = 72  # letters of a line: a node's text fits it
_DECIDING = 600  # timesteps from here on decide what a picture shows
# on the playground its style module takes 37% of the error on held-out pictures; one that takes 5% hardly changes what is drawn
_MUCH, _LITTLE = 0.15, 0.02
_SAME, _FELL = 0.005, 0.01
_WORSE = 0.02
_BY_HEART = 3.0


def bucket_name(index: int) -> str:
    """The timesteps of a bucket."""
    width = TIMESTEPS // BUCKETS
    return f"{index * width} to {(index + 1) * width - 1}"


def gain_in_words(
    gain: Mapping[str, Sequence[float | None]], growth: Growth | None = None, config: TrainConfig | None = None,
    ended: bool = False,
) -> str:
    """Errors with and without the reference by timestep, what they mean, and what to do next.

    Args:
        gain: see `gain_of_reference`.
        growth: gains on held-out pictures; None or empty: none were held out.
        config: of the run, for the advice.
        ended: the run ended itself.
    """
    pairs = list(zip(gain["with reference"], gain["text only"], strict=True))
    lines = ["error on training pictures, with reference / text only, by timestep:"]
    for index, (shown, plain) in enumerate(pairs):
        if shown is not None and plain:
            change = shown / plain - 1
            lines.append(f"  {bucket_name(index)}: {shown:.5f} / {plain:.5f} ({100 * change:+.1f}%, {_better(change)})")
    learnt = _share(pairs)
    told = growth.gains[-1][1] if growth is not None and growth.gains else learnt
    said = " ".join([_verdict(learnt, told), *_on_held_out(learnt, growth, config, ended)])
    return "\n".join([*lines, *textwrap.wrap(said, WIDTH)])


def _share(pairs: Sequence[tuple[float | None, float | None]]) -> float:
    """How much of the error the reference takes away where a picture is decided."""
    deciding = [(shown, plain) for index, (shown, plain) in enumerate(pairs)
                if index * TIMESTEPS // BUCKETS >= _DECIDING and shown is not None and plain]
    total = sum(plain for _, plain in deciding)
    return 1 - sum(shown for shown, _ in deciding) / total if total else 0.0


def _better(change: float) -> str:
    if abs(change) < _SAME:
        return "the same"
    return "better" if change < 0 else "worse" if change > _WORSE else "a little worse"


def _verdict(learnt: float, told: float) -> str:
    """Of what was measured on held-out pictures where there are any, which ``told`` is then."""
    said = (f"At timesteps {_DECIDING} to {TIMESTEPS - 1}, where it is decided what a picture shows, the reference takes "
            f"{100 * learnt:.1f}% of the error:")
    if told >= _MUCH:
        return f"{said} the module has learnt. Look at the samples, and try strengths of 0.7 to 1.5."
    if told >= _LITTLE:
        return f"{said} the module has learnt a little. Go on with more updates (train.steps), or a higher train.rate."
    return (f"{said} the module has learnt nothing yet. Try more updates (train.steps), a higher train.rate or "
            "train.gate_rate; and look whether the captions leave out what the reference shall bring.")


def _on_held_out(learnt: float, growth: Growth | None, config: TrainConfig | None, ended: bool) -> list[str]:
    if growth is None or not growth.gains:
        few = config is not None and config.train.held_out > 0
        return [f"No pictures were held out, as that would be fewer than {FEWEST}, or the run is shorter than "
                "report.save_every: whether it has learnt its pictures by heart is not known."] if few else []
    (last_step, last), (best_step, best) = growth.gains[-1], growth.best
    said = [f"On held-out pictures, over all timesteps as training weighs them, it takes {100 * last:.1f}% after update "
            f"{last_step}."]
    if ended:
        said.append(f"That has not grown since update {best_step}, so training ended by itself; with train.patience 0 it goes "
                    "on to the last update.")
    elif best_step == last_step and last > 0:
        said.append("That was still growing at the end: more updates (train.steps) may help.")
    if learnt >= _MUCH / 2 and last * _BY_HEART < learnt:
        said.append("That is much less than on the training pictures, which it has learnt by heart: more pictures help, or "
                    "fewer updates.")
    elif best > last + _FELL:
        said.append(f"It took {100 * best:.1f}% after update {best_step}: fewer updates would do.")
    return said
