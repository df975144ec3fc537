"""A made-up node_modules folder with a few emoji of every kind as simple shapes, so that the data set is built without npm."""

import json
from pathlib import Path

from lab.miniature.styles import LEARNT, UNSEEN

TONES = {"1f3fb": "#ffe0c0", "1f3fc": "#e0c090", "1f3fd": "#c09060", "1f3fe": "#906030", "1f3ff": "#503010"}
# code points, name of today, Unicode's old name, short name, category, subcategory, has tones
EMOJI = (
    ("1f408", "cat", "CAT", "cat2", "Animals & Nature", "animal-mammal", False),
    ("2615", "hot-beverage", "HOT BEVERAGE", "coffee", "Food & Drink", "drink", False),
    ("1f3e0", "house", "HOUSE BUILDING", "house", "Travel & Places", "place-building", False),
    ("1f469-200d-1f373", "woman-cook", "COOK", "female-cook", "People & Body", "person-role", True),
    ("1f468-200d-1f33e", "man-farmer", "FARMER", "male-farmer", "People & Body", "person-role", True),
    ("1f1eb-1f1f7", "flag-france", "FRANCE FLAG", "flag-fr", "Flags", "country-flag", False),
)
TONE_NAMES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
WITH_CODEPOINTS = ("noto", "twemoji", "openmoji", "fluent-emoji-flat")


def forms(codepoints: str, name: str, has_tones: bool):
    yield codepoints, name, "#ffcc00"
    if has_tones:
        first, *rest = codepoints.split("-")
        for modifier, colour in TONES.items():
            yield "-".join([first, modifier, *rest]), f"{name}-{TONE_NAMES[modifier]}-skin-tone", colour


def write_package(folder: Path, package: str, number: int) -> None:
    """One set: circles whose size tells the emoji, their colour the tone, their rim the set."""
    icons, chars = {}, {}
    for index, (codepoints, name, _, _, _, _, has_tones) in enumerate(EMOJI):
        for form, form_name, colour in forms(codepoints, name, has_tones):
            circle = f'<circle cx="16" cy="16" r="{6 + 2 * index}" fill="{colour}"'
            icons[form_name] = {"body": f'{circle} stroke="#00{number * 20:02x}88" stroke-width="2"/>'}
            chars[form] = form_name
    folder.mkdir(parents=True)
    (folder / "icons.json").write_text(json.dumps({"icons": icons, "width": 32, "height": 32}))
    (folder / "chars.json").write_text(json.dumps(chars if package in WITH_CODEPOINTS else {}))
    (folder / "package.json").write_text(json.dumps({"version": "1.0.0"}))


def write_packages(root: Path) -> Path:
    """Writes the packages' JSON files and returns the folder."""
    for number, style in enumerate((*LEARNT, *UNSEEN)):
        write_package(root / "@iconify-json" / style.package, style.package, number)
    datasource = root / "emoji-datasource-google"
    datasource.mkdir()
    variations = {"skin_variations": {tone.upper(): {} for tone in TONES}}
    entries = [{"name": old, "unified": codepoints.upper(), "short_name": short, "short_names": [short], "category": category,
                "subcategory": subcategory, **(variations if has_tones else {})}
               for codepoints, _, old, short, category, subcategory, has_tones in EMOJI]
    (datasource / "emoji.json").write_text(json.dumps(entries))
    return root
