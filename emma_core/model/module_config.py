"""The metadata of an EMMA module: what it is, which features it needs, what it was trained on."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import ModuleFileError, ReferenceMismatchError, short
from .conditions import CONDITIONS
from .source_spec import SourceSpec, TimeSpec

# 1: on ELLA's tokens; 2: on a checkpoint's own
FORMAT_VERSIONS = (1, 2)
_REQUIRED = ("format_version", "condition", "gate_scale", "separable_gates", "width", "heads", "layers", "features")
_REQUIRED_OF_2 = ("source", "time")
_OPTIONAL = ("encoder", "ella", "training", "draws", "calibration")
SUBJECT, MANNER = "subject", "manner"
_FEATURE_NAME = re.compile(r"[A-Za-z0-9_]+")
# what metadata can be believed to declare before a tensor is looked at
_MOST_LAYERS, _MOST_FEATURES, _LARGEST_SIZE, _LONGEST_NAME = 256, 64, 1 << 20, 100
_KINDS = {"condition": str, "gate_scale": float, "separable_gates": bool, "width": int, "heads": int, "layers": int,
          "features": dict, "encoder": dict, "ella": dict, "training": dict, "draws": str,
          "calibration": dict, "source": dict, "time": dict}
_KINDS_OF_ENCODER = {"family": str, "fingerprint": str, "input_size": int, "layer": str, "masked": bool, "frame": str,
                     "background": str}
_KINDS_OF_ELLA = {"sha256": str, "latents": int}
_KINDS_OF_CALIBRATION = {"strength": float}


@dataclass(frozen=True)
class FeatureSpec:
    """One kind of reference feature: vectors of ``dim``, each read as ``tokens_per_vector`` tokens.

    ``unknown`` keeps keys of newer writers.
    """

    dim: int
    tokens_per_vector: int = 1
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def to_entry(self) -> dict[str, Any]:
        """The feature as a file's metadata names it."""
        return {**self.unknown, "dim": self.dim, "tokens_per_vector": self.tokens_per_vector}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "FeatureSpec":
        """A feature of a file's metadata."""
        unknown = {key: value for key, value in entry.items() if key not in ("dim", "tokens_per_vector")}
        check_kinds(entry, {"dim": int, "tokens_per_vector": int})
        return cls(entry["dim"], entry.get("tokens_per_vector", 1), unknown)


@dataclass(frozen=True)
class ModuleConfig:
    """An EMMA module's `emma` metadata.

    ``encoder`` says which encoder the features come from ({family, fingerprint, input_size, layer, masked}), ``ella``
    which connector it was trained on ({sha256, latents}), ``training`` how. ``draws`` says whether the module says *what* is
    drawn ("subject") or *how* ("manner"), for `Addition`; without it the condition tells: objects and portraits are
    subjects. ``calibration`` says which strength of what was trained a user's strength 1 stands for ({strength}, and how it
    was found); without it that is 1. ``unknown`` keeps keys of newer writers, ``file_metadata`` every other metadata entry of
    the file (ModelSpec keys among them). ``time_width`` is not stored: tensor shapes tell it.

    A module on a checkpoint's own tokens has a ``source`` and a ``time``, and ``width`` is the one inside its blocks; one on
    ELLA's has neither.
    """

    condition: str
    width: int
    heads: int
    layers: int
    features: Mapping[str, FeatureSpec]
    gate_scale: float = 1.0
    separable_gates: bool = True
    time_width: int = 0
    encoder: Mapping[str, Any] = field(default_factory=dict)
    ella: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    draws: str = ""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, Any] = field(default_factory=dict)
    file_metadata: Mapping[str, str] = field(default_factory=dict)
    source: SourceSpec | None = None
    time: TimeSpec | None = None

    def __post_init__(self):
        if not self.time_width:
            object.__setattr__(self, "time_width", self.width)
        if self.draws not in ("", SUBJECT, MANNER):
            raise ModuleFileError(f"an EMMA module that draws {self.draws!r}; wanted {SUBJECT!r} (what is drawn) or {MANNER!r} "
                                  "(how it is drawn). Correct the metadata.")
        if len(self.condition) > _LONGEST_NAME or len(self.features) > _MOST_FEATURES or self.layers > _MOST_LAYERS:
            raise ModuleFileError(f"a condition of {len(self.condition)} letters, {len(self.features)} features and "
                                  f"{self.layers} layers; {_LONGEST_NAME}, {_MOST_FEATURES} and {_MOST_LAYERS} are the most. "
                                  "Correct the metadata.")
        if not self.features:
            raise ModuleFileError("an EMMA module must declare at least one feature, found none. Name what it reads, "
                                  'for instance {"global": {"dim": 1024, "tokens_per_vector": 4}}.')
        for name, spec in self.features.items():
            # a name that torch.nn.ModuleDict uses itself ("keys", "type") could not hold the feature's projection
            if not _FEATURE_NAME.fullmatch(name) or len(name) > _LONGEST_NAME or hasattr(torch.nn.ModuleDict(), name):
                raise ModuleFileError(f"the feature name {name!r} is not made of letters, digits and underscores, or is "
                                      "a reserved word. Rename it.")
            if not (1 <= spec.dim <= _LARGEST_SIZE and 1 <= spec.tokens_per_vector <= _LARGEST_SIZE):
                raise ModuleFileError(f"the feature {name!r} has dim {spec.dim} and {spec.tokens_per_vector} tokens per "
                                      f"vector; wanted 1 to {_LARGEST_SIZE} of both. Correct the metadata.")
        sizes = {"width": self.width, "heads": self.heads, "layers": self.layers, "time width": self.time_width}
        if min(sizes.values()) < 1 or max(sizes.values()) > _LARGEST_SIZE:
            raise ModuleFileError(f"sizes below 1 or above {_LARGEST_SIZE} ({sizes}). Correct the metadata.")
        if (self.source is None) != (self.time is None):
            raise ModuleFileError("a module on a checkpoint's own tokens needs both source and time. Correct the metadata.")
        if not math.isfinite(self.gate_scale):
            raise ModuleFileError(f"the gate scale {self.gate_scale} is not finite. Correct the metadata.")
        if not (math.isfinite(self.calibrated_strength) and self.calibrated_strength > 0):
            raise ModuleFileError(f"strength 1 stands for {self.calibrated_strength}; wanted a number above 0. Correct the "
                                  "calibration in the metadata.")
        if self.width % self.heads:
            raise ModuleFileError(f"width {self.width} is not a multiple of {self.heads} heads. Correct the metadata.")

    @property
    def calibrated_strength(self) -> float:
        """The strength of what was trained that a user's strength 1 stands for."""
        found = self.calibration.get("strength")
        return 1.0 if found is None else found

    @property
    def acts_on(self) -> str:
        """Which of the two kinds it is, in words."""
        if self.source is None:
            return f"for an ELLA (width {self.width}, {self.layers} blocks)"
        return f"for the own tokens of any {self.source.family} checkpoint (width {self.source.width}), without an ELLA"

    @property
    def draws_subject(self) -> bool:
        """Whether it says what is drawn, as declared or by its condition."""
        if self.draws:
            return self.draws == SUBJECT
        return self.condition in CONDITIONS and CONDITIONS[self.condition].is_subject

    def check_features(self, features: Mapping[str, torch.Tensor]) -> None:
        """Refuse features of other names or sizes.

        Raises:
            ReferenceMismatchError: missing or extra feature, wrong shape, NaN, unequal numbers of references.
        """
        wanted = {name: spec.dim for name, spec in self.features.items()}
        found = {name: tuple(tensor.shape) for name, tensor in features.items()}
        if set(found) != set(wanted):
            raise ReferenceMismatchError(
                f"the reference holds the features {_listed(found)}; the {self.condition} module needs "
                f"{_listed(wanted)}. Encode the picture again with this module connected."
            )
        for name, shape in found.items():
            if len(shape) != 3 or shape[-1] != wanted[name] or 0 in shape:
                raise ReferenceMismatchError(
                    f"the feature '{name}' has shape {shape}; the {self.condition} module needs (references, vectors, "
                    f"{wanted[name]}). It was made by another encoder: use "
                    f"{self.encoder.get('family', 'the encoder named in the module')}."
                )
            if not torch.isfinite(features[name]).all():
                raise ReferenceMismatchError(f"the feature '{name}' holds NaN or infinite values. Encode the picture "
                                             "again, in float32 if the encoder ran in float16.")
        counts = {shape[0] for shape in found.values()} - {1}
        if len(counts) > 1:
            raise ReferenceMismatchError(f"features of unequal numbers of references ({found}). Encode them together.")

    def to_json(self) -> str:
        """The `emma` metadata entry."""
        features = {name: spec.to_entry() for name, spec in self.features.items()}
        entry = {
            **self.unknown, "format_version": 1 if self.source is None else 2, "condition": self.condition,
            "gate_scale": self.gate_scale, "separable_gates": self.separable_gates, "width": self.width,
            "heads": self.heads, "layers": self.layers, "features": features,
        }
        if self.source is not None:
            entry |= {"source": self.source.to_entry(self.width), "time": self.time.to_entry()}
        entry |= {name: value if isinstance(value, str) else dict(value)
                  for name in _OPTIONAL if (value := getattr(self, name))}
        return json.dumps(entry)

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], file_metadata: Mapping[str, str], name: str) -> "ModuleConfig":
        """The inverse of `to_json`.

        Args:
            entry: the `emma` metadata as the object that their JSON describes.
            file_metadata: the file's other metadata.
            name: of the file, for the messages.
        Raises:
            ModuleFileError: missing keys, unknown format version, wrong types, impossible sizes.
        """
        _check_version(entry, name)
        names = (*_required(entry), *_OPTIONAL)
        known: dict[str, Any] = {key: entry[key] for key in names if key in entry}
        known.pop("format_version")
        unknown = {key: value for key, value in entry.items() if key not in names}
        try:
            check_kinds(known, _KINDS)
            check_encoder_kinds(known.get("encoder", {}))
            check_kinds(known.get("ella", {}), _KINDS_OF_ELLA)
            check_kinds(known.get("calibration", {}), _KINDS_OF_CALIBRATION)
            known |= _stream_of(known)
            known["features"] = {key: FeatureSpec.from_entry(value) for key, value in known["features"].items()}
        except (AttributeError, KeyError, TypeError) as found:
            raise ModuleFileError(f"{name}: its `emma` metadata has a value of the wrong kind ({short(repr(found))}). "
                                  "Save the module again with a current version of its trainer.") from found
        except ModuleFileError as found:
            raise ModuleFileError(f"{name}: {found}") from None
        try:
            return cls(**known, unknown=unknown, file_metadata=file_metadata)
        except ModuleFileError as found:
            raise ModuleFileError(f"{name}: {found}") from None

    def replace(self, **changes) -> "ModuleConfig":
        """A copy with some fields changed."""
        return replace(self, **changes)


def _required(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return (*_REQUIRED, *_REQUIRED_OF_2) if entry["format_version"] == 2 else _REQUIRED


def _stream_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """``source`` and ``time`` of a version 2 file; both None where it says that its tokens are ELLA's."""
    if "source" not in entry:
        return {}
    source = SourceSpec.from_entry(entry["source"], entry["width"])
    return {"source": source, "time": None if source is None else TimeSpec.from_entry(entry["time"])}


def check_encoder_kinds(encoder: Mapping[str, Any]) -> None:
    """Raise TypeError unless what describes an encoder ({family, fingerprint, ...}) has values of the right kinds."""
    check_kinds(encoder, _KINDS_OF_ENCODER)


def check_kinds(entry: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Raise TypeError unless each known key has a value of its kind, or null; whole numbers are numbers, truths are not."""
    for key, kind in kinds.items():
        value = entry.get(key)
        fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
        if value is not None and not fits:
            raise TypeError(f"{key} is a {type(value).__name__}, wanted a {kind.__name__}")


def _check_version(entry: Mapping[str, Any], name: str) -> None:
    version = entry.get("format_version")
    if type(version) is not int or version not in FORMAT_VERSIONS:
        raise ModuleFileError(f"{name} has format version {short(repr(version))}, this version of "
                              f"ComfyUI-EMMA reads {' and '.join(map(str, FORMAT_VERSIONS))}. Update ComfyUI-EMMA.")
    missing = [key for key in _required(entry) if entry.get(key) is None]
    if missing:
        raise ModuleFileError(f"{name}: its `emma` metadata lacks {_listed(missing)}. Save the module again with a "
                              "current version of its trainer.")


def _listed(names) -> str:
    return ", ".join(sorted(map(str, names))) or "none"
