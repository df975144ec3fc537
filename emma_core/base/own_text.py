"""The text encoders of a checkpoint itself, and what its denoiser reads beside their tokens.

Shapes: B prompts or rows, P width of the pooled vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import TextEncoderFileError
from ..files.json_file import read_json
from ..text.clip_encoder import ClipTextEncoder, LoadedTower, load_tower
from ..text.clip_layout import WHAT, ClipTower
from ..text.clip_tokenizer import load_clip_tokenizer
from .checkpoint_files import read, shapes_of
from .spec import BaseSpec

_WEIGHTS = ("model.safetensors", "model.fp16.safetensors")


def load_own_text(checkpoint: Path, spec: BaseSpec, dtype: torch.dtype) -> ClipTextEncoder:
    """The text encoders in a diffusers folder (with their tokenizers) or in a single file (with CLIP's published one).

    Args:
        checkpoint: the folder or the file.
        spec: of the base; its towers are looked for.
        dtype: of the weights.
    Raises:
        TextEncoderFileError: no text encoders, pickled, damaged or incomplete ones, or of other widths than the base reads.
    """
    load = _of_folder if checkpoint.is_dir() else _of_file
    encoder = ClipTextEncoder([load(checkpoint, tower, dtype) for tower in spec.towers])
    found, wanted = (encoder.width, encoder.pooled_width), (spec.context_width, spec.pooled_width)
    if found != wanted:
        raise TextEncoderFileError(f"{checkpoint.name}: its text encoders give tokens of width {found[0]} and a pooled "
                                   f"vector of {found[1]}; its UNet reads {wanted[0]} and {wanted[1]}. Get the checkpoint "
                                   "again.")
    return encoder


def check_has_own_text(checkpoint: Path, spec: BaseSpec) -> None:
    """Refuse a checkpoint without text encoders, by what is there.

    Raises:
        TextEncoderFileError: which one is lacking.
    """
    if not spec.towers:
        raise TextEncoderFileError(f"{checkpoint.name} has no text encoders of its own, and ella.file is not set. Name its "
                                   "ELLA and text encoder as ella.file and ella.text_encoder.")
    for tower in spec.towers:
        if checkpoint.is_dir():
            _weights_in(checkpoint / tower.folder)
        elif not any(key.startswith(tower.prefix) for key in shapes_of(checkpoint, "a checkpoint")[0]):
            raise TextEncoderFileError(
                f"{checkpoint.name} holds no {WHAT} ({tower.prefix}*), and ella.file is not set. Choose a checkpoint with "
                "its text encoders, or name an ELLA and its text encoder as ella.file and ella.text_encoder.")


def sizes_of(pictures: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> torch.Tensor:
    """(B, 6) what SDXL is told of pictures: height and width as they were, where they were cut (top, left), height and width
    (arXiv 2307.01952, section 2.2).

    Args:
        pictures: ((width, height) as it was, (width, height) as it is) of each; what was scaled to cover is cut in the middle.
    """
    return torch.tensor([[*was[::-1], *_cut(was, now), *now[::-1]] for was, now in pictures], dtype=torch.float32)


def beside_text(pooled_BP: torch.Tensor, size_B6: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a denoiser that reads a pooled vector and sizes is told beside the tokens, under diffusers' names."""
    return {"text_embeds": pooled_BP, "time_ids": size_B6}


def _cut(was: tuple[int, int], now: tuple[int, int]) -> tuple[int, int]:
    """Top and left of the part that stays, in the scaled picture."""
    factor = max(now[0] / was[0], now[1] / was[1])
    return tuple(round((before * factor - after) / 2) for before, after in zip(was[::-1], now[::-1], strict=True))


def _of_folder(folder: Path, tower: ClipTower, dtype: torch.dtype) -> LoadedTower:
    name = f"{folder.name}/{tower.folder}"
    declared = read_json(folder / tower.folder / "config.json", f"the configuration of a {WHAT}", TextEncoderFileError)
    tensors = read(_weights_in(folder / tower.folder), f"a {WHAT}")
    return load_tower(tower, tensors, load_clip_tokenizer(folder / tower.tokenizer), name, dtype, declared)


def _of_file(path: Path, tower: ClipTower, dtype: torch.dtype) -> LoadedTower:
    tensors = {key.removeprefix(tower.prefix): value for key, value in read(path, f"a {WHAT}", (tower.prefix,)).items()}
    return load_tower(tower, tensors, load_clip_tokenizer(None), path.name, dtype)


def _weights_in(folder: Path) -> Path:
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise TextEncoderFileError(f"{folder} holds no {_WEIGHTS[0]}; wanted a {WHAT}, as ella.file is not set. Download the "
                                   "safetensors version, or name an ELLA and its text encoder.")
    return found
