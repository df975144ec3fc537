"""What sample sheets draw if nothing is said: prompts that no picture of the training set has as its caption."""

from __future__ import annotations

from collections.abc import Collection

COUNT = 4
_THINGS = ("a cat asleep on a red sofa", "a lighthouse by the sea in a storm", "an old man reading in a cafe",
           "a bicycle leaning on a garden wall", "a bowl of oranges on a table", "a train crossing a bridge in the mountains",
           "a girl with an umbrella in the rain", "a small house under a starry sky")
_PLACES = ("on a wooden table by a window", "on a beach at sunset", "in a snowy forest", "in the hands of a child",
           "on a shelf full of books", "in tall grass under a blue sky", "on a busy street at night", "on a plain white floor")
_PEOPLE = ("a person reading a book in a library", "a person riding a horse on a beach", "a person in a spacesuit on the moon",
           "an oil painting of a person by a window", "a person cooking in a kitchen", "a person in a winter coat in the snow",
           "a pencil drawing of a person smiling", "a person playing the violin on a stage")
_OF_CONDITION = {"object": _PLACES, "portrait": _PEOPLE, "face": _PEOPLE}
_PLAYGROUND = ("woman judge", "man teacher", "woman pilot", "man mage", "woman farmer", "man astronaut", "woman scientist",
               "man cook", "woman artist", "man guard", "woman singer", "man mechanic")


def sample_prompts(condition: str, on_playground: bool, captions: Collection[str]) -> tuple[str, ...]:
    """COUNT prompts that suit a condition and are none of the captions; fewer where all are."""
    known = {caption.casefold() for caption in captions}
    prompts = _PLAYGROUND if on_playground else _OF_CONDITION.get(condition, _THINGS)
    return tuple(prompt for prompt in prompts if prompt not in known)[:COUNT]
