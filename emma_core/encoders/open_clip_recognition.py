"""Which picture tower of open_clip a file holds: named, declared by open_clip_config.json, or recognised by tensor shapes.

open_clip_torch (MIT) is used as a library; it is imported only when a model is wanted, because that takes seconds.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import EmmaWarning, EncoderFileError, short
from ..files.json_file import entry_of, read_json
from .pictures import Preparation
from .weights import Shapes

CONFIG_NAME = "open_clip_config.json"
_CUSTOM = "custom"
_FRAME_OF_RESIZE = {"shortest": ("center", "mean colour"), "longest": ("pad", "black"), "squash": ("stretch", "mean colour")}
_INTERPOLATIONS = ("bicubic", "bilinear")
# what only training uses, switched off: it changes no weight and no answer of a model in eval
_NOT_TRAINING = {"timm_model_pretrained": False, "timm_drop": 0.0, "timm_drop_path": None, "patch_dropout": 0.0,
                 "output_tokens": False}
_SMALLEST_TEXT = {"width": 64, "heads": 1, "layers": 1, "vocab_size": 1}
_PROJECTIONS = {"linear": "head.proj.weight", "mlp": "head.mlp.fc2.weight"}  # of timm's models
_MOST_LAYERS, _LARGEST_SIZE, _MOST_STAGES = 256, 1 << 15, 8
_TIMM_OUTPUTS = (*_PROJECTIONS.values(), "trunk.head.weight", "trunk.head.fc.weight", "trunk.norm.weight")


@dataclass(frozen=True)
class Tower:
    """A picture tower that open_clip can build, and how its pictures are prepared.

    Args:
        name: open_clip's name of the model, or "custom".
        embed_dim: of the projected feature.
        vision: all fields of open_clip's ``CLIPVisionCfg``.
        quick_gelu: the activation, where the configuration decides it.
        preparation: what the tower was trained to see.
        other_tags: weights published under this name that want their pictures prepared in another way.
    """

    name: str
    embed_dim: int
    vision: Mapping[str, Any]
    quick_gelu: bool
    preparation: Preparation
    other_tags: tuple[str, ...] = field(default=(), compare=False)

    @property
    def build(self) -> dict[str, Any]:
        """Everything that makes the tower."""
        return {"activation": "quick GELU" if self.quick_gelu else "GELU", "embed_dim": self.embed_dim, **self.vision}

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that decides its answer to a picture."""
        return {**self.build, **asdict(self.preparation)}


def named_tower(model_name: str) -> Tower:
    """The tower of one of open_clip's models; "ViT-B/32" is "ViT-B-32".

    Raises:
        EncoderFileError: open_clip is missing, or has no such model.
    """
    name, names = model_name.replace("/", "-"), _import_open_clip().list_models()
    if name not in names:
        near = difflib.get_close_matches(name, names, 3, 0.4) or ["ViT-B-32"]
        raise EncoderFileError(f"{model_name!r} is not a model of the installed open_clip; near it: {', '.join(near)}. Choose "
                               "one of its model names, or leave the name empty to have the model recognised.")
    return _known_tower(name)


def declared_tower(config_path: Path, model_name: str | None = None) -> Tower:
    """The tower that an open_clip_config.json declares.

    Its name is ``model_name``, else that of open_clip's first model with an equal tower, else "custom".

    Raises:
        EncoderFileError: open_clip is missing; the file is no such configuration, or declares another model than
            ``model_name``.
    """
    where = f"{config_path.parent.name}/{config_path.name}"
    advice = "Download it again from where the weights come from."
    config = read_json(config_path, "the configuration of an open_clip model", EncoderFileError, advice=advice)
    model = entry_of(config, "model_cfg", dict, where, EncoderFileError)
    vision = entry_of(model, "vision_cfg", dict, f"{where}: model_cfg", EncoderFileError)
    _check_sizes({**vision, "embed_dim": entry_of(model, "embed_dim", int, f"{where}: model_cfg", EncoderFileError)}, where)
    try:
        declared = _tower_of(_CUSTOM, model, entry_of(config, "preprocess_cfg", dict, where, EncoderFileError, {}), where)
    except EncoderFileError:
        raise
    except Exception as found:  # open_clip has no common error for values of other kinds
        raise EncoderFileError(f"{where} does not describe an open_clip model ({type(found).__name__}: {short(str(found))}). "
                               f"{advice}") from found
    known = [named_tower(model_name)] if model_name else _known_towers()
    equal = [tower for tower in known if tower.build == declared.build]
    if model_name and not equal:
        raise EncoderFileError(f"{where} declares another model than {model_name}. Leave the model name empty.")
    equal.sort(key=lambda tower: tower.preparation != declared.preparation)
    return replace(declared, name=equal[0].name) if equal else declared


def _check_sizes(sizes: Mapping[str, Any], where: str) -> None:
    """Refuse sizes that no tower has: building it would take for ever, before a tensor is compared."""
    for key, value in sizes.items():
        numbers = value if isinstance(value, list) else [value]
        most = _MOST_LAYERS if key == "layers" else _LARGEST_SIZE
        odd = [number for number in numbers if isinstance(number, int | float) and not 0 <= number <= most]
        if odd or len(numbers) > _MOST_STAGES:
            raise EncoderFileError(f"{where}: {short(key)} is {short(value)}; wanted numbers from 0 to {most}. Download it "
                                   "again from where the weights come from.")


def recognised_tower(shapes: Shapes, file_name: str) -> Tower:
    """The one tower among open_clip's models that has these tensors, or the first of several that answer alike.

    Args:
        shapes: of the tensors of the picture tower.
        file_name: for the messages.
    Raises:
        EncoderFileError: open_clip is missing; no model fits, or several that treat a picture differently.
    """
    tried: list[tuple[dict[str, Any], bool]] = []
    found: list[Tower] = []
    for tower in _known_towers():
        if not _may_fit(tower, shapes):
            continue
        # timm is not told the picture's size
        build = {**tower.build, "image_size": None} if tower.vision["timm_model_name"] else tower.build
        fits = next((known for other, known in tried if other == build), None)
        if fits is None:
            fits = shapes_of(built_on_meta(tower)) == dict(shapes)
            tried.append((build, fits))
        if fits and all(tower.facts != other.facts for other in found):
            found.append(tower)
    if not found:
        raise EncoderFileError(f"{file_name}: no model of the installed open_clip has a picture tower with its {len(shapes)} "
                               f"tensors. Put it and its {CONFIG_NAME} into a folder of their own and choose the folder, or "
                               "update open_clip: pip install -U open_clip_torch timm")
    if len(found) > 1:
        raise EncoderFileError(f"{file_name} fits models that treat a picture differently: {_differences(found)}. The weights "
                               "do not tell which of them was trained: choose the model name.")
    return found[0]


def check_fits_model(found: Shapes, wanted: Shapes, model_name: str, file_name: str) -> None:
    """Raise EncoderFileError naming the first tensor in which a file and a model differ."""
    for key in [*wanted, *found]:
        if found.get(key) != wanted.get(key):
            raise EncoderFileError(f"{file_name} does not fit the model {model_name}: {key} is {found.get(key, 'missing')}, "
                                   f"wanted {wanted.get(key, 'no such tensor')}. Choose the model that the weights were made "
                                   "for.")


def built_on_meta(tower: Tower) -> nn.Module:
    """The picture tower without values. Nothing is downloaded, and no random numbers are drawn.

    Raises:
        EncoderFileError: open_clip is missing, or cannot build it.
    """
    open_clip = _import_open_clip()
    timm_name = tower.vision["timm_model_name"]
    try:
        if timm_name:
            import timm
            # timm would download what "hf-hub:..." names
            if not timm.is_model(timm_name):
                raise ValueError(f"timm has no model {timm_name!r}")
        with torch.device("meta"):
            whole = open_clip.CLIP(tower.embed_dim, open_clip.CLIPVisionCfg(**tower.vision),
                                   open_clip.CLIPTextCfg(**_SMALLEST_TEXT), tower.quick_gelu)
    except Exception as found:  # open_clip, timm and torch have no common error for sizes that do not go together
        reason = short(str(found), 300)
        raise EncoderFileError(f"the installed open_clip cannot build the picture tower of {tower.name} ({reason}). Update it "
                               "(pip install -U open_clip_torch timm), or correct the configuration.") from found
    return whole.visual


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def warn_of_other_tags(tower: Tower) -> None:
    """EmmaWarning if weights published under this name want their pictures prepared in another way."""
    if tower.other_tags:
        way = tower.preparation
        warnings.warn(f"pictures for {tower.name} are prepared as open_clip does by default (frame {way.frame}, mean of red "
                      f"{way.mean[0]:.3g}); its weights {', '.join(tower.other_tags)} want another frame or mean. For those, "
                      f"keep their {CONFIG_NAME} beside the file, in a folder of their own, and choose the folder.",
                      EmmaWarning, stacklevel=3)


def _import_open_clip():
    try:
        import open_clip
        import timm  # noqa: F401 (without it open_clip is imported, and fails later)
    except ImportError as found:
        raise EncoderFileError(f"open_clip models need the package open_clip_torch, which cannot be imported ({found}). "
                               "Install it into the Python that runs this: pip install open_clip_torch") from found
    return open_clip


def _known_towers() -> list[Tower]:
    """Of all models, the plain names before those of a special text tower."""
    return [_known_tower(name) for name in sorted(_import_open_clip().list_models())]


def _known_tower(name: str) -> Tower:
    """One of open_clip's models, prepared as its published weights are, or as open_clip does by default if they differ."""
    open_clip = _import_open_clip()
    config = open_clip.get_model_config(name)
    published = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
    quick = bool(config.get("quick_gelu"))
    own = {tag: weights for tag, weights in published.items() if bool(weights.get("quick_gelu")) == quick} or published
    ways = {tag: _preparation(weights, config["vision_cfg"], name) for tag, weights in own.items()}
    default = _preparation({}, config["vision_cfg"], name)
    chosen = default if default in ways.values() else next(iter(ways.values()), default)
    tower = _tower_of(name, config, {}, name)
    return replace(tower, preparation=chosen, other_tags=tuple(tag for tag, way in ways.items() if way != chosen))


def _tower_of(name: str, config: Mapping[str, Any], preprocess: Mapping[str, Any], where: str) -> Tower:
    vision = asdict(_import_open_clip().CLIPVisionCfg(**{**config["vision_cfg"], **_NOT_TRAINING}))
    # timm's models and ResNets have an activation of their own
    quick_gelu = not vision["timm_model_name"] and isinstance(vision["layers"], int) and bool(config.get("quick_gelu"))
    preparation = _preparation(preprocess, vision, where)
    return Tower(name, config["embed_dim"], vision | {"image_size": preparation.size_px}, quick_gelu, preparation)


def _preparation(preprocess: Mapping[str, Any], vision: Mapping[str, Any], where: str) -> Preparation:
    """From open_clip's fields; what they leave out is as for OpenAI's CLIP."""
    open_clip = _import_open_clip()
    given = {key: value for key, value in preprocess.items() if value is not None}
    size = vision.get("image_size", 224)
    sides = {size} if isinstance(size, int) else set(size)
    mean, std = tuple(given.get("mean", open_clip.OPENAI_DATASET_MEAN)), tuple(given.get("std", open_clip.OPENAI_DATASET_STD))
    numbers = len(mean) == len(std) == 3 and all(math.isfinite(number) for number in mean + std) and min(std) > 0
    interpolation, resize = given.get("interpolation", "bicubic"), given.get("resize_mode", "shortest")
    if len(sides) > 1 or not numbers or interpolation not in _INTERPOLATIONS or resize not in _FRAME_OF_RESIZE:
        raise EncoderFileError(f"{where}: pictures of {size} pixels, mean {mean}, std {std}, {interpolation!r}, {resize!r}; "
                               f"wanted a square, 3 numbers each, {' or '.join(_INTERPOLATIONS)}, and one of "
                               f"{', '.join(_FRAME_OF_RESIZE)}. Correct the configuration, or choose another model.")
    return Preparation(sides.pop(), mean, std, interpolation, *_FRAME_OF_RESIZE[resize])


def _may_fit(tower: Tower, shapes: Shapes) -> bool:
    """Whether a tower is worth building, by what its configuration tells at once."""
    vision, size_px = tower.vision, tower.preparation.size_px
    if vision["timm_model_name"]:
        return _may_fit_timm(tower, shapes)
    if not isinstance(vision["layers"], int):
        return shapes.get("conv1.weight") == (vision["width"] // 2, 3, 3, 3)
    patch_px, positions = vision["patch_size"], _sides(shapes, "positional_embedding")
    return (shapes.get("conv1.weight") == (vision["width"], 3, patch_px, patch_px)
            and _sides(shapes, "proj")[-1] == tower.embed_dim and positions[0] == (size_px // patch_px) ** 2 + 1)


def _may_fit_timm(tower: Tower, shapes: Shapes) -> bool:
    import timm

    first = getattr(timm.get_pretrained_cfg(tower.vision["timm_model_name"]), "first_conv", None) or ()
    stem = (first,) if isinstance(first, str) else first
    out = next((_sides(shapes, key)[0] for key in _TIMM_OUTPUTS if key in shapes), tower.embed_dim)
    ending = next((name for name, key in _PROJECTIONS.items() if key in shapes), None)
    projection = tower.vision["timm_proj"] if tower.vision["timm_proj"] in _PROJECTIONS else None
    is_pooled = any(key.startswith("trunk.attn_pool.") for key in shapes)
    kernel, positions = shapes.get("trunk.patch_embed.proj.weight"), shapes.get("trunk.pos_embed")
    # a kernel that does not read colours lies behind a convolutional stem and is no patch
    is_grid = kernel is not None and positions is not None and len(kernel) == 4 and kernel[1] == 3 and len(positions) > 1
    grid_fits = not is_grid or positions[1] - (tower.preparation.size_px // kernel[-1]) ** 2 in (0, 1)
    ends_fit = out == tower.embed_dim and ending == projection and is_pooled == (tower.vision["timm_pool"] == "map")
    return (ends_fit and grid_fits and any(key.startswith("trunk.") for key in shapes)
            and all(f"trunk.{name}.weight" in shapes for name in stem))


def _sides(shapes: Shapes, key: str) -> tuple[int, ...]:
    """A tensor's shape; (0,) of one that is not there, or has no sides."""
    return shapes.get(key) or (0,)


def _differences(towers: list[Tower]) -> str:
    keys = [key for key in towers[0].facts if any(tower.facts[key] != towers[0].facts[key] for tower in towers)]
    return ", ".join(f"{tower.name} ({', '.join(f'{key} {tower.facts[key]}' for key in keys)})" for tower in towers)
