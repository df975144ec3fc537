"""`python -m lab.miniature.export --states DIR --out DIR`: states of the trainings -> one folder of files, in float16.

The folder is laid out as the playground: UNet (diffusers' names), autoencoder, CLIP's two towers (transformers' names) with
their tokenizer, T5 with its tokenizer, a fresh ELLA to begin with.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from emma_core.files.connector_file import save_connector
from emma_core.model.connector import Connector, ConnectorConfig
from lab.playground.text import t5_metadata
from lab.playground.train_base import CONNECTOR

from ..weights import save_tensors
from .clip import TEXT_WIDTH, save_clip
from .timed import read_state
from .train_autoencoder import load_trained
from .train_base import load_base_unet
from .train_clip import load_clip
from .train_t5 import load_t5

CLIP_STATE, BASE_STATE, T5_STATE, AUTOENCODER_STATE = "clip.pt", "base.pt", "t5.pt", "autoencoder.pt"
FIRST_ELLA = "ella-start.safetensors"


def export_autoencoder(states: Path, out: Path) -> None:
    """The miniature's own where it was trained, else the shipped one."""
    state = states / AUTOENCODER_STATE
    save_tensors(load_trained(state if state.exists() else None, "cpu").state_dict(), out / "autoencoder.safetensors")


def export_unet(states: Path, out: Path) -> None:
    config = read_state(states / BASE_STATE)["about"]["unet"]
    save_tensors(load_base_unet(states / BASE_STATE).state_dict(), out / "unet.safetensors", {"unet": json.dumps(config)})


def export_t5(states: Path, out: Path) -> None:
    t5 = load_t5(states / T5_STATE)
    tensors = {key: value for key, value in t5.state_dict().items() if key != "encoder.embed_tokens.weight"}
    entry = {**json.loads(t5_metadata(len(tensors["shared.weight"]))["t5"]), "tokenizer": "t5.tokenizer.json"}
    save_tensors(tensors, out / "t5.safetensors", {"t5": json.dumps(entry)})
    shutil.copyfile((states / T5_STATE).with_suffix(".tokenizer.json"), out / "t5.tokenizer.json")


def export_first_ella(out: Path, seed: int = 0) -> None:
    """A connector that has learnt nothing, of the miniature's size: `train ella` begins with it."""
    torch.manual_seed(seed)
    config = ConnectorConfig(**{**vars(CONNECTOR), "width": TEXT_WIDTH})
    save_connector(Connector(config), out / FIRST_ELLA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=Path, required=True, help=f"folder with {CLIP_STATE}, {BASE_STATE}, {T5_STATE}")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    clip, tokenizer = load_clip(options.states / CLIP_STATE, "cpu")
    save_clip(clip, tokenizer, options.out)
    export_autoencoder(options.states, options.out)
    export_unet(options.states, options.out)
    export_t5(options.states, options.out)
    export_first_ella(options.out)
    for file in sorted(options.out.glob("*.safetensors")):
        print(f"{file.name}: {file.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
