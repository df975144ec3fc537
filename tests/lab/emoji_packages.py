"""A made-up node_modules folder with a few emoji people, so that the data set is built without npm."""

import json
from pathlib import Path

from lab.emoji.icons import UNSEEN, VENDORS
from lab.emoji.people import TONES

PEOPLE = {  # name in the data source -> (code points, subcategory)
    "MAN": ("1f468", "person"),
    "WOMAN": ("1f469", "person"),
    "OLDER WOMAN": ("1f475", "person"),
    "MAN COOK": ("1f468-200d-1f373", "person-role"),
    "WOMAN COOK": ("1f469-200d-1f373", "person-role"),
    "WOMAN: CURLY HAIR": ("1f469-200d-1f9b1", "person"),
    "MAN WEARING TURBAN": ("1f473-200d-2642", "person-role"),
    "MAN ELF": ("1f9dd-200d-2642", "person-fantasy"),
}
NOT_DRAWN = ("twemoji", "MAN ELF")
SKIN = dict(zip(TONES, ("#fde0c8", "#eac09a", "#c68f5e", "#8d5a33", "#4a2e1d"), strict=True))
ALL_VENDORS = (*VENDORS, UNSEEN)
CLOTHES = dict(zip((vendor.name for vendor in ALL_VENDORS), ("#e03030", "#3060e0", "#30a050", "#a040c0", "#202020"),
                   strict=True))


def write_packages(folder: Path) -> Path:
    """Writes the packages' JSON files and returns the folder."""
    entries = [_entry(name, points, kind) for name, (points, kind) in PEOPLE.items()]
    entries += [_entry("FAMILY", "1f46a", "family"), _entry("ADULT", "1f9d1", "person"),
                _entry("SUPERHERO", "1f9b8", "person-fantasy"),
                _entry("MAN WITHOUT TONES", "1f474", "person") | {"skin_variations": {}}]
    _write(folder / "emoji-datasource-google/emoji.json", entries)
    for vendor in ALL_VENDORS:
        home = folder / "@iconify-json" / vendor.name
        icons, chars = {}, {}
        for name, (points, _) in PEOPLE.items():
            for modifier, colour in SKIN.items():
                if (vendor.name, name) == NOT_DRAWN:
                    continue
                title = f"{name.lower()} {modifier}"
                first, *rest = points.split("-")
                chars["-".join([first, modifier, *rest])] = title
                icons[title] = {"body": _body(colour, CLOTHES[vendor.name], list(PEOPLE).index(name))}
        _write(home / "icons.json", {"icons": icons, "aliases": {}, "width": 32, "height": 32})
        _write(home / "package.json", {"version": "0.0.1"})
        if vendor.name != "fluent-emoji":  # as the real package: it shares the flat set's names
            _write(home / "chars.json", chars)
    return folder


def _body(skin: str, clothes: str, number: int) -> str:
    return (f'<circle cx="16" cy="12" r="8" fill="{skin}"/><rect x="{4 + number}" y="20" width="{24 - 2 * number}" '
            f'height="12" fill="{clothes}"/>')


def _entry(name: str, points: str, kind: str) -> dict:
    return {"name": name, "unified": points.upper(), "subcategory": kind,
            "skin_variations": {modifier.upper(): {} for modifier in TONES}}


def _write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
