"""Reference encoders under the host's memory management.

Shapes: B pictures of height H and width W; features are (B, vectors, dim).
"""

import comfy.clip_vision
import comfy.model_management
import comfy.ops
import comfy.utils
import torch

from ..emma_core.encoders.playground import FAMILY as PLAYGROUND
from ..emma_core.encoders.playground import load_playground_encoder
from ..emma_core.errors import EncoderFileError, ReferenceMismatchError
from ..emma_core.module_config import ModuleConfig
from ..emma_core.playground import PLAYGROUND_DIR
from ..emma_core.reference_features import ReferenceFeatures, check_encoder, combine_features
from ..emma_core.tensor_file import open_tensors
from .images import WHITE, object_masks, rgb_pictures
from .loaded import LoadedEncoder, LoadedModule, patcher_for

PICTURES_AT_ONCE = 16
# (hidden width, projected width) of CLIP vision towers -> the family name that modules declare
CLIP_FAMILIES = {(1280, 1024): "clip-vit-h-14", (1024, 768): "clip-vit-l-14", (1664, 1280): "clip-vit-g-14"}


class PlaygroundReferenceEncoder:
    """The playground's small encoder."""

    def __init__(self, encoder, patcher):
        self._encoder = encoder
        self._patcher = patcher
        self.description = {"family": PLAYGROUND, "fingerprint": encoder.fingerprint, "input_size": encoder.input_size_px}

    def encode(self, image_BHW3, mask_BHW) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Features by name, and what the encoder saw (B, S, S, 3)."""
        comfy.model_management.load_models_gpu([self._patcher])
        device = self._patcher.load_device
        features, seen_BSS3 = self._encoder.encode(
            image_BHW3.to(device), None if mask_BHW is None else mask_BHW.to(device)
        )
        return features, seen_BSS3


class ClipVisionReferenceEncoder:
    """The host's CLIP_VISION: `global` is the projected embedding, `local` the hidden states of the declared layer.

    Raises:
        EncoderFileError: a model of another kind.
    """

    def __init__(self, clip_vision):
        self._clip_vision = clip_vision
        tower = getattr(clip_vision.model, "vision_model", None)
        class_token = getattr(getattr(tower, "embeddings", None), "class_embedding", None)
        if class_token is None:
            raise EncoderFileError("this CLIP_VISION is no CLIP model (SigLIP and DINOv2 are others). Load the image encoder "
                                   "named by the EMMA module (CLIP ViT-H/14 for the released conditions).")
        hidden = class_token.shape[-1]
        projection = getattr(clip_vision.model.visual_projection, "weight", None)
        projected = hidden if projection is None else projection.shape[0]
        family = CLIP_FAMILIES.get((hidden, projected), f"clip-{hidden}-{projected}")
        self.description = {"family": family, "input_size": clip_vision.image_size}

    def encode(self, image_BHW3, mask_BHW):
        """As `PlaygroundReferenceEncoder.encode`; the background becomes white, the picture is cropped to a square."""
        if mask_BHW is not None:
            keep = mask_BHW[..., None].to(image_BHW3)
            image_BHW3 = image_BHW3 * keep + WHITE * (1 - keep)
        output = self._clip_vision.encode_image(image_BHW3, crop=True)
        features = {
            "global": output["image_embeds"][:, None],
            "local": output["last_hidden_state"],
            "local_penultimate": output["penultimate_hidden_states"],
        }
        size = self._clip_vision.image_size
        seen_B3SS = comfy.utils.common_upscale(image_BHW3.movedim(-1, 1), size, size, "bicubic", "center")
        return features, seen_B3SS.movedim(1, -1).clamp(0, 1)


def load_playground_reference_encoder(path=None) -> LoadedEncoder:
    """The shipped encoder, or another file of its kind."""
    encoder = load_playground_encoder(path or PLAYGROUND_DIR / "encoder.safetensors", operations=comfy.ops.manual_cast)
    patcher = patcher_for(encoder)
    return LoadedEncoder(PlaygroundReferenceEncoder(encoder, patcher), patcher)


def load_reference_encoder(path: str) -> LoadedEncoder:
    """A reference encoder file, recognised by its tensors.

    Raises:
        EncoderFileError: a damaged file, or one that the host cannot read as a CLIP vision model.
    """
    with open_tensors(path, "a reference encoder", EncoderFileError):  # refuses damaged files
        clip_vision = comfy.clip_vision.load(path)
    if clip_vision is None:
        raise EncoderFileError(f"{path} is not a CLIP vision model that this ComfyUI reads. Choose the image encoder named "
                               "by the EMMA module (CLIP ViT-H/14 for the released conditions).")
    return LoadedEncoder(ClipVisionReferenceEncoder(clip_vision), clip_vision.patcher)


def as_encoder(encoder) -> PlaygroundReferenceEncoder | ClipVisionReferenceEncoder:
    """EMMA_ENCODER or the host's CLIP_VISION."""
    if isinstance(encoder, LoadedEncoder):
        return encoder.encoder
    return ClipVisionReferenceEncoder(encoder)


def encode_reference(
    module: LoadedModule, encoder, image: torch.Tensor, mask: torch.Tensor | None, combine: str
) -> tuple[ReferenceFeatures, torch.Tensor]:
    """Features that the module needs, of one or several pictures, and what the encoder saw.

    Raises:
        ReferenceMismatchError: the encoder is not the one the module needs.
        ImageInputError: unusable picture or mask.
    """
    image_BHW3 = rgb_pictures(image)
    mask_BHW = object_masks(mask, image_BHW3)
    config = module.module.config
    encoder = as_encoder(encoder)
    check_encoder(encoder.description, config)
    parts, seen = [], []
    progress = comfy.utils.ProgressBar(image_BHW3.shape[0])
    for start in range(0, image_BHW3.shape[0], PICTURES_AT_ONCE):
        comfy.model_management.throw_exception_if_processing_interrupted()
        chunk = slice(start, start + PICTURES_AT_ONCE)
        features, seen_BSS3 = encoder.encode(image_BHW3[chunk], None if mask_BHW is None else mask_BHW[chunk])
        parts.append({name: tensor.float().cpu() for name, tensor in _selected(features, config).items()})
        seen.append(seen_BSS3.float().cpu())
        progress.update(seen_BSS3.shape[0])
    features = {name: torch.cat([part[name] for part in parts]) for name in config.features}
    return combine_features(features, combine, encoder.description), torch.cat(seen)


def _selected(features: dict[str, torch.Tensor], config: ModuleConfig) -> dict[str, torch.Tensor]:
    available = dict(features)
    if config.encoder.get("layer") == "penultimate" and "local_penultimate" in available:
        available["local"] = available["local_penultimate"]
    missing = [name for name in config.features if name not in available]
    if missing:
        raise ReferenceMismatchError(f"the {config.condition} module needs the features {', '.join(missing)}; this encoder "
                                     f"gives {', '.join(sorted(available))}. Load the encoder named in the module: "
                                     f"{config.encoder.get('family', 'not stated')}.")
    return {name: available[name] for name in config.features}
