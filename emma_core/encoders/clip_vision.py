"""CLIP ViT vision towers from the files users have: Hugging Face and open_clip key names, vision alone or whole CLIP.

Shapes: B pictures, S the input size, V = 1 + patches, C the hidden width, D the projected width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import EncoderFileError
from ..files.tensor_file import check_finite, check_shapes, fingerprint_of_weights, open_weights
from .base import PictureEncoder, ReferenceEncoder
from .families import CLIP_TOWERS, MEAN, STD, ClipTower
from .options import EncodeOptions
from .pictures import Preparation
from .weights import Shapes, shapes_in, some, weights_path

_WHAT = "a CLIP vision encoder"
_HF_PREFIXES = ("vision_model.", "visual_projection.")
_OPEN_CLIP_PREFIX = "visual."
_POSITION_IDS = "vision_model.embeddings.position_ids"
_BYTES_PER_VECTOR = 4 * 16  # float32, and about 16 numbers of the hidden width for each token in a layer
_LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")
_OPEN_CLIP_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_OPEN_CLIP_NAMES = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    # "layrnorm" is how the published files spell it
    "ln_pre.weight": "vision_model.pre_layrnorm.weight", "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight", "ln_post.bias": "vision_model.post_layernorm.bias",
}
_OPEN_CLIP_LAYERS = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class ClipVisionEncoder(PictureEncoder):
    """`global` (B, 1, D): the projected embedding; `local` (B, V, C): the hidden states of the last or penultimate layer.

    Both as transformers' CLIPVisionModelWithProjection gives them; hidden states before the final norm.
    """

    feature_names = ("global", "local")

    def __init__(self, model: torch.nn.Module, family: str, fingerprint: str):
        tower = CLIP_TOWERS[family]
        self.model = model
        self.description = {"family": family, "fingerprint": fingerprint, "input_size": tower.input_px}
        self.preparation = clip_preparation(tower)
        self.bytes_per_picture = bytes_per_picture(tower)

    def features_of(self, seen_B3SS: torch.Tensor, options: EncodeOptions) -> dict[str, torch.Tensor]:
        weight = self.model.visual_projection.weight
        pixels_B3SS = self.preparation.normalise(seen_B3SS).to(weight)
        output = self.model(pixel_values=pixels_B3SS, output_hidden_states=True)
        local_BVC = output.hidden_states[-2 if options.layer == "penultimate" else -1]
        return {"global": output.image_embeds[:, None], "local": local_BVC}


def clip_preparation(tower: ClipTower) -> Preparation:
    """How open_clip prepares pictures for a tower of CLIP: short side to S, bicubic, center crop."""
    return Preparation(tower.input_px, MEAN, STD)


def bytes_per_picture(tower: ClipTower) -> int:
    """Working memory of one more picture, about."""
    return tower.vectors * tower.hidden * _BYTES_PER_VECTOR


def load_clip_vision(path: str | Path, dtype: torch.dtype | None = None, device=None) -> ClipVisionEncoder:
    """A CLIP vision tower in transformers' implementation, loaded strictly.

    Args:
        path: .safetensors, or a PyTorch file that is opened as weights alone.
        dtype: of the weights, float32 by default.
        device: the CPU by default.
    Raises:
        EncoderFileError: see `read_clip_vision`.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tensors, family = read_clip_vision(path)
    tower = CLIP_TOWERS[family]
    config = CLIPVisionConfig(
        hidden_size=tower.hidden, intermediate_size=tower.mlp, projection_dim=tower.projected, num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads, image_size=tower.input_px, patch_size=tower.patch_px, hidden_act=tower.hidden_act,
    )
    fingerprint = fingerprint_of_weights(tensors)
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
    # copies, as tensors of a PyTorch file lie in the file itself
    placed = {name: tensor.to(device or "cpu", dtype or torch.float32, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(placed, strict=True, assign=True)
    embeddings = model.vision_model.embeddings
    embeddings.position_ids = torch.arange(tower.vectors, device=device or "cpu")[None]  # no weight, so not in the file
    return ClipVisionEncoder(model.eval().requires_grad_(False), family, fingerprint)


def read_clip_vision(path: str | Path) -> tuple[dict[str, torch.Tensor], str]:
    """The vision tower's weights under transformers' names, and the family that their shapes tell.

    Raises:
        EncoderFileError: not such a file; a tower of another size; missing, extra, misshapen or non-finite weights.
    """
    name = Path(path).name
    tensors = clip_vision_tensors(path)
    family = recognise_clip(tensors)
    if family is None:
        raise EncoderFileError(f"{name} is not {_WHAT} that is known by its size: {_sizes(tensors)}. Wanted one of "
                               f"{'; '.join(tower.describe() for tower in CLIP_TOWERS.values())}. Choose another file.")
    check_shapes(tensors, clip_shapes(CLIP_TOWERS[family]), name, CLIP_TOWERS[family].title, EncoderFileError)
    check_finite(tensors, name, EncoderFileError)
    return tensors, family


def recognise_clip(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The family in `CLIP_TOWERS` by width, depth, patch, number of positions and projection; None: none of them."""
    sizes = _sizes_of(tensors)
    for family, tower in CLIP_TOWERS.items():
        if sizes == (tower.hidden, tower.layers, tower.patch_px, tower.vectors, tower.projected):
            return family
    return None


def clip_vision_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The vision tensors of a CLIP file under transformers' names; nothing else is read.

    Raises:
        EncoderFileError: a damaged file.
    """
    with open_weights(path, _WHAT, EncoderFileError) as file:
        return canonical_names(file.tensors(filter(_is_vision, file.stored)))


def canonical_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Vision tensors in transformers' or open_clip's layout, under transformers' names; the rest is left out."""
    found: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        key = key.removeprefix("module.")
        if key.startswith(_HF_PREFIXES) and key != _POSITION_IDS:
            found[key] = tensor
        elif key.startswith(_OPEN_CLIP_PREFIX):
            found |= _from_open_clip(key.removeprefix(_OPEN_CLIP_PREFIX), tensor)
    return found


def clip_shapes(tower: ClipTower) -> dict[str, tuple[int, ...]]:
    """Shapes of the tower's weights under transformers' names."""
    hidden, mlp = tower.hidden, tower.mlp
    shapes: dict[str, tuple[int, ...]] = {
        "visual_projection.weight": (tower.projected, hidden),
        "vision_model.embeddings.class_embedding": (hidden,),
        "vision_model.embeddings.patch_embedding.weight": (hidden, 3, tower.patch_px, tower.patch_px),
        "vision_model.embeddings.position_embedding.weight": (tower.vectors, hidden),
    }
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    for layer in range(tower.layers):
        prefix = f"vision_model.encoder.layers.{layer}"
        norms += [f"{prefix}.layer_norm1", f"{prefix}.layer_norm2"]
        linears = {f"self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")}
        for name, shape in (linears | {"mlp.fc1": (mlp, hidden), "mlp.fc2": (hidden, mlp)}).items():
            shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
    return shapes | {f"{norm}.{kind}": (hidden,) for norm in norms for kind in ("weight", "bias")}


def _from_open_clip(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if key in _OPEN_CLIP_NAMES:
        return {_OPEN_CLIP_NAMES[key]: tensor}
    if key == "proj" and tensor.ndim == 2:
        return {"visual_projection.weight": tensor.t().contiguous()}
    block = _OPEN_CLIP_BLOCK.fullmatch(key)
    if block is None:
        return {f"visual.{key}": tensor}  # another kind of tower: named as it is, so that a message can show it
    prefix, rest = f"vision_model.encoder.layers.{block[1]}", block[2]
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias") and tensor.ndim and tensor.shape[0] % 3 == 0:
        kind = rest.rpartition("_")[2]
        return {f"{prefix}.self_attn.{part}_proj.{kind}": piece.contiguous()
                for part, piece in zip("qkv", tensor.chunk(3), strict=True)}
    layer, _, kind = rest.rpartition(".")
    return {f"{prefix}.{_OPEN_CLIP_LAYERS.get(layer, layer)}.{kind}": tensor}


def _is_vision(key: str) -> bool:
    return key.removeprefix("module.").startswith((*_HF_PREFIXES, _OPEN_CLIP_PREFIX))


def _sizes_of(tensors: Mapping[str, torch.Tensor]) -> tuple[int, int, int, int, int]:
    """Hidden, layers, patch, vectors, projected; 0 where the tensor is not there."""
    layers = {match[1] for key in tensors if (match := _LAYER.match(key))}

    def sides(key: str) -> tuple[int, ...]:
        return tuple(tensors[key].shape) or (0,) if key in tensors else (0,)

    patches = sides("vision_model.embeddings.patch_embedding.weight")
    positions, projected = sides("vision_model.embeddings.position_embedding.weight"), sides("visual_projection.weight")
    return patches[0], len(layers), patches[-1], positions[0], projected[0]


def _sizes(tensors: Mapping[str, torch.Tensor]) -> str:
    hidden, layers, patch, vectors, projected = _sizes_of(tensors)
    if not hidden:
        return "it holds no CLIP vision transformer"
    return f"hidden {hidden}, {layers} layers, patches of {patch} px, {vectors} vectors, projected {projected}"


def recognises(shapes: Shapes) -> bool:
    """See `EncoderKind`."""
    return clip_family(shapes) is not None


def clip_family(shapes: Shapes) -> str | None:
    """As `recognise_clip`, by shapes under the file's own names."""
    return recognise_clip(canonical_names({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}))


def clip_tower_of(path: Path) -> ClipTower:
    """The sizes of a CLIP vision file; no numbers are read.

    Raises:
        EncoderFileError: damaged, or none of `CLIP_TOWERS`.
    """
    shapes = shapes_in(path)
    family = clip_family(shapes)
    if family is None:
        raise EncoderFileError(f"{path.name} is no CLIP vision encoder ({some(shapes)}); wanted "
                               f"{'; '.join(tower.describe() for tower in CLIP_TOWERS.values())}. Choose another file.")
    return CLIP_TOWERS[family]


def load(path: Path, open_clip_model: str | None) -> ReferenceEncoder:
    """See `EncoderKind`."""
    return load_clip_vision(weights_path(path))
