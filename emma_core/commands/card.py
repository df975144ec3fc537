"""`python -m emma_core card MODULE`: a folder to share a module with: its file, a model card, pictures and scores."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from PIL import Image

from ..drawing import thumbnails
from ..errors import EmmaError, FileError
from ..files.model_card import Beside, model_card
from ..files.module_file import copy_module, load_module
from ..files.plain_file import read_text
from ..model.gated_resampler import GatedResampler
from ..training.log import Log
from ..training.words import bucket_name
from .flags import add_comfyui, find_files
from .inspect import draw

_SHEET, _GATES, _CURVE, _THUMBNAIL = "sheet.png", "gates.png", "loss.png", "thumbnail.jpg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `card`."""
    parser.add_argument("file", type=Path, help="an EMMA module; what its run left beside it (samples, log) is used")
    parser.add_argument("--out", type=Path, help="folder to make; default: <module>-card beside the module")
    for key, explained in (("title", "shown by model sites"), ("author", "who made it"),
                           ("license", "what others may do with it, for instance apache-2.0 or creativeml-openrail-m")):
        parser.add_argument(f"--{key}", default="", help=f"{explained}; default: what the file says")
    parser.add_argument("--base-model", default="", metavar="OWNER/NAME", help="the checkpoint's address at Hugging Face")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="pictures it drew; default: the run's last sample sheet")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="a table in Markdown, for instance of `eval`")
    parser.add_argument("--ella", type=Path, help="draw the gate map: the ELLA it was trained on; the playground has its own")
    parser.add_argument("--text-encoder", type=Path, help="for the gate map: ELLA's text encoder")
    parser.add_argument("--prompt", default="a woman", help="text that the gates see")
    parser.add_argument("--timestep", type=float, default=700.0, help="of the gate map, 0 to 999")
    add_comfyui(parser)


def run(options: argparse.Namespace) -> int:
    """Make the folder, and say what it lacks."""
    try:
        out, lacking = make_card(find_files(options))
        print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
        for note in lacking:
            print(f"note: {note}")
        return 0
    except EmmaError as found:
        print(f"error: {found}", file=sys.stderr)
        return 1


def make_card(options: argparse.Namespace) -> tuple[Path, list[str]]:
    """The folder, and what is missing in it, in words.

    Raises:
        FileError: the folder holds something; a sheet or a table that cannot be read.
        ModuleFileError: no module.
    """
    module = load_module(options.file)
    out = options.out or options.file.with_name(f"{options.file.stem}-card")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out} is not an empty folder; wanted a new one. Remove it, or name another with --out.")
    scores = read_text(options.scores, "a table in Markdown") if options.scores else ""
    sheet = _sheet_of(options)
    picture = _opened(sheet) if sheet else None
    spec = {f"modelspec.{key}": value for key in ("title", "author", "license") if (value := getattr(options, key).strip())}
    module.config = module.config.replace(file_metadata={**module.config.file_metadata, **spec})
    out.mkdir(parents=True, exist_ok=True)
    copy_module(options.file, out / options.file.name, spec)
    if picture is not None:
        picture.save(out / _SHEET)
    curve = options.file.with_name(_CURVE)
    if curve.is_file():
        shutil.copyfile(curve, out / _CURVE)
    thumbnail = thumbnails.jpeg_of(module.config.file_metadata.get(thumbnails.KEY, ""))
    if thumbnail:
        (out / _THUMBNAIL).write_bytes(thumbnail)
    drawn, why = _gates(module, options, out)
    beside = Beside(options.file.name, _SHEET if sheet else "", _GATES if drawn else "", _CURVE if curve.is_file() else "",
                    _gain_of(options.file), scores, options.base_model)
    (out / "README.md").write_text(model_card(module.config, beside), encoding="utf-8")
    return out, [*_missing(module, beside), *([why] if why else [])]


def _sheet_of(options: argparse.Namespace) -> Path | None:
    return options.sheet or next(iter(sorted((options.file.parent / "samples").glob("*.png"), reverse=True)), None)


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as found:
        raise FileError(f"{path} cannot be read ({found}); wanted a picture. Check the file.") from found


def _gates(module: GatedResampler, options: argparse.Namespace, out: Path) -> tuple[bool, str]:
    """Whether the gate map could be drawn, and why not."""
    if module.config.source is not None:
        return False, "no gate map: it is drawn on an ELLA's tokens, and this module acts on a checkpoint's own"
    try:
        draw(module, argparse.Namespace(**{**vars(options), "gate_map": out / _GATES}))
        return True, ""
    except EmmaError as found:
        return False, f"no gate map: {found}"


def _gain_of(file: Path) -> list[tuple[str, float, float]]:
    """What the run's log says last, for the card."""
    lines = [line for line in Log(file.with_name("log.jsonl")).read() if {"with reference", "text only"} <= set(line)]
    pairs = zip(lines[-1]["with reference"], lines[-1]["text only"], strict=True) if lines else ()
    return [(bucket_name(index), shown, plain) for index, (shown, plain) in enumerate(pairs) if shown is not None and plain]


def _missing(module: GatedResampler, beside: Beside) -> list[str]:
    spec = module.config.file_metadata
    wanted = {"title": "title", "author": "author", "license": "licence, so nobody may use it"}
    notes = [f"it has no {word}; add --{key}" for key, word in wanted.items() if not spec.get(f"modelspec.{key}")]
    notes += [] if beside.base_model else ["the base's address is not said; add --base-model, for instance "
                                           "stable-diffusion-v1-5/stable-diffusion-v1-5"]
    return notes + ([] if beside.sheet else ["no sheet: there is no folder `samples` beside the module; add --sheet"])
