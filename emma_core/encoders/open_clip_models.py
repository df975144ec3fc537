"""Picture towers of open_clip (ViT, SigLIP, EVA02, ConvNeXt, ...) from local files, as reference encoders.

Shapes: B pictures, S the input size, N vectors (prefix tokens and cells, or the cells of a map), C the width of a block,
D the projected width.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from einops import rearrange
from torch import nn

from ..errors import EncoderFileError, ImageInputError, short
from ..files.plain_file import visible
from ..files.tensor_file import check_finite, fingerprint_of_weights, integers_in, open_weights
from .base import PictureEncoder
from .open_clip_recognition import (
    CONFIG_NAME,
    Tower,
    built_on_meta,
    check_fits_model,
    declared_tower,
    named_tower,
    recognised_tower,
    shapes_of,
    warn_of_other_tags,
)
from .options import LAYERS, EncodeOptions
from .weights import WEIGHT_SUFFIXES, Shapes

_FOLDER = "models/open_clip"
_WHAT = "weights of an open_clip model"
# as published beside an open_clip_config.json; the best first
_PUBLISHED = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_REMOTE = re.compile(r"[A-Za-z-]{2,}:")  # "hf-hub:", "https:"; one letter would be a drive
_BYTES_PER_VECTOR = 4 * 16  # float32, and about 16 numbers of the width for each vector in a block
_TYPICAL_KERNEL = (1024, 3, 14, 14)
_BYTES_PER_COLOUR = 4  # of a map: float32 at the picture's size for each channel of the first convolution


class OpenClipEncoder(PictureEncoder):
    """`global` (B, 1, D): the projected embedding, not normalised; `local` (B, N, C): the states after a block.

    States of a transformer are those before the final norm, its class token or registers first. Of a convolutional tower
    they are the cells of the last stage's map, row by row.
    """

    def __init__(self, model: nn.Module, tower: Tower, fingerprint: str):
        self.model = model
        self.preparation = tower.preparation
        self.description = {"family": f"open_clip:{tower.name}", "fingerprint": fingerprint,
                            "input_size": tower.preparation.size_px}
        trunk = getattr(model, "trunk", model)
        own_blocks = getattr(getattr(model, "transformer", None), "resblocks", ())
        blocks = own_blocks or (getattr(trunk, "blocks", ()) if hasattr(trunk, "num_prefix_tokens") else ())
        self._is_map = not len(blocks)
        self._prefixes = getattr(trunk, "num_prefix_tokens", 1)  # open_clip's own transformers have a class token
        self.layers = LAYERS if len(blocks) > 1 else LAYERS[:1]
        has_states = hasattr(model, "forward_intermediates") and hasattr(trunk, "forward_intermediates")
        self.feature_names = ("global", "local") if has_states else ("global",)
        self.bytes_per_picture = _bytes_per_picture(model, tower.preparation.size_px, self._is_map)

    def features_of(self, seen_B3SS: torch.Tensor, options: EncodeOptions) -> dict[str, torch.Tensor]:
        self._check(seen_B3SS, options)
        pixels_B3SS = self.preparation.normalise(seen_B3SS).to(next(self.model.parameters()))
        if "local" not in options.features:
            return {"global": self.model(pixels_B3SS)[:, None]}
        output = self.model.forward_intermediates(
            pixels_B3SS, indices=[-1 - LAYERS.index(options.layer)], intermediates_only="global" not in options.features,
            output_fmt="NCHW" if self._is_map else "NLC", output_extra_tokens=not self._is_map and self._prefixes > 0,
        )
        [local] = output["image_intermediates"]
        if self._is_map:
            local = rearrange(local, "b c h w -> b (h w) c")
        elif self._prefixes:
            local = torch.cat([*output["image_intermediates_prefix"], local], dim=1)
        if "global" not in options.features:
            return {"local": local}
        return {"local": local, "global": output["image_features"][:, None]}

    def _check(self, seen_B3SS: torch.Tensor, options: EncodeOptions) -> None:
        family, size_px = self.description["family"], self.preparation.size_px
        if seen_B3SS.ndim != 4 or tuple(seen_B3SS.shape[1:]) != (3, size_px, size_px):
            raise ImageInputError(f"pictures of shape {tuple(seen_B3SS.shape)}; {family} wants (pictures, 3, {size_px}, "
                                  f"{size_px}). Prepare them first.")
        if "local" in options.features and options.layer not in self.layers:
            raise ImageInputError(f"the {options.layer} layer of {family}, whose tower gives only the {self.layers[0]} one. "
                                  "Choose that layer.")


def load_open_clip_encoder(path: str | Path, model_name: str | None = None) -> OpenClipEncoder:
    """The picture tower of a local file; nothing is downloaded, and the text tower is left out.

    Args:
        path: the weights, .safetensors or a PyTorch file that is opened as weights alone, of the whole model or of its
            picture tower; or a folder with them and open_clip_config.json.
        model_name: one of `model_names`; by default it is declared by open_clip_config.json, or recognised.
    Raises:
        EncoderFileError: open_clip is missing; no such file, not such weights, not weights alone; an unknown or unfitting
            model; several models that treat a picture differently.
    """
    weights_path, config_path = _located(path)
    name = weights_path.name
    tower = declared_tower(config_path, model_name) if config_path else named_tower(model_name) if model_name else None
    weights = _picture_tower(weights_path)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    tower = tower or recognised_tower(shapes, name)
    model = built_on_meta(tower)
    check_fits_model(shapes, shapes_of(model), tower.name, name)
    check_finite(weights, name, EncoderFileError, integers_in(model.state_dict()))
    fingerprint = fingerprint_of_weights(weights)
    # copies, as tensors of a PyTorch file lie in the file itself
    values = {key: value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
              for key, value in weights.items()}
    model.load_state_dict(values, assign=True)
    _compute_buffers(model)
    warn_of_other_tags(tower)
    return OpenClipEncoder(model.eval().requires_grad_(False), tower, fingerprint)


def _located(path: str | Path) -> tuple[Path, Path | None]:
    """The file of weights, and the configuration published with it.

    Raises:
        EncoderFileError: what is no local path, or a folder without both.
    """
    path = Path(path)
    if not path.exists() and (path.suffix.lower() not in WEIGHT_SUFFIXES or _REMOTE.match(str(path))):
        raise EncoderFileError(f"{str(path)!r} is no file or folder on this computer, and nothing is downloaded; wanted "
                               f"{_WHAT}. Download them, put the file into {_FOLDER} and choose it.")
    if not path.is_dir():
        config_path = path.with_name(CONFIG_NAME)
        return path, config_path if path.name in _PUBLISHED and config_path.is_file() else None
    files = [file for file in visible(path.iterdir()) if file.suffix.lower() in WEIGHT_SUFFIXES]
    published = [path / name for name in _PUBLISHED if path / name in files]
    chosen = published or files
    if not (path / CONFIG_NAME).is_file() or not chosen:
        raise EncoderFileError(f"the folder {path.name} holds no {CONFIG_NAME if chosen else 'weights'}; wanted both. Choose a "
                               "file of weights, or download what is missing.")
    if len(chosen) > 1 and not published:
        raise EncoderFileError(f"the folder {path.name} holds several weights ({', '.join(file.name for file in files)}). "
                               f"Leave one of them, or name it {_PUBLISHED[0]}.")
    return chosen[0], path / CONFIG_NAME


def _picture_tower(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the picture tower, under the tower's own names; nothing else is read."""
    with open_weights(path, _WHAT, EncoderFileError) as file:
        return {own: file.tensor(key) for key, own in _own_names(list(file.stored), path.name).items()}


def _own_names(keys: list[str], name: str) -> dict[str, str]:
    """Key in the file -> the picture tower's name of it, for whole models and for picture towers alone."""
    plain = {key: key.removeprefix("module.") for key in keys}
    visual = {key: own.removeprefix("visual.") for key, own in plain.items() if own.startswith("visual.")}
    if visual:
        return visual
    if "conv1.weight" in plain.values() or any(own.startswith("trunk.") for own in plain.values()):
        return plain
    some = ", ".join(map(short, keys[:3]))
    raise EncoderFileError(f"{name} holds no picture tower of open_clip (its tensors: {some}, ...); wanted {_WHAT}. Where "
                           f"a model is published in several layouts, take {_PUBLISHED[0]}.")


def _bytes_per_picture(model: nn.Module, size_px: int, is_map: bool) -> int:
    """Working memory of one more picture, about: what the first layer with a kernel puts out decides it."""
    width, _, patch_px, _ = next((weight.shape for weight in model.parameters() if weight.ndim == 4), _TYPICAL_KERNEL)
    return width * (size_px ** 2 * _BYTES_PER_COLOUR if is_map else (size_px // patch_px) ** 2 * _BYTES_PER_VECTOR)


def _compute_buffers(model: nn.Module) -> None:
    """Fill the buffers that no file holds: rotary embeddings, window masks.

    Raises:
        EncoderFileError: this version of timm cannot.
    """
    for module in model.modules():
        missing = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if missing and not hasattr(module, "init_non_persistent_buffers"):
            raise EncoderFileError(f"the installed timm cannot compute {', '.join(missing)} of {type(module).__name__}. Update "
                                   "it: pip install -U timm")
        for name in missing:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if missing:
            module.init_non_persistent_buffers()


def recognises(shapes: Shapes) -> bool:
    """See `EncoderKind`."""
    names = {key.removeprefix("module.").removeprefix("model.") for key in shapes}
    return "conv1.weight" in names or any(name.startswith(("visual.", "trunk.")) for name in names)


def load(path: Path, open_clip_model: str | None) -> OpenClipEncoder:
    """See `EncoderKind`."""
    return load_open_clip_encoder(path, open_clip_model)
