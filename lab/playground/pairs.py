"""Which picture serves as the reference of which target: the pairs that the modules learn from and are judged by."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..emoji.dataset import EmojiPicture
from ..emoji.icons import UNSEEN, VENDORS
from .text import wordings, wordings_of_category

GROUPS = {"style": "vendor", "face": "tone", "object": "caption"}  # what a reference tells
CONDITIONS = tuple(GROUPS)
_FAMILIES = {vendor.name: vendor.family for vendor in (*VENDORS, UNSEEN)}


def prompts(condition: str, target: EmojiPicture) -> list[str]:
    """Prompts for a target whose reference is of this condition; an object module must not read in the prompt what it is."""
    return wordings_of_category() if condition == "object" else wordings(target)


class ReferencePicker:
    """Draws reference pictures, by their positions in the data set, out of the given ones only.

    Args:
        rows: of the whole data set.
        positions: pictures that may be references (the train split: held-out pictures are never seen).
    """

    def __init__(self, rows: Sequence[EmojiPicture], positions: Sequence[int]):
        self._rows = rows
        self._of_vendor: dict[str, list[int]] = {}
        self._of_tone: dict[tuple[str, str], list[int]] = {}
        self._of_emoji: dict[str, list[int]] = {}
        for position in positions:
            row = rows[position]
            self._of_vendor.setdefault(row.vendor, []).append(position)
            self._of_tone.setdefault((row.tone, row.vendor), []).append(position)
            self._of_emoji.setdefault(row.emoji, []).append(position)
        self.vendors = sorted(self._of_vendor)

    def style(self, target: EmojiPicture, chance: random.Random) -> int:
        """A reference of the style: another emoji of the target's vendor, in any tone."""
        return self._another(self._of_vendor[target.vendor], target, chance)

    def face(self, target: EmojiPicture, chance: random.Random, other_vendor: bool = False) -> int:
        """A reference of the face: another person of the target's tone, by any vendor, or by another one than the target's."""
        vendors = [name for name in self.vendors if not (other_vendor and name == target.vendor)]
        return self._another(self._of_tone[target.tone, chance.choice(vendors)], target, chance)

    def object(self, target: EmojiPicture, chance: random.Random) -> int:
        """A reference of the object: the same emoji in any tone, by a vendor whose drawings are not made of the target's."""
        family = _FAMILIES[target.vendor]
        return chance.choice([position for position in self._of_emoji[target.emoji]
                              if _FAMILIES[self._rows[position].vendor] != family])

    def pick(self, condition: str, target: EmojiPicture, chance: random.Random) -> int:
        """A reference of one of CONDITIONS, as in training."""
        return {"style": self.style, "face": self.face, "object": self.object}[condition](target, chance)

    def _another(self, positions: list[int], target: EmojiPicture, chance: random.Random) -> int:
        return chance.choice([position for position in positions if self._rows[position].emoji != target.emoji])
