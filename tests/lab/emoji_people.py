"""A small data set of emoji people, of random pixels."""

import numpy as np

from lab.emoji.dataset import EmojiPeople, EmojiPicture

VENDORS = ("noto", "twemoji", "fluent-emoji-flat", "fluent-emoji")
TONES = ("light", "medium", "dark")
ROLES = ("cook", "pilot", "farmer", "with red hair")
SIZE_PX = 32  # the UNet bears any size, and small latents make the tests fast


def small_data() -> EmojiPeople:
    """48 pictures; the dark pilot is held out."""
    rows = [EmojiPicture(str(number), f"man {role}", role, "man", tone, vendor, "", "",
                "heldout-triple" if (role, tone) == ("pilot", "dark") else "train")
            for number, role in enumerate(ROLES) for tone in TONES for vendor in VENDORS]
    pixels = np.random.default_rng(0).integers(0, 256, (len(rows), SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    return EmojiPeople(pixels, rows)
