"""Vendors' emoji as SVG, out of the npm packages `@iconify-json/*`, rendered with resvg."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emma_core.errors import FileError

from .people import plain_codepoints


class EmojiPackageError(FileError):
    """A package, or the data made of them, is missing; the message says which one and how to get it."""


@dataclass(frozen=True)
class Vendor:
    """`family`: vendors of one family share their drawings' geometry, so they are held out together."""

    name: str
    family: str
    licence: str
    credit: str


VENDORS = (
    Vendor("noto", "noto", "Apache-2.0", "Noto Emoji, Google"),
    Vendor("twemoji", "twemoji", "CC-BY-4.0", "Twemoji, Twitter and contributors"),
    Vendor("fluent-emoji-flat", "fluent", "MIT", "Fluent Emoji flat, Microsoft"),
    Vendor("fluent-emoji", "fluent", "MIT", "Fluent Emoji colour, Microsoft"),
)
UNSEEN = Vendor("openmoji", "openmoji", "CC-BY-SA-4.0", "OpenMoji")  # nothing learns from it: a style to be judged by
DATASOURCE = "emoji-datasource-google"
_PACKAGES = [DATASOURCE, *(f"@iconify-json/{vendor.name}" for vendor in (*VENDORS, UNSEEN))]
_NAMES_FROM = {"fluent-emoji": "fluent-emoji-flat"}  # the colour set has the flat set's names but no chars.json


def read_json(packages: Path, name: str):
    path = packages / name
    if not path.is_file():
        raise EmojiPackageError(
            f"{path} was not found: give --packages a node_modules folder that holds {', '.join(_PACKAGES)}"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def install_packages(cache: Path) -> Path:
    """Installs the packages with npm into `cache` and returns its node_modules folder."""
    npm = shutil.which("npm")
    if npm is None:
        raise EmojiPackageError("npm was not found: install Node.js, or give --packages a node_modules folder")
    cache.mkdir(parents=True, exist_ok=True)
    subprocess.run([npm, "install", "--prefix", str(cache), *_PACKAGES], check=True)
    return cache / "node_modules"


class IconSet:
    """One vendor's SVGs by code points. `svg` gives None for an emoji the vendor hasn't drawn."""

    def __init__(self, packages: Path, vendor: Vendor):
        icons = read_json(packages, f"@iconify-json/{vendor.name}/icons.json")
        chars = read_json(packages, f"@iconify-json/{_NAMES_FROM.get(vendor.name, vendor.name)}/chars.json")
        self.version = read_json(packages, f"@iconify-json/{vendor.name}/package.json")["version"]
        self._icons, self._size = icons["icons"], (icons["width"], icons["height"])
        aliases = icons.get("aliases", {})
        self._parents = {name: alias["parent"] for name, alias in aliases.items() if alias.keys() == {"parent"}}
        self._names = {plain_codepoints(codepoints): name for codepoints, name in chars.items()}

    def svg(self, codepoints: str) -> str | None:
        name = self._names.get(codepoints)
        if name is None:
            return None
        icon = self._icons.get(self._parents.get(name, name))
        if icon is None:
            return None
        width, height = icon.get("width", self._size[0]), icon.get("height", self._size[1])
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )


def render(svg: str, size_px: int) -> np.ndarray:
    """uint8 (size, size, 3) on white."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=size_px, height=size_px, background="#ffffff", skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
