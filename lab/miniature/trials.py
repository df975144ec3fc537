"""What the modules are asked for: held-out pictures to aim at, and the pictures that are shown for them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..playground.evaluate import Trial
from .dataset import PAIR, TRAIN, TRIPLE, UNSEEN_SPLIT, Pictures, Row
from .lists import CONDITIONS, References
from .styles import LEARNT, UNSEEN

SPLITS = (TRIPLE, PAIR)
SHOWN = ("style", "face", "object")
_FAMILIES = {style.word: style.family for style in (*LEARNT, *UNSEEN)}
TELLS = {"style": "style", "face": "tone", "object": "concept"}  # condition -> what its reference tells of a row


def choose_targets(data: Pictures, split: str, count: int, seed: int) -> list[int]:
    """Pictures of a split, styles in turn."""
    chance = random.Random(seed)
    positions = data.positions(split)
    chance.shuffle(positions)
    queues: dict[str, list[int]] = {}
    for position in positions:
        queues.setdefault(data.rows[position].style, []).append(position)
    turns = max(map(len, queues.values()))
    return [queue[turn] for turn in range(turns) for queue in queues.values() if turn < len(queue)][:count]


def choose_trials(data: Pictures, count: int, seed: int, split: str = TRIPLE, toned: bool = True) -> list[Trial]:
    """People of a split in a tone, or else what has none; references are of the train split, of an unseen style its own.

    The face reference is by another family of sets than the target's, so that it tells nothing of the style; what has no
    tone has none either, and its trial names the target in its place.
    """
    chance = random.Random(seed)
    pickers = {name: References(data, data.positions(TRAIN), CONDITIONS[name]) for name in SHOWN}
    if split == UNSEEN_SPLIT:
        pickers["style"] = References(data, data.positions(split), CONDITIONS["style"])
    trials = []
    for target in choose_targets(data, split, len(data.rows), seed):
        if bool(data.rows[target].tone) is toned and len(trials) < count:
            shown = {name: target if name == "face" and not toned else _one(pickers[name], data.rows, target, name, chance)
                     for name in SHOWN}
            if None not in shown.values():
                trials.append(Trial(target, seed=len(trials), **shown))
    return trials


def _one(references: References, rows: Sequence[Row], target: int, name: str, chance: random.Random) -> int | None:
    others = references.of(target, 64, chance)
    if name == "face":
        others = [other for other in others if _FAMILIES[rows[other].style] != _FAMILIES[rows[target].style]]
    return chance.choice(others) if others else None
