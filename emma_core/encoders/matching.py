"""Which encoder belongs to a module or a reference, and what it is asked for.

Shapes: R references (pictures), V vectors of one picture, D dim of a feature, F frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import ReferenceMismatchError
from ..model.gated_resampler import GatedResampler
from ..model.module_config import ModuleConfig
from ..model.reference_features import COMBINATIONS, ReferenceFeatures, combine_features
from .base import ReferenceEncoder, encode_pictures
from .families import encoder_title
from .options import AS_TRAINED, EncodeOptions, FaceChoice, Framing

_AGAIN = " and encode the picture again"
# what Load Reference Encoder once named a CLIP by: files of then tell nothing of its weights
_OF_NOTHING = hashlib.sha256().hexdigest()
_DEFAULTS = {"layer": "last"}  # what an encoder means that does not say


def encoder_for(module: GatedResampler, encoders: Sequence[ReferenceEncoder]) -> ReferenceEncoder:
    """The first encoder that the module was trained with.

    Raises:
        ReferenceMismatchError: none of them is; what was found and what is needed.
    """
    reasons = []
    for encoder in encoders:
        try:
            check_encoder(encoder.description, module.config, before=True)
        except ReferenceMismatchError as found:
            reasons.append(str(found))
            continue
        if set(module.config.features) <= set(encoder.feature_names):
            return encoder
        reasons.append(f"it gives {', '.join(encoder.feature_names)}, not {', '.join(module.config.features)}.")
    raise ReferenceMismatchError(f"none of the {len(encoders)} encoders is the one of {module.name}: {' '.join(reasons)}")


def encode_for_module(
    encoder: ReferenceEncoder, config: ModuleConfig, image_BHW3: torch.Tensor, mask_BHW: torch.Tensor | None = None,
    combine: str = COMBINATIONS[0], framing: Framing | None = None, faces: FaceChoice | None = None, **how: Any,
) -> tuple[ReferenceFeatures, torch.Tensor]:
    """What a module reads of reference pictures in [0, 1], ready for it, and what the encoder saw.

    Args:
        encoder: the one that the module was trained with.
        config: the module's metadata.
        combine: how several pictures become one reference, see `combine_features`.
        framing, faces: the user's choices.
        how: cache, pictures at once and what is called after each chunk, as `encode_pictures` takes them.
    Raises:
        ImageInputError: unusable pictures or masks; no face.
        ReferenceMismatchError: another encoder than the module's.
    """
    check_encoder(encoder.description, config, before=True)
    options = encode_options(config, framing, faces)
    features, seen = encode_pictures(encoder, image_BHW3, mask_BHW, options, **how)
    layer = {"layer": options.layer} if "local" in features else {}
    reference = combine_features(features, combine, {**encoder.description, **layer})
    check_for_module(reference, config)
    return reference, seen


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
        if needed is not None and found != needed and _OF_NOTHING not in (needed, found):
            made = "this encoder is" if before else "the reference was encoded by"
            raise ReferenceMismatchError(f"{made} {_encoder_name(encoder)}; the {config.condition} module needs "
                                         f"{_encoder_name(config.encoder)}. Load that encoder{'' if before else _AGAIN}.")


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
