"""Which emoji are people of the playground, and what a caption calls them.

A caption names gender and role only: style (who drew it) and skin tone must come from reference pictures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}

_SUBCATEGORIES = {"person", "person-role", "person-fantasy"}
# Emoji whose Unicode name isn't "(wo)man <role>": gender and role, as a caption says them.
_NAMED = {
    "BOY": ("", "boy"),
    "GIRL": ("", "girl"),
    "BABY": ("", "baby"),
    "OLDER MAN": ("man", "old"),
    "OLDER WOMAN": ("woman", "old"),
    "PRINCE": ("", "prince"),
    "PRINCESS": ("", "princess"),
    "NINJA": ("", "ninja"),
    "FATHER CHRISTMAS": ("", "santa claus"),
    "MOTHER CHRISTMAS": ("", "mrs claus"),
    "BABY ANGEL": ("", "angel"),
    "PERSON WITH HEADSCARF": ("woman", "with headscarf"),
    "MAN WITH GUA PI MAO": ("man", "with cap"),
    "MAN: BALD": ("man", "bald"),
    "WOMAN: BALD": ("woman", "bald"),
}
# More than one figure, or a body that fills the square: head and shoulders would be lost at this size.
_SKIPPED_ROLES = {"feeding baby", "fairy", "superhero", "supervillain"}


@dataclass(frozen=True)
class Person:
    """One base emoji (no tone). `codepoints` is lower-case hex joined by "-", without the variation selector."""

    codepoints: str
    gender: str
    role: str
    category: str

    @property
    def caption(self) -> str:
        if self.role in ("old", "bald"):
            return f"{self.role} {self.gender}"
        return f"{self.gender} {self.role}".strip()

    def with_tone(self, modifier: str) -> str:
        """The code points with a skin tone modifier after the first of them (Unicode TR51)."""
        first, *rest = self.codepoints.split("-")
        return "-".join([first, modifier, *rest])


def plain_codepoints(text: str) -> str:
    """Lower-case hex joined by "-", without the variation selector."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def _gender_and_role(name: str) -> tuple[str, str] | None:
    if name in _NAMED:
        return _NAMED[name]
    match = re.fullmatch(r"(MAN|WOMAN)(?::? (.*))?", name)
    if match is None:
        return None
    gender, role = match.group(1).lower(), (match.group(2) or "").lower()
    role = role.replace("wearing", "with")
    if ":" in name:
        role = f"with {role}"
    return gender, role


def select_people(datasource: list[dict]) -> list[Person]:
    """The people of `emoji-datasource-google`'s emoji.json with five tones and a (wo)man or a name of their own."""
    known = {plain_codepoints(entry["unified"]) for entry in datasource}
    people = []
    for entry in datasource:
        if entry["subcategory"] not in _SUBCATEGORIES or len(entry.get("skin_variations", {})) != len(TONES):
            continue
        codepoints, found = plain_codepoints(entry["unified"]), _gender_and_role(entry["name"])
        is_ungendered_form = f"{codepoints}-200d-2642" in known  # some are still called MAN ...
        if found is None or found[1] in _SKIPPED_ROLES or is_ungendered_form:
            continue
        people.append(Person(codepoints, *found, entry["subcategory"]))
    captions = [person.caption for person in people]
    assert len(set(captions)) == len(captions), "two base emoji share a caption"
    return people
