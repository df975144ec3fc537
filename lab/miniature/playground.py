"""`python -m lab.miniature.playground --files DIR --runs DIR --data DIR --out DIR`: the second world as the shipped playground.

Weights, reference pictures of every kind, and the list of words that its text encoder read.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from PIL import Image

from emma_core.errors import ImageInputError
from emma_core.files.tensor_file import read_tensors
from emma_core.playground import PLAYGROUND_DIR

from ..weights import save_tensors
from .captions import words_around
from .dataset import TRAIN, Pictures, load
from .styles import LEARNT, Style
from .synonyms import SYNONYMS

MODULES = ("style", "face", "object")
_UNREAD = r"[^\w\s,'-]"  # what no caption had; the shipped tokenizer leaves it out of a prompt
HELP_PAGES = tuple(PLAYGROUND_DIR.parent / "web" / "docs" / name for name in ("EMMAPlayground.md", "EMMAPlayground/zh.md"))
_NAMES, _END_OF_NAMES = "<!-- names -->", "<!-- /names -->"
# Each of the train split. What a style is shown by is no prompt of the demo, so what its pictures show cannot come from here.
_SHOWN_IN_STYLE = (("man guard", "medium"), ("cat face", ""), ("wolf", ""))  # the first that the set has
FACES = {"light": ("woman", "twemoji"), "medium-light": ("man", "noto"), "medium": ("woman", "noto"),
         "medium-dark": ("man", "twemoji"), "dark": ("girl", "flat")}
OBJECTS = {"astronaut": ("woman astronaut", "noto", "medium-light"), "farmer": ("man farmer", "twemoji", "medium-dark"),
           "mage": ("woman mage", "noto", "medium"), "scientist": ("man scientist", "noto", "light"),
           "cat": ("cat face", "twemoji", ""), "dog": ("dog face", "noto", ""), "cup": ("cup of coffee", "3d", ""),
           "house": ("house", "flat", ""), "car": ("car", "noto", ""), "rocket": ("rocket", "twemoji", ""),
           "hamburger": ("hamburger", "flat", ""), "tree": ("fir tree", "3d", "")}


def export_weights(files: Path, runs: Path, out: Path) -> None:
    """UNet, autoencoder, T5 with its tokenizer, reference encoder, ELLA and modules, in float16."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("unet", "autoencoder"):
        shutil.copyfile(files / f"{name}.safetensors", out / f"{name}.safetensors")
    shutil.copyfile(files / "clip_vision.safetensors", out / "encoder.safetensors")
    shutil.copyfile(runs / "ella" / "ella.safetensors", out / "ella.safetensors")
    for name in MODULES:
        shutil.copyfile(runs / f"emma-{name}" / f"emma-{name}.safetensors", out / f"emma-{name}.safetensors")
    tensors, metadata = read_tensors(files / "t5.safetensors", "the miniature's T5")
    entry = json.loads(metadata["t5"])
    export_tokenizer(files / entry["tokenizer"], out / "tokenizer.json")
    save_tensors(tensors, out / "t5.safetensors", {"t5": json.dumps({**entry, "tokenizer": "tokenizer.json"})})


def export_tokenizer(file: Path, out: Path) -> None:
    """What no caption had, such as "!" or an emoji, leaves a prompt before it is read: the T5 would make anything of it."""
    from tokenizers import Regex, Tokenizer, normalizers

    tokenizer = Tokenizer.from_file(str(file))
    unread = [normalizers.Replace(Regex(pattern), " ") for pattern in (_UNREAD, r"\s+")]
    tokenizer.normalizer = normalizers.Sequence([tokenizer.normalizer, *unread, normalizers.Strip()])
    tokenizer.save(str(out))


def export_references(data: Pictures, out: Path) -> dict[str, tuple[str, str, str]]:
    """Pictures of the data as files; of each what it shows, the set and the tone."""
    shown = {f"style-{style.package}": _shown_in(data, style) for style in LEARNT}
    shown |= {f"face-{tone}": (name, style, tone) for tone, (name, style) in FACES.items()}
    shown |= {f"object-{name}": what for name, what in OBJECTS.items()}
    pictures = {name: Image.fromarray(data.images_NHWC[_position(data, *what)]) for name, what in shown.items()}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name, picture in pictures.items():
        picture.save(out / f"{name}.png", optimize=True)
    return shown


def _shown_in(data: Pictures, style: Style) -> tuple[str, str, str]:
    has = {(row.names[0], row.tone) for row in data.rows if row.style == style.word and row.split == TRAIN}
    for name, tone in _SHOWN_IN_STYLE:
        if (name, tone) in has:
            return name, style.word, tone
    raise ImageInputError(f"{style.word} has none of {_SHOWN_IN_STYLE} in its train split: name another thing.")


def _position(data: Pictures, name: str, style: str, tone: str) -> int:
    """Of a picture of the train split, by its usual name if that is enough.

    Raises:
        ImageInputError: there is none.
    """
    found = [position for position in data.positions(TRAIN)
             if (data.rows[position].style, data.rows[position].tone) == (style, tone) and name in data.rows[position].names]
    if not found:
        raise ImageInputError(f"the train split has no {name!r} of {style} in tone {tone!r}: choose another reference.")
    return min(found, key=lambda position: data.rows[position].names.index(name))


def words_of(data: Pictures) -> dict:
    """`words.json`: every name, and the words that stood around names."""
    rows = [data.rows[position] for position in data.positions(TRAIN)]
    things: dict[str, set[str]] = {}
    for row in rows:
        things.setdefault(row.category, set()).add(row.names[0])
    return {"things": {category: sorted(names) for category, names in sorted(things.items())},
            "names": sorted({name for row in rows for name in row.names}), "around": sorted(words_around(rows)),
            "synonyms": SYNONYMS}


def write_help(page: Path, things: dict[str, list[str]]) -> None:
    """Puts what can be drawn between the marks of a help page."""
    text = page.read_text(encoding="utf-8")
    start, end = text.index(_NAMES), text.index(_END_OF_NAMES)
    listed = "\n\n".join(f"**{category}:** {', '.join(names)}." for category, names in things.items())
    page.write_text(f"{text[:start]}{_NAMES}\n\n{listed}\n\n{text[end:]}", encoding="utf-8")


def credits_of(shown: dict[str, tuple[str, str, str]]) -> str:
    """CREDITS.md: what the weights learnt from, and who drew each picture."""
    by_word = {style.word: style for style in LEARNT}
    sets = [f"| {style.credit} | {style.licence} | `@iconify-json/{style.package}` |" for style in LEARNT]
    pictures = [f"| `{name}.png` | {thing}{f', {tone} skin tone' if tone else ''} | {by_word[style].credit} |"
                for name, (thing, style, tone) in shown.items()]
    template = Path(__file__).with_name("credits.md").read_text(encoding="utf-8")
    return template.replace("{sets}", "\n".join(sets)).replace("{pictures}", "\n".join(pictures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, required=True, help="folder of `python -m lab.miniature.export`")
    parser.add_argument("--runs", type=Path, required=True, help="folder with ella/ and emma-<name>/, runs of the trainer")
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.miniature.dataset`")
    parser.add_argument("--out", type=Path, default=PLAYGROUND_DIR, help="default: the shipped playground")
    parser.add_argument("--help-pages", type=Path, nargs="*", default=HELP_PAGES, help="that list what can be drawn")
    options = parser.parse_args()
    data = load(options.data)
    export_weights(options.files, options.runs, options.out)
    shown = export_references(data, options.out / "references")
    words = words_of(data)
    (options.out / "words.json").write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")
    for page in options.help_pages:
        write_help(page, words["things"])
    (options.out / "CREDITS.md").write_text(credits_of(shown), encoding="utf-8")
    for file in sorted(options.out.rglob("*")):
        if file.is_file():
            print(f"{file.relative_to(options.out)}: {file.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
