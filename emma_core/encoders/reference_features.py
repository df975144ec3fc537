"""What an encoder makes of reference pictures: features, the encoder they come from, and how several are combined.

Shapes: R references (pictures), V vectors of one picture, D dim of a feature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import ReferenceMismatchError
from ..model.module_config import ModuleConfig
from .families import encoder_title
from .options import AS_TRAINED, EncodeOptions, FaceChoice, Framing

COMBINATIONS = ("concat", "average", "normalised average", "per frame")


_AGAIN = " and encode the picture again"
_DEFAULTS = {"layer": "last"}  # what an encoder means that does not say


@dataclass(frozen=True, eq=False)
class ReferenceFeatures:
    """Features ready for a module.

    Args:
        features: feature name -> (R, vectors, dim); R is 1 unless ``per_frame``.
        encoder: where they come from ({family, fingerprint, input_size, layer, masked}), as in a module's metadata.
        per_frame: one reference for each frame (row) of the batch, instead of one for all.
    Raises:
        ReferenceMismatchError: no features; several references that are neither combined nor per frame.
    """

    features: Mapping[str, torch.Tensor]
    encoder: Mapping[str, Any] = field(default_factory=dict)
    per_frame: bool = False

    def __post_init__(self):
        rows = {name: tensor.shape[0] for name, tensor in _checked(self.features).items()}
        if not self.per_frame and set(rows.values()) != {1}:
            raise ReferenceMismatchError(
                f"features of {max(rows.values())} references that are not one per frame; wanted 1. Combine them "
                f"({', '.join(COMBINATIONS[:3])}), or mark them as one per frame."
            )

    @property
    def rows(self) -> int:
        """R: 1, or the number of frames."""
        return max(tensor.shape[0] for tensor in self.features.values())


def combine_features(
    features: Mapping[str, torch.Tensor], how: str, encoder: Mapping[str, Any] | None = None
) -> ReferenceFeatures:
    """Features of several pictures (R, V, D) as those of one reference, or of one reference per frame.

    Args:
        features: of R pictures that were encoded together.
        how: "concat": all vectors side by side (1, R*V, D), the module sees every picture;
            "average": (1, V, D), one picture between them;
            "normalised average": the same for directions, so that no picture counts more for the length of its
            vectors; the result has their mean length (identity features such as AdaFace's);
            "per frame": unchanged, picture r serves frame r.
        encoder: kept in the result.
    Raises:
        ReferenceMismatchError: no pictures, features of unequal numbers of pictures, an unknown ``how``.
    """
    if how not in _COMBINE:
        raise ReferenceMismatchError(f"references cannot be combined by {how!r}; choose one of "
                                     f"{', '.join(COMBINATIONS)}.")
    counts = {name: tensor.shape[0] for name, tensor in _checked(features).items()}
    if len(set(counts.values())) > 1:
        raise ReferenceMismatchError(f"features of unequal numbers of pictures ({counts}). Encode them together.")
    combined = {name: _COMBINE[how](tensor) for name, tensor in features.items()}
    return ReferenceFeatures(combined, dict(encoder or {}), per_frame=how == "per frame")


def blend_references(
    reference_a: ReferenceFeatures, reference_b: ReferenceFeatures, weights: Sequence[float]
) -> ReferenceFeatures:
    """Between two references: (1 - w) a + w b, one reference for each weight w; 0 is a and 1 is b, bit for bit.

    Args:
        reference_a, reference_b: of one encoder; one reference each, or one for each weight.
        weights: of reference_b.
    Raises:
        ReferenceMismatchError: other encoders, features, numbers of vectors or of references.
    """
    _check_alike(reference_a, reference_b)
    for which, rows in (("reference_a", reference_a.rows), ("reference_b", reference_b.rows)):
        if rows not in (1, len(weights)):
            raise ReferenceMismatchError(f"{which} holds {rows} per-frame references for {len(weights)} frames; wanted 1 or "
                                         f"{len(weights)}. Set frames to {rows}, or combine them into one when encoding.")
    features = {}
    for name, a_RVD in reference_a.features.items():
        b_RVD = reference_b.features[name].to(a_RVD)
        w_F11 = torch.tensor(weights).to(a_RVD)[:, None, None]
        features[name] = (1 - w_F11) * a_RVD + w_F11 * b_RVD
    return ReferenceFeatures(features, dict(reference_a.encoder), per_frame=len(weights) > 1)


def check_for_module(reference: ReferenceFeatures, config: ModuleConfig) -> None:
    """Refuse features that another encoder made than the one the module was trained with.

    A module that names no encoder is checked by feature names and sizes alone.

    Raises:
        ReferenceMismatchError: other names, sizes, family or fingerprint; what was found and what is needed.
    """
    check_encoder(reference.encoder, config)
    config.check_features(reference.features)


def encode_options(config: ModuleConfig, framing: Framing | None = None, faces: FaceChoice | None = None) -> EncodeOptions:
    """What a module wants of its encoder: its features, its layer, and pictures framed as in its training.

    Args:
        config: the module's metadata; its encoder's ``frame`` and ``background`` stand for "as trained" where it has them.
        framing, faces: the user's choices.
    Raises:
        ImageInputError: the metadata names an unknown layer, frame or background.
    """
    framing = framing or Framing()
    trained = {name: config.encoder[name] for name in ("frame", "background")
               if getattr(framing, name) == AS_TRAINED and name in config.encoder}
    layer = config.encoder.get("layer", _DEFAULTS["layer"])
    return EncodeOptions(tuple(config.features), layer, replace(framing, **trained), faces or FaceChoice())


def check_encoder(encoder: Mapping[str, Any], config: ModuleConfig, before: bool = False) -> None:
    """Refuse an encoder of another family, with other weights, or read at another layer than in the module's training.

    Args:
        encoder: {family, fingerprint, layer} as in the metadata.
        config: the module's.
        before: nothing was encoded yet, so no layer was chosen.
    Raises:
        ReferenceMismatchError: what was found and what is needed.
    """
    keys = ("family", "fingerprint", "layer") if "local" in config.features and not before else ("family", "fingerprint")
    for key in keys:
        needed, found = config.encoder.get(key), encoder.get(key, _DEFAULTS.get(key))
        if needed is not None and found != needed:
            made = "this encoder is" if before else "the reference was encoded by"
            raise ReferenceMismatchError(f"{made} {_encoder_name(encoder)}; the {config.condition} module needs "
                                         f"{_encoder_name(config.encoder)}. Load that encoder{'' if before else _AGAIN}.")


def _check_alike(a: ReferenceFeatures, b: ReferenceFeatures) -> None:
    for key in ("family", "fingerprint", "layer"):
        if a.encoder.get(key, _DEFAULTS.get(key)) != b.encoder.get(key, _DEFAULTS.get(key)):
            raise ReferenceMismatchError(f"reference_a was encoded by {_encoder_name(a.encoder)}, reference_b by "
                                         f"{_encoder_name(b.encoder)}; only references of one encoder can be blended. Encode "
                                         "both with the same module and encoder.")
    found_a, found_b = ({name: tuple(tensor.shape[1:]) for name, tensor in one.features.items()} for one in (a, b))
    if found_a != found_b:
        raise ReferenceMismatchError(f"the features (vectors, dim) of reference_a are {found_a}, those of reference_b are "
                                     f"{found_b}; wanted the same. Encode both with the same module, and as many pictures for "
                                     "each ('average' makes one of several).")


def _encoder_name(encoder: Mapping[str, Any]) -> str:
    title = encoder_title(encoder.get("family"))
    details = [f"fingerprint {str(encoder['fingerprint'])[:12]}"] if encoder.get("fingerprint") else []
    details += [f"{encoder['layer']} layer"] if encoder.get("layer") else []
    return f"{title}, {', '.join(details)}" if details else title


def _checked(features: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    if not features:
        raise ReferenceMismatchError("a reference without features. Encode a picture with the module connected.")
    for name, tensor in features.items():
        if tensor.ndim != 3 or 0 in tensor.shape:
            empty = "no pictures: " if tensor.ndim and not tensor.shape[0] else ""
            raise ReferenceMismatchError(
                f"{empty}the feature '{name}' has shape {tuple(tensor.shape)}; wanted (pictures, vectors, dim) with at "
                "least one picture. Give the encoder one picture or more."
            )
    return features


def _concat(x_RVD: torch.Tensor) -> torch.Tensor:
    return x_RVD.flatten(0, 1).unsqueeze(0)


def _average(x_RVD: torch.Tensor) -> torch.Tensor:
    return x_RVD.mean(dim=0, keepdim=True)


def _normalised_average(x_RVD: torch.Tensor) -> torch.Tensor:
    length_1V1 = x_RVD.norm(dim=-1, keepdim=True).mean(dim=0, keepdim=True)
    direction_1VD = F.normalize(_average(F.normalize(x_RVD, dim=-1)), dim=-1)
    return direction_1VD * length_1V1


def _per_frame(x_RVD: torch.Tensor) -> torch.Tensor:
    return x_RVD


_COMBINE = dict(zip(COMBINATIONS, (_concat, _average, _normalised_average, _per_frame), strict=True))
