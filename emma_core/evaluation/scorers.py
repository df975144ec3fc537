"""The models that judge pictures: a CLIP of open_clip and a DINO ViT of timm, from local files; nothing is ever downloaded.

Shapes: B pictures or prompts, D width of an embedding, S input size of a model.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ..encoders.open_clip_recognition import CONFIG_NAME, Tower, declared_tower, named_tower, warn_of_other_tags
from ..encoders.options import Framing
from ..encoders.pictures import Preparation, prepare_pictures
from ..errors import EncoderFileError, EvaluationError, ScoringFileError
from ..files.plain_file import is_file
from ..files.tensor_file import check_finite, check_shapes, integers_in, read_weights, sha256_of_file
from .config import ScoresConfig

CLIP_T, CLIP_I, DINO = "CLIP-T", "CLIP-I", "DINO"
_PUBLISHED = "open_clip_"  # how the names of files begin that are published beside an open_clip_config.json
_MOST_LISTED = 4
_NEEDS_DOWNLOADS = ("hf_model_name", "hf_tokenizer_name")  # of text towers: open_clip would get these from Hugging Face


class Scorer(Protocol):
    """A model that judges pictures by cosines.

    ``reference_column`` is what the likeness to the reference is called, ``prompt_column`` that to the prompt, "" where the
    model reads no text.
    """

    reference_column: str
    prompt_column: str

    def to(self, device: torch.device) -> None:
        """Move the model."""
        ...

    def embed_pictures(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """(B, D) of length 1, on the CPU."""
        ...

    def embed_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """(B, D) of length 1, on the CPU."""
        ...


class ClipScorer:
    """Both towers of a CLIP, in float32; pictures are prepared as its published weights want them."""

    reference_column, prompt_column = CLIP_I, CLIP_T

    def __init__(self, model: nn.Module, tokenize: Any, preparation: Preparation):
        self._model = model.eval().requires_grad_(False)
        self._tokenize, self._preparation = tokenize, preparation
        self._device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        self._model.to(device)
        self._device = device

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        seen = [prepare_pictures(_tensor(picture), None, self._preparation, Framing()) for picture in pictures]
        pixels_B3SS = self._preparation.normalise(torch.cat(seen).to(self._device))
        return F.normalize(self._model.encode_image(pixels_B3SS), dim=-1).cpu()

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        return F.normalize(self._model.encode_text(self._tokenize(list(prompts)).to(self._device)), dim=-1).cpu()


class DinoScorer:
    """The class token of a ViT after its last norm, in float32; pictures are prepared as timm's configuration of it says."""

    reference_column, prompt_column = DINO, ""

    def __init__(self, model: nn.Module):
        from timm.data import create_transform, resolve_model_data_config

        self._model: Any = model.eval().requires_grad_(False)
        self._prepare: Any = create_transform(**resolve_model_data_config(model), is_training=False)
        self._device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        self._model.to(device)
        self._device = device

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        pixels_B3SS = torch.stack([self._prepare(picture) for picture in pictures]).to(self._device)
        return F.normalize(self._model.forward_features(pixels_B3SS)[:, 0], dim=-1).cpu()

    def embed_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        raise TypeError("a DINO model reads no text")


def scorer_names(config: ScoresConfig) -> list[tuple[str, str, str]]:
    """Kind ("clip", "dino"), model name and SHA-256 of the models that judge, without loading them.

    Raises:
        EvaluationError: a file that is missing (it says where to get it), a name that is not known, a text tower that would be
            downloaded, packages that are missing.
    """
    named = []
    if config.clip_model:
        tower = _clip_tower(config)
        _check_file("clip", config.clip_file, tower.name, _clip_sources(tower.name))
        named.append(("clip", tower.name, sha256_of_file(config.clip_file)))
    if config.dino_model:
        source = _dino_source(config.dino_model)
        _check_file("dino", config.dino_file, config.dino_model, source)
        named.append(("dino", config.dino_model, sha256_of_file(config.dino_file)))
    return named


def load_scorer(kind: str, config: ScoresConfig) -> Scorer:
    """One of `scorer_names`, on the CPU.

    Raises:
        EvaluationError: a model without a class token.
        ScoringFileError: a file that does not hold the named model.
    """
    return {"clip": _load_clip, "dino": _load_dino}[kind](config)


def _load_clip(config: ScoresConfig) -> ClipScorer:
    import open_clip

    tower = _clip_tower(config)
    warn_of_other_tags(tower)
    # its `pretrained_...` flags are off, and names that need downloads were refused
    with _quiet():
        model = open_clip.create_model(tower.name, pretrained=None, pretrained_image=False, pretrained_text=False)
    _load_strictly(model, config.clip_file, f"both towers of open_clip's {tower.name}", _clip_sources(tower.name))
    return ClipScorer(model, open_clip.get_tokenizer(tower.name), tower.preparation)


def _load_dino(config: ScoresConfig) -> DinoScorer:
    import timm

    name = config.dino_model
    model = timm.create_model(name, pretrained=False, num_classes=0)
    if getattr(model, "cls_token", None) is None:
        raise EvaluationError(f"scores.dino_model = {name!r} has no class token; wanted a ViT of DINO, such as "
                              "vit_small_patch16_224.dino. Choose another model.")
    _load_strictly(model, config.dino_file, f"timm's {name}", _dino_source(name))
    return DinoScorer(model)


def _load_strictly(model: nn.Module, path: str, what: str, source: str) -> None:
    tensors = {key.removeprefix("module."): value for key, value in read_weights(path, what, ScoringFileError).items()}
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in {"logit_scale", "logit_bias"} & set(tensors) & set(wanted):  # scalars: () or (1,)
        tensors[key] = tensors[key].reshape(wanted[key])
    try:
        check_shapes(tensors, wanted, Path(path).name, what, ScoringFileError)
    except ScoringFileError as found:
        raise ScoringFileError(f"{found} {source}") from None
    check_finite(tensors, Path(path).name, ScoringFileError, integers_in(model.state_dict()))
    model.load_state_dict(tensors)


def _clip_tower(config: ScoresConfig) -> Tower:
    """The named model; its pictures are prepared as the configuration published beside the file says, if there is one."""
    name, file = config.clip_model, Path(config.clip_file)
    declared = file.with_name(CONFIG_NAME)
    try:
        tower = named_tower(name)
        if file.name.startswith(_PUBLISHED) and declared.is_file():
            tower = declared_tower(declared, tower.name)
    except EncoderFileError as found:
        raise EvaluationError(f"scores.clip_model: {found}") from found
    import open_clip

    needed = [key for key in _NEEDS_DOWNLOADS if (open_clip.get_model_config(tower.name) or {})["text_cfg"].get(key)]
    if needed:
        raise EvaluationError(f"scores.clip_model = {name!r} has a text tower or a tokenizer that open_clip would download "
                              "from Hugging Face. Choose a model with its own, such as ViT-L-14-quickgelu or ViT-H-14.")
    return tower


def _clip_sources(name: str) -> str:
    """Where open_clip itself says that weights of this model are."""
    import open_clip

    hubs = [open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "") for tag in open_clip.list_pretrained_tags_by_model(name)]
    listed = list(dict.fromkeys(hub.strip("/") for hub in hubs if hub.endswith("/")))[:_MOST_LISTED]
    where = f" from Hugging Face ({' or '.join(listed)})" if listed else ""
    return (f"Get open_clip_model.safetensors or open_clip_pytorch_model.bin{where}, put it anywhere and name it in "
            "scores.clip_file.")


def _dino_source(name: str) -> str:
    """Where timm itself says that weights of this model are.

    Raises:
        EvaluationError: timm is missing, or does not know the name.
    """
    try:
        import timm
    except ImportError as found:
        raise EvaluationError(f"DINO needs the package timm, which cannot be imported ({found}). Install it: pip install timm"
                              ) from found
    try:
        if not timm.is_model(name):  # "hf-hub:...", which timm would download, is none either
            raise RuntimeError("no such model")
        if "." not in name:
            raise RuntimeError("the tag is missing, which tells how pictures are prepared")
        published = timm.get_pretrained_cfg(name)
    except RuntimeError as found:
        near = difflib.get_close_matches(name, timm.list_pretrained("*dino*"), 3, 0.3) or ["vit_small_patch16_224.dino"]
        raise EvaluationError(f"scores.dino_model = {name!r} is not a model of the installed timm ({found}); near it: "
                              f"{', '.join(near)}. Choose one of its names.") from found
    hub = getattr(published, "hf_hub_id", None)
    where = f" from Hugging Face ({hub})" if hub else ""
    return f"Get model.safetensors{where}, put it anywhere and name it in scores.dino_file."


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning that a model has no weights, as they come next."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _check_file(what: str, file: str, model: str, source: str) -> None:
    if not is_file(Path(file)):
        raise EvaluationError(f"scores.{what}_file = {file!r} does not exist; wanted the weights of {model}, and nothing is "
                              f"downloaded. {source}")


def _tensor(picture: Image.Image) -> torch.Tensor:
    """(1, H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255)[None]
