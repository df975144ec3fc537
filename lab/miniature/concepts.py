"""What the pictures show: emoji of every kind but flags and signs, with every name that a prompt may call them by."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..emoji.people import TONES, plain_codepoints

_LEFT_OUT_CATEGORIES = {"Flags", "Component", "Symbols"}
_LEFT_OUT_SUBCATEGORIES = {"family", "person-symbol"}  # too many figures for the size
_CLOCK_FACE = re.compile(r"clock face", re.IGNORECASE)  # 24 of them
_PEOPLE = {f"person{kind}" for kind in ("", "-role", "-fantasy", "-gesture", "-activity", "-sport", "-resting")}
_GENDERS = ("woman", "man")
# What people say for what Unicode calls otherwise. Words, replaced inside a name.
_SYNONYMS = {
    "cook": ("chef",),
    "health worker": ("doctor", "nurse"),
    "mage": ("wizard", "witch"),
    "construction worker": ("builder",),
    "police officer": ("police", "cop"),
    "detective": ("spy", "sleuth"),
    "guard": ("royal guard", "soldier"),
    "technologist": ("programmer", "developer"),
    "office worker": ("businessperson", "manager"),
    "factory worker": ("welder",),
    "singer": ("rock star",),
    "artist": ("painter",),
    "firefighter": ("fireman",),
    "mechanic": ("plumber",),
    "student": ("graduate",),
    "teacher": ("professor",),
    "judge": ("lawyer",),
    "merperson": ("mermaid",),
    "biking": ("cyclist", "riding a bike"),
    "running": ("runner", "jogging"),
    "walking": ("walker",),
    "swimming": ("swimmer",),
    "surfing": ("surfer",),
    "dancing": ("dancer",),
}
# The same for one emoji, by code points.
EVERYDAY = {
    "1f385": ("santa", "santa claus", "father christmas"),
    "1f936": ("mrs claus", "mother christmas"),
    "1f468": ("man",), "1f469": ("woman",), "1f466": ("boy",), "1f467": ("girl",), "1f476": ("baby",),
    "1f474": ("old man", "grandfather"), "1f475": ("old woman", "grandmother"), "1f934": ("prince",), "1f478": ("princess",),
    "1f977": ("ninja",), "1f470": ("bride",), "1f935": ("groom",), "1f47c": ("angel",), "1f473": ("person with turban",),
    "1f408": ("cat",), "1f431": ("cat face", "cat", "kitten"), "1f415": ("dog",), "1f436": ("dog face", "dog", "puppy"),
    "2615": ("cup of coffee", "coffee", "cup"), "1f375": ("cup of tea", "tea", "teacup", "cup"),
    "1f3e0": ("house", "home"), "1f3e1": ("house with garden", "house"), "1f697": ("car", "red car"),
    "1f354": ("hamburger", "burger"), "1f355": ("pizza", "slice of pizza"), "1f369": ("donut", "doughnut"),
    "1f382": ("birthday cake", "cake"), "1f370": ("cake", "piece of cake"), "1f35e": ("bread", "loaf of bread"),
    "1f34e": ("apple", "red apple"), "1f332": ("tree", "fir tree"), "1f333": ("tree",), "1f337": ("tulip", "flower"),
    "1f33b": ("sunflower",), "1f339": ("rose", "flower"), "1f600": ("smiley", "grinning face"), "1f642": ("smiley",),
    "2764": ("heart", "red heart"), "2600": ("sun",), "1f319": ("moon", "crescent moon"), "2b50": ("star",),
    "1f40e": ("horse",), "1f434": ("horse face", "horse"), "1f404": ("cow",), "1f42e": ("cow face", "cow"),
    "1f416": ("pig",), "1f437": ("pig face", "pig"), "1f411": ("sheep",), "1f413": ("rooster",), "1f414": ("chicken", "hen"),
    "1f407": ("rabbit",), "1f430": ("rabbit face", "rabbit", "bunny"), "1f42d": ("mouse face", "mouse"), "1f401": ("mouse",),
    "1f43b": ("bear",), "1f43c": ("panda",), "1f981": ("lion",), "1f42f": ("tiger face", "tiger"), "1f405": ("tiger",),
    "1f98a": ("fox",), "1f43a": ("wolf",), "1f438": ("frog",), "1f435": ("monkey face", "monkey"), "1f412": ("monkey",),
    "1f418": ("elephant",), "1f427": ("penguin",), "1f426": ("bird",), "1f989": ("owl",), "1f41f": ("fish",),
    "1f41d": ("bee", "honeybee"), "1f98b": ("butterfly",), "1f422": ("turtle",), "1f40d": ("snake",), "1f409": ("dragon",),
    "1f680": ("rocket",), "2708": ("airplane", "plane"), "1f681": ("helicopter",), "1f6b2": ("bicycle", "bike"),
    "1f68c": ("bus",), "1f682": ("train", "locomotive"), "26f5": ("sailboat", "boat"), "1f6a2": ("ship",),
    "1f3f0": ("castle",), "26ea": ("church",), "1f3e5": ("hospital",), "1f3eb": ("school",), "1f393": ("graduation cap",),
    "1f451": ("crown",), "1f452": ("hat",), "1f3a9": ("top hat", "hat"), "1f457": ("dress",), "1f455": ("t-shirt", "shirt"),
    "1f456": ("jeans", "trousers"), "1f45f": ("running shoe", "shoe"), "1f453": ("glasses",),
    "1f4f1": ("phone", "mobile phone"),
    "1f4bb": ("laptop", "computer"), "1f4d6": ("book", "open book"), "270f": ("pencil",), "1f511": ("key",),
    "1f528": ("hammer",), "2702": ("scissors",), "1f3b8": ("guitar",), "1f3b9": ("piano",), "1f4a1": ("light bulb", "lamp"),
    "1f6cf": ("bed",), "1fa91": ("chair",), "1f6aa": ("door",), "1f4f7": ("camera",), "1f4fa": ("television", "tv"),
    "26bd": ("football", "soccer ball"), "1f3c0": ("basketball",), "1f37a": ("beer", "mug of beer"),
    "1f377": ("wine", "glass of wine"),
    "1f95b": ("milk", "glass of milk"), "1f366": ("ice cream",), "1f9c0": ("cheese",), "1f95a": ("egg",), "1f573": ("hole",),
    "1f916": ("robot",), "1f47b": ("ghost",), "1f47d": ("alien",), "1f480": ("skull",), "1f921": ("clown",), "1f4a9": ("poop",),
    "1f984": ("unicorn",), "1f384": ("christmas tree",), "1f381": ("present", "gift"), "1f388": ("balloon",),
    "1f44d": ("thumbs up",), "1f44e": ("thumbs down",), "1f44b": ("waving hand", "hand"), "1f90c": ("pinched fingers",),
}


@dataclass(frozen=True)
class Concept:
    """One emoji without a tone. `names`: the usual one first. `role` and `gender` of people, else empty."""

    codepoints: str
    names: tuple[str, ...]
    category: str
    subcategory: str
    role: str
    gender: str
    has_tones: bool


def readable(name: str) -> str:
    """A name as a prompt has it: "man-with-white-cane" -> "man with white cane"."""
    return re.sub(r"[^a-z0-9']+", " ", name.lower()).strip()


def select_concepts(datasource: list[dict], usual_names: dict[str, str]) -> list[Concept]:
    """The emoji of `emoji-datasource-google`'s emoji.json that are things, places, animals, faces, hands or people.

    Args:
        usual_names: code points -> the name of today (CLDR's), where known.
    """
    concepts = []
    for entry in datasource:
        if entry["category"] in _LEFT_OUT_CATEGORIES or entry["subcategory"] in _LEFT_OUT_SUBCATEGORIES:
            continue
        if _CLOCK_FACE.search(entry["name"] or ""):
            continue
        concepts.append(_concept(entry, usual_names))
    return concepts


def _concept(entry: dict, usual_names: dict[str, str]) -> Concept:
    codepoints = plain_codepoints(entry["unified"])
    usual = readable(usual_names.get(codepoints) or entry["name"] or entry["short_name"])
    names = [*EVERYDAY.get(codepoints, ()), usual, *_synonyms_of(usual)]
    names += [readable(name) for name in entry["short_names"] if len(readable(name)) > 2]
    is_person = entry["subcategory"] in _PEOPLE
    gender = next((gender for gender in _GENDERS if is_person and re.search(rf"\b{gender}\b", usual)), "")
    role = re.sub(r"\b(woman|man|person)\b", "", usual).strip() if is_person else ""
    return Concept(codepoints, tuple(dict.fromkeys(names)), entry["category"], entry["subcategory"], role, gender,
                   len(entry.get("skin_variations", {})) == len(TONES))


def _synonyms_of(name: str) -> list[str]:
    return [re.sub(rf"\b{word}\b", other, name) for word, others in _SYNONYMS.items()
            if re.search(rf"\b{word}\b", name) for other in others]
