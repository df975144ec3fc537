"""The reference pictures that are shipped with the playground, and those of the first world."""

from PIL import Image

from emma_core.playground import PLAYGROUND_DIR
from lab.emoji.dataset import split_of
from lab.emoji.icons import VENDORS
from lab.emoji.people import Person
from lab.miniature.playground import FACES, OBJECTS
from lab.miniature.styles import LEARNT
from lab.playground.export import FACE_PICTURES, OBJECT_PICTURES, STYLE_PICTURES

# graphs of the first world name them
OF_BEFORE = {f"style-{vendor.name}" for vendor in VENDORS} | {f"face-{tone}" for tone in FACE_PICTURES} | {
    f"object-{name}" for name in OBJECT_PICTURES}


def test_a_reference_of_every_kind_is_there_and_credited():
    """That they are of the train split, the export checks."""
    files = {path.stem: path for path in (PLAYGROUND_DIR / "references").iterdir()}
    assert files.keys() == {f"style-{style.package}" for style in LEARNT} | {f"face-{tone}" for tone in FACES} | {
        f"object-{name}" for name in OBJECTS}
    assert files.keys() >= OF_BEFORE
    assert all(Image.open(path).size == (128, 128) for path in files.values())
    credits = (PLAYGROUND_DIR / "CREDITS.md").read_text(encoding="utf-8")
    assert [name for name in files if f"`{name}.png`" not in credits] == []
    assert [style.package for style in LEARNT if f"`@iconify-json/{style.package}`" not in credits] == []


def test_none_of_the_first_world_was_held_out():
    of = {vendor.name: vendor for vendor in VENDORS}
    chosen = [(of[vendor], *rest) for vendor, rest in STYLE_PICTURES.items()]
    chosen += [(of[vendor], caption, tone) for tone, (caption, vendor) in FACE_PICTURES.items()]
    chosen += [(of[vendor], caption, tone) for caption, vendor, tone in OBJECT_PICTURES.values()]
    for vendor, caption, tone in chosen:
        gender, _, role = caption.partition(" ") if caption != "girl" else ("", "", "girl")
        assert split_of(Person("", gender, role, ""), vendor, tone) == "train", (vendor.name, caption, tone)
