"""LoRA files of any common layout: for each layer of the UNet, or of the text encoders, its two matrices and their strength.

W + alpha / rank * up @ down for each layer with its own alpha and rank (arXiv 2106.09685, section 4.1), as resized LoRAs and
those with other ranks for convolutions need. Layouts: kohya's, by diffusers' or the original names of layers; diffusers' older
and newer ones; peft's, with or without `unet.`.

Shapes: r the rank, I and O what a layer takes and gives, k x k the kernel of a convolution.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import EmmaWarning, FileError, short
from ..files.json_file import entry_of, parse_json, read_json
from ..files.tensor_file import check_finite, open_tensors, read_tensors

WHAT = "a LoRA for a UNet of this kind"
# LyCORIS's other kinds, and DoRA: the weight is changed in another way than by a product of two matrices
_OTHER_KINDS = ("hada_", "lokr_", "lora_mid", "dora_scale", "lora_magnitude_vector", "oft_", "glora")
_MATRIX = re.compile(r"(.+?)(?:\.lora_(?P<side>down|up|A|B)(?:\.[\w-]+)?|[._]lora(?:_linear_layer)?\.(?P<old>down|up))\.weight")
_ALPHA = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?)?\.(?:lora_)?alpha")
_DOWN = ("down", "A")
# which text encoder a layer is of; peft names that of a single one without a word for it
_TOWER = re.compile(r"(?:base_model\.model\.)?(?:lora_)?(?:(te2_|text_encoder_2\.|clip_g\.)|te1?_|text_encoder\.|clip_l\.)?"
                    r"(text_model[._].+|text_projection)")
_TEXT = re.compile(r"(base_model\.model\.)?(lora_)?(te[0-9]?_|text_encoder|text_model|clip_[lg]|bundle_emb|emb_params)")
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "unet.", "lora_unet_", "lycoris_unet_")
_CONFIG = "adapter_config.json"  # beside a LoRA that peft saved
_METADATA = "lora_adapter_metadata"  # what diffusers writes into the file of it


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to a layer: ``scale`` times the product of (O, r) and (r, I), (r, I, k, k) of a convolution."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def change(self, shape: tuple[int, ...]) -> torch.Tensor:
        """What is added to a weight of this shape, in float32."""
        return (self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))).reshape(shape)


def read_lora(
    path: Path, weights: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str], text_is_used: bool = False
) -> dict[str, LowRank]:
    """What a LoRA does to the layers of a UNet.

    Args:
        path: a .safetensors file.
        weights: layer -> shape of its weight, by diffusers' names.
        aliases: other names of layers, with "_" in place of ".", -> diffusers' name.
        text_is_used: a part for the text encoders has its effect elsewhere, see `read_text_lora`; else it is left out, with a
            warning.
    Raises:
        FileError: no LoRA, LoHa, LoKr or DoRA, layers or sizes that this UNet has not, half a layer, non-finite weights.
    """
    layers, of_text, metadata = _read(path)
    if of_text and not text_is_used:
        warnings.warn(f"{path.name} also changes the CLIP text encoder; that part is left out, as ELLA's tokens do not come "
                      "from CLIP.", EmmaWarning, stacklevel=3)
    _check_any(layers, path.name)
    declared, found = _Declared.of(path, metadata, "unet."), {}
    for stem, parts in layers.items():
        _add(found, stem, _layer_of(stem, weights, aliases), _low_rank(stem, parts, declared, path.name), weights, path.name)
    return found


def read_text_lora(path: Path, towers: Sequence[Mapping[str, tuple[int, ...]]]) -> list[dict[str, LowRank]]:
    """What a LoRA does to the layers of each text encoder; nothing, where it has no part for them.

    Args:
        path: a .safetensors file.
        towers: of each encoder, layer -> shape of its weight, by transformers' names.
    Raises:
        FileError: as `read_lora`, of these layers; a part for an encoder that is not there, or that is no LoRA of layers.
    """
    _, layers, metadata = _read(path)
    found: list[dict[str, LowRank]] = [{} for _ in towers]
    for stem, parts in layers.items():
        match = _TOWER.fullmatch(stem)
        number = 1 if match and match[1] else 0
        if match is None or number >= len(towers):
            raise FileError(f"{path.name} changes {short(stem)} of the text encoders, and the base has {len(towers)} of them; "
                            "wanted a LoRA made for this kind of model. Choose another file.")
        weights, aliases = towers[number], {layer.replace(".", "_"): layer for layer in towers[number]}
        layer = aliases.get(match[2].replace(".", "_"), match[2])
        declared = _Declared.of(path, metadata, f"text_encoder{'_2' * number}.")
        _add(found[number], stem, layer, _low_rank(stem, parts, declared, path.name), weights, path.name)
    return found


def _add(
    found: dict[str, LowRank], stem: str, layer: str, change: LowRank, weights: Mapping[str, tuple[int, ...]], name: str
) -> None:
    _check_fit(stem, change, weights.get(layer), name)
    if layer in found:
        raise FileError(f"{name} changes the layer {short(layer)} twice; wanted {WHAT}. Get the file again.")
    found[layer] = change


def _read(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Layers of the UNet, layers of text encoders, and the file's metadata."""
    tensors, metadata = read_tensors(path, WHAT)
    check_finite({key: tensor for key, tensor in tensors.items() if not _ALPHA.fullmatch(key)}, path.name)
    return *_layers_in(tensors, path.name), metadata


def check_lora(path: Path) -> None:
    """Refuse a file that is no plain LoRA for a UNet; no numbers are read.

    Raises:
        FileError: no LoRA, LoHa, LoKr or DoRA.
    """
    with open_tensors(path, WHAT) as file:
        layers, _ = _layers_in({key: torch.empty(shape, device="meta") for key, shape in file.shapes.items()}, path.name)
    _check_any(layers, path.name)


def _layers_in(
    tensors: Mapping[str, torch.Tensor], name: str
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, torch.Tensor]]]:
    """As `_by_layer`, of a plain LoRA."""
    other = next((key for key in tensors if any(kind in key for kind in _OTHER_KINDS)), None)
    if other is not None:
        raise FileError(f"{name} is no plain LoRA (it has {short(other)}); wanted a LoRA of two matrices a layer. LoHa, "
                        "LoKr, LoCon with a core and DoRA are not supported: choose another file, or merge it into the base.")
    return _by_layer(tensors, name)


def _check_any(layers: Mapping[str, object], name: str) -> None:
    if not layers:
        raise FileError(f"{name} has no weights for a UNet (unet.*, lora_unet_*, *.lora_A.weight); wanted {WHAT}. Choose "
                        "another file.")


def _by_layer(
    tensors: Mapping[str, torch.Tensor], name: str
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, torch.Tensor]]]:
    """Of the UNet and of text encoders: name of a layer as the file has it -> its "down", "up" and perhaps "alpha"."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    of_text: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        matrix, alpha, is_text = _MATRIX.fullmatch(key), _ALPHA.fullmatch(key), bool(_TEXT.match(key))
        found = of_text if is_text else layers
        if matrix:
            side = "down" if (matrix["side"] or matrix["old"]) in _DOWN else "up"
            found.setdefault(matrix[1], {})[side] = tensor
        elif alpha:
            found.setdefault(alpha[1], {})["alpha"] = tensor
        elif is_text:
            found[key] = {}
        else:
            raise FileError(f"{name} has no weights for a UNet that are a LoRA's: it holds {short(key)}; wanted {WHAT}. Choose "
                            "another file.")
    return layers, of_text


def _layer_of(stem: str, weights: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]) -> str:
    """diffusers' name of a layer, or the file's name where there is none."""
    for prefix in _PREFIXES:
        stem = stem.removeprefix(prefix)
    # the attention processors of older diffusers stand between a layer and its name
    plain = stem.replace(".processor.", ".").replace("_processor_", "_")
    return plain if plain in weights else aliases.get(plain.replace(".", "_"), plain)


def _low_rank(stem: str, parts: Mapping[str, torch.Tensor], declared: _Declared, name: str) -> LowRank:
    if not {"down", "up"} <= parts.keys():
        raise FileError(f"{name} has {' and '.join(parts)} of {short(stem)} alone; wanted two matrices a layer. Get the file "
                        "again.")
    down, up = parts["down"], parts["up"]
    if min(down.ndim, up.ndim) < 2 or down.shape[0] != up.shape[1] or not down.numel():
        raise FileError(f"{name} has {tuple(down.shape)} and {tuple(up.shape)} for {short(stem)}, whose ranks differ; wanted "
                        f"{WHAT}. Get the file again.")
    rank = down.shape[0]
    if "alpha" not in parts:
        return LowRank(down, up, declared.scale(stem, rank))
    alpha = parts["alpha"].double().item() if parts["alpha"].numel() == 1 and not parts["alpha"].is_complex() else math.nan
    if not math.isfinite(alpha):
        raise FileError(f"{name} has the alpha {short(parts['alpha'].tolist())} for {short(stem)}; wanted one number. Get the "
                        "file again.")
    return LowRank(down, up, declared.scale(stem, rank, alpha))


def _check_fit(stem: str, change: LowRank, shape: tuple[int, ...] | None, name: str) -> None:
    """The matrices make a weight of this shape; a 1 x 1 convolution may be told as a plain product."""
    down, up = (tuple(matrix.shape) for matrix in (change.down, change.up))
    fits = shape is not None and _in_four(down)[1:] == _in_four(shape)[1:] and _in_four(up) == (shape[0], down[0], 1, 1)
    if not fits:
        base = "no such layer" if shape is None else f"a layer of shape {shape}"
        raise FileError(f"{name} changes {short(stem)} by matrices of shape {down} and {up}, and the base has {base}; wanted a "
                        "LoRA made for this kind of model. Choose another file.")


def _in_four(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as that of a convolution."""
    return (*shape, 1, 1)[:4] if len(shape) < 4 else shape


@dataclass(frozen=True)
class _Declared:
    """What stands beside the matrices of a LoRA that has no alphas of its own.

    ``alpha_of`` is by patterns of the ends of layers' names, as peft has it; with ``by_root`` the product is scaled by
    alpha / sqrt(rank) (arXiv 2312.03732).
    """

    alpha: float | None = None
    alpha_of: Mapping[str, float] | None = None
    by_root: bool = False

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str], part: str) -> _Declared:
        """Of the file's own metadata (``part`` of them, "unet."), else of peft's configuration beside it."""
        beside = path.with_name(_CONFIG)
        if _METADATA in metadata:
            where = f"{path.name}: its `{_METADATA}` metadata"
            entry: dict[str, Any] = parse_json(metadata[_METADATA], where, FileError)
            entry = {key.removeprefix(part): value for key, value in entry.items()}
        elif path.stem == "adapter_model" and beside.is_file():
            where, entry = str(beside), read_json(beside, "peft's configuration of a LoRA")
        else:
            return cls()
        if entry.get("use_dora"):
            raise FileError(f"{where} declares DoRA; wanted a plain LoRA. Choose another file.")
        patterns = entry_of(entry, "alpha_pattern", dict, where, FileError, None) or {}
        alpha_of = {pattern: entry_of(patterns, pattern, float, where, FileError) for pattern in patterns}
        return cls(entry_of(entry, "lora_alpha", float, where, FileError, None), alpha_of, bool(entry.get("use_rslora")))

    def scale(self, stem: str, rank: int, alpha: float | None = None) -> float:
        """The factor of a layer's product."""
        if alpha is None:
            ends = (value for end, value in (self.alpha_of or {}).items() if stem == end or stem.endswith(f".{end}"))
            alpha = next(ends, rank if self.alpha is None else self.alpha)
        return alpha / (math.sqrt(rank) if self.by_root else rank)
