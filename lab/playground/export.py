"""`python -m lab.playground.export`: checkpoints of the training scripts -> the shipped files, in float16."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from emma_core.errors import ImageInputError
from emma_core.files.connector_file import save_connector

from ..emoji.dataset import EmojiPeople, load
from ..weights import save_tensors
from .text import t5_metadata
from .timed_run import averaged
from .train_base import Base
from .training import load_state
from .unet import UNET_CONFIG

# All of the train split. None of them is a caption of the demo, so what the pictures show cannot come from here.
STYLE_PICTURES = {"noto": ("man guard", "medium"), "twemoji": ("man guard", "medium"),
                  "fluent-emoji-flat": ("man guard", "medium"), "fluent-emoji": ("man guard", "medium")}
FACE_PICTURES = {"light": ("woman", "twemoji"), "medium-light": ("man", "noto"), "medium": ("woman", "noto"),
                 "medium-dark": ("man", "twemoji"), "dark": ("girl", "fluent-emoji-flat")}
OBJECT_PICTURES = {"astronaut": ("woman astronaut", "noto", "medium-light"), "farmer": ("man farmer", "twemoji", "dark"),
                   "mage": ("woman mage", "noto", "medium"), "scientist": ("man scientist", "twemoji", "light")}


def averaged_base(checkpoint: Path) -> Base:
    """The base with its averaged weights."""
    return averaged(Base(load_state(checkpoint)["base"]["t5.shared.weight"].shape[0]), checkpoint)


def export_base(options: argparse.Namespace) -> None:
    """Autoencoder, UNet, T5 with tokenizer, ELLA connector, reference encoder."""
    base = averaged_base(options.base / "base.pt")
    options.out.mkdir(parents=True, exist_ok=True)
    save_tensors(load_file(options.autoencoder), options.out / "autoencoder.safetensors")
    save_tensors(load_file(options.encoder), options.out / "encoder.safetensors", {"family": "playground"})
    save_tensors(base.unet.state_dict(), options.out / "unet.safetensors", {"unet": json.dumps(UNET_CONFIG)})
    t5 = {key: value for key, value in base.t5.state_dict().items() if key != "encoder.embed_tokens.weight"}
    save_tensors(t5, options.out / "t5.safetensors", t5_metadata(t5["shared.weight"].shape[0]))
    shutil.copyfile(options.base / "tokenizer.json", options.out / "tokenizer.json")
    save_connector(base.connector, options.out / "ella.safetensors", torch.float16,
                   {"modelspec.title": "EMMA playground ELLA", "modelspec.license": "Apache-2.0"})


def export_references(data: EmojiPeople, out: Path) -> None:
    """A few pictures of the data, for the demo and the example graphs."""
    out.mkdir(parents=True, exist_ok=True)
    for vendor, (caption, tone) in STYLE_PICTURES.items():
        _save_picture(data, caption, vendor, tone, out / f"style-{vendor}.png")
    for tone, (caption, vendor) in FACE_PICTURES.items():
        _save_picture(data, caption, vendor, tone, out / f"face-{tone}.png")
    for name, (caption, vendor, tone) in OBJECT_PICTURES.items():
        _save_picture(data, caption, vendor, tone, out / f"object-{name}.png")


def _save_picture(data: EmojiPeople, caption: str, vendor: str, tone: str, path: Path) -> None:
    wanted = (caption, vendor, tone)
    found = next(index for index, row in enumerate(data.rows) if (row.caption, row.vendor, row.tone) == wanted)
    if data.rows[found].split != "train":
        raise ImageInputError(f"{wanted} is held out: choose a picture of the train split as a reference.")
    Image.fromarray(data.images_NHWC[found]).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `python -m lab.emoji build`")
    parser.add_argument("--autoencoder", type=Path, required=True, help="file of train_autoencoder")
    parser.add_argument("--encoder", type=Path, required=True, help="file of train_encoder")
    parser.add_argument("--base", type=Path, required=True, help="folder of train_base")
    parser.add_argument("--out", type=Path, required=True, help="a folder like the shipped playground")
    options = parser.parse_args()
    export_base(options)
    export_references(load(options.data), options.out / "references")


if __name__ == "__main__":
    main()
