"""`python -m emma_core generate PROMPT ... --module FILE PICTURE [STRENGTH]`: pictures without ComfyUI, on any base."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..base.config import (
    PLAYGROUND_GUIDANCE,
    BaseConfig,
    EllaConfig,
    EncodersConfig,
    SamplingConfig,
    check_files,
    encoder_files,
    size_px,
)
from ..base.found_files import found_file, with_found_files
from ..base.pairing import check_pairing
from ..base.pipeline import Request, Sampling
from ..base.spec import PLAYGROUND_SPEC
from ..base.text_to_image import TextToImage, save_picture
from ..errors import EmmaError, ImageInputError
from ..evaluation.references import reference_of
from ..files.comfyui_folders import find_comfyui
from ..files.loading_words import loading_in_words
from ..files.picture_file import picture_tensor
from ..files.plain_file import is_file
from ..files.writing import check_new_folder, make_folder
from ..model.addition import ADDITIONS, RECOMMENDED
from ..model.assembly import Assembly, Reference
from ..playground import PLAYGROUND
from ..playground.words import known_words, size_notice
from ..settings import resolve_sections
from ..text.prompt_weights import weighted_parts
from .flags import add_comfyui, add_keys, changes_of

_EPILOG = """examples:
  python -m emma_core generate "man cook" --module playground/emma-style.safetensors playground/references/style-twemoji.png
  python -m emma_core generate "man cook" "woman judge" --count 4 --out drawn \\
      --module playground/emma-style.safetensors playground/references/style-fluent-emoji.png \\
      --module playground/emma-face.safetensors playground/references/face-dark.png 1.2        (both assembled)
  python -m emma_core generate "a castle" --base.checkpoint v1-5-pruned-emaonly.safetensors \\
      --ella.file ella-sd1.5-tsc-t5xl.safetensors --ella.text_encoder flan-t5-xl \\
      --encoder.files CLIP-ViT-H-14-laion2B-s32B-b79K --module style.safetensors ink.jpg
  python -m emma_core generate "a castle" --base.checkpoint sd_xl_base_1.0.safetensors \\
      --encoder.files CLIP-ViT-H-14-laion2B-s32B-b79K --module style-sdxl.safetensors ink.jpg    (its own text encoders)

(words:1.2) and (words) weigh words as in ComfyUI; \\( and \\) are brackets themselves.
A mask beside a reference (<name>.mask.png, white = keep) is used by modules that were trained with masks. Nothing is
downloaded, and no picture is written over another."""
_LONGEST_NAME = 40


@dataclass(frozen=True)
class PictureConfig:
    """What pictures are made with."""

    base: BaseConfig = field(default_factory=BaseConfig)
    ella: EllaConfig = field(default_factory=EllaConfig)
    encoder: EncodersConfig = field(default_factory=EncodersConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True)
class Shown:
    """A module, its reference picture, its strength, as `--module` names them."""

    module: str
    picture: Path
    strength: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `generate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.usage = "%(prog)s PROMPT ... [--module FILE PICTURE [STRENGTH]] ... [--section.key VALUE ...]"
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="a picture, or --count of them, for each")
    parser.add_argument("--module", nargs="+", action="append", default=[], dest="shown", metavar=("FILE", "PICTURE"),
                        help="an EMMA module, its reference picture, and its strength (default: 1); may be given again")
    parser.add_argument("--adding", choices=list(ADDITIONS), default=RECOMMENDED,
                        help="where several modules are added up: each alone, in what is predicted at the start or to the end; "
                             "in the tokens; or together in the blocks (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("output"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--count", type=int, default=1, help="pictures of each prompt, from different noise")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt; the next ones count up")
    parser.add_argument("--device", default="", choices=["", "cpu"], help="cpu: leave GPUs alone")
    add_comfyui(parser)
    add_keys(parser, PictureConfig)


def run(options: argparse.Namespace) -> int:
    """Draw and save; mistakes are told in one line."""
    try:
        for path in draw(options):
            print(path)
        return 0
    except EmmaError as found:
        print(f"error: {found}", file=sys.stderr)
        return 1


def draw(options: argparse.Namespace) -> list[Path]:
    """The files that were written.

    Raises:
        EmmaError: arguments that cannot be meant, files that cannot be used, parts that do not fit together.
    """
    if options.count < 1:
        raise EmmaError(f"--count {options.count}; wanted 1 or more.")
    comfyui = find_comfyui(options.comfyui)
    shown = [shown_of([found_file("--module", words[0], ("emma",), comfyui), *words[1:]]) for words in options.shown]
    config = with_found_files(config_of(changes_of(options)), comfyui)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    encoders = encoder_files(config.encoder, bool(shown))
    sampling = Sampling(config.sampling.steps, config.sampling.guidance, *size_px(config.base, config.sampling))
    check_files(config.base, config.ella, [("encoder.files", file) for file in encoders])
    for prompt in (*options.prompts, config.sampling.negative):
        weighted_parts(prompt)
    if config.base.checkpoint == PLAYGROUND:
        notices = [*map(known_words().notice, (*options.prompts, config.sampling.negative)),
                   size_notice(sampling.width_px, sampling.height_px, PLAYGROUND_SPEC.side_px)]
        for notice in filter(None, notices):
            print(notice, file=sys.stderr)
    check_pairing(config.base, config.ella, [one.module for one in shown])
    for one in shown:
        reference_of(one.picture).picture()
    check_new_folder(options.out, "--out")
    if line := loading_in_words((config.base.checkpoint, config.base.vae, config.ella.text_encoder, *encoders)):
        print(line, file=sys.stderr, flush=True)
    machine = TextToImage(config.base, config.ella, encoders, config.encoder.open_clip_model, config.sampling.precision, device)
    assembly = Assembly([_reference(machine, one) for one in shown], ADDITIONS[options.adding])
    seeds = range(options.seed, options.seed + options.count)
    requests = [Request(prompt, assembly, config.sampling.negative, seed) for prompt in options.prompts for seed in seeds]
    make_folder(options.out)
    written = []
    for start in range(0, len(requests), config.sampling.batch):
        batch = requests[start:start + config.sampling.batch]
        written += [save(picture, request, shown, options.adding, options.out)
                    for picture, request in zip(machine.draw(batch, sampling, weighted=True), batch, strict=True)]
    return written


def config_of(changes: Mapping[str, Any]) -> PictureConfig:
    """The settings that flags give; the playground is drawn with the guidance of its graphs.

    Raises:
        SettingsError: see `resolve_sections`.
    """
    playground = changes.get("base.checkpoint", PLAYGROUND) == PLAYGROUND
    begin = {"sampling": {"guidance": PLAYGROUND_GUIDANCE}} if playground else {}
    return PictureConfig(**resolve_sections(PictureConfig, {}, changes, begin))


def shown_of(words: Sequence[str]) -> Shown:
    """FILE PICTURE [STRENGTH].

    Raises:
        EmmaError: too few or too many words, a strength that is no number, a file that does not exist.
    """
    if not 2 <= len(words) <= 3:
        raise EmmaError(f"--module {' '.join(words)}: found {len(words)} words; wanted a module file, its reference picture "
                        "and, if it is not 1, a strength. Prompts stand before the first --module.")
    for file in words[:2]:
        if not is_file(Path(file)):
            raise EmmaError(f"--module names {file!r}, which is no file. Check the path.")
    try:
        strength = float(words[2]) if len(words) == 3 else 1.0
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise EmmaError(f"--module {' '.join(words)}: the strength {words[2]!r} is no number. Write one such as 0.8.")
    return Shown(words[0], Path(words[1]), strength)


def _reference(machine: TextToImage, shown: Shown) -> Reference:
    module, found = machine.load_module(shown.module), reference_of(shown.picture)
    mask_1HW = picture_tensor(found.mask_picture()) if found.mask and module.config.encoder.get("masked") else None
    try:
        features = machine.features(module, picture_tensor(found.picture()), mask_1HW)
    except ImageInputError as error:
        raise ImageInputError(f"{shown.picture.name} cannot be used for {module.name}: {error}") from error
    return Reference(module, features, shown.strength)


def save(picture: Image.Image, request: Request, shown: Sequence[Shown], adding: str, folder: Path) -> Path:
    """Under the first free name of prompt, seed and, where these are taken, a number; what it shows stands in the file."""
    name = re.sub(r"\W+", "-", request.prompt.lower()).strip("-")[:_LONGEST_NAME] or "picture"
    names = (f"{name}-{request.seed}{f'-{number}' if number else ''}.png" for number in range(1_000_000))
    path = next(folder / free for free in names if not (folder / free).exists())
    modules = "; ".join(f"{Path(one.module).name} {one.picture.name} {one.strength:g}" for one in shown)
    words = {"prompt": request.prompt, "seed": str(request.seed), "modules": modules}
    save_picture(picture, path, {**words, "adding": adding} if len(shown) > 1 else words)
    return path
