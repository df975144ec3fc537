"""The reference pictures that are shipped with the playground."""

from PIL import Image

from emma_core.playground import PLAYGROUND_DIR
from lab.emoji.dataset import split_of
from lab.emoji.icons import VENDORS
from lab.emoji.people import TONES, Person
from lab.playground.export import FACE_PICTURES, OBJECT_PICTURES, STYLE_PICTURES


def test_reference_pictures_are_there_and_none_is_held_out():
    names = {path.stem for path in (PLAYGROUND_DIR / "references").glob("*.png")}
    assert names == {f"style-{vendor.name}" for vendor in VENDORS} | {
        f"face-{tone}" for tone in TONES.values()} | {f"object-{name}" for name in OBJECT_PICTURES}
    for name in names:
        assert Image.open(PLAYGROUND_DIR / "references" / f"{name}.png").size == (128, 128)
    of = {vendor.name: vendor for vendor in VENDORS}
    chosen = [(of[vendor], *rest) for vendor, rest in STYLE_PICTURES.items()]
    chosen += [(of[vendor], caption, tone) for tone, (caption, vendor) in FACE_PICTURES.items()]
    chosen += [(of[vendor], caption, tone) for caption, vendor, tone in OBJECT_PICTURES.values()]
    for vendor, caption, tone in chosen:
        gender, _, role = caption.partition(" ") if caption != "girl" else ("", "", "girl")
        assert split_of(Person("", gender, role, ""), vendor, tone) == "train", (vendor.name, caption, tone)
