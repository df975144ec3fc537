"""Encoded references on disk: features, and which encoder they come from.

One safetensors file: a tensor (R, V, D) for each feature under its name, and the metadata `emma_reference` = JSON
{format_version, per_frame, encoder: {family, fingerprint, input_size, layer}}.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import ReferenceFileError, ReferenceMismatchError
from ..model.module_config import check_encoder_kinds
from ..model.reference_features import ReferenceFeatures
from .json_file import entry_of, parse_json
from .tensor_file import check_finite, read_tensors
from .writing import write_atomically

FORMAT_VERSION = 1
_KEY = "emma_reference"
_WHAT = "an encoded EMMA reference"
_AGAIN = "Encode the picture and save it again."


def save_reference(reference: ReferenceFeatures, path: str | Path) -> None:
    """Write a reference atomically.

    Raises:
        ReferenceFileError: NaN or infinite features.
        FileError: the folder does not exist.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in reference.features.items()}
    check_finite(tensors, Path(path).name, ReferenceFileError)
    entry = {"format_version": FORMAT_VERSION, "per_frame": reference.per_frame, "encoder": dict(reference.encoder)}
    write_atomically(path, lambda temporary: save_file(tensors, str(temporary), metadata={_KEY: json.dumps(entry)}))


def load_reference(path: str | Path) -> ReferenceFeatures:
    """A reference as `save_reference` wrote it; whether it fits a module is checked where it meets one.

    Raises:
        ReferenceFileError: not such a file, another format version, damaged or non-finite features.
    """
    name = Path(path).name
    tensors, metadata = read_tensors(path, _WHAT, ReferenceFileError)
    if _KEY not in metadata:
        raise ReferenceFileError(f"{name} has no `{_KEY}` metadata, so it is not {_WHAT}. Choose a file that Save Reference "
                                 "wrote.")
    where = f"{name}: its `{_KEY}` metadata"
    entry = parse_json(metadata[_KEY], where, ReferenceFileError, advice=_AGAIN)
    version, per_frame, encoder = (entry_of(entry, key, kind, where, ReferenceFileError, advice=_AGAIN) for key, kind in
                                   (("format_version", int), ("per_frame", bool), ("encoder", dict)))
    try:
        check_encoder_kinds(encoder)
    except TypeError as found:
        raise ReferenceFileError(f"{where} has a value of the wrong kind ({found}). {_AGAIN}") from None
    if version != FORMAT_VERSION:
        raise ReferenceFileError(f"{name} has format version {version!r}, this version of ComfyUI-EMMA reads {FORMAT_VERSION}. "
                                 "Update ComfyUI-EMMA.")
    check_finite(tensors, name, ReferenceFileError)
    # copies, as what was read lies in the file itself; of fp8, in which nothing can be computed, in float32
    features = {key: tensor.to(torch.float32 if tensor.itemsize == 1 else tensor.dtype, copy=True)
                for key, tensor in tensors.items()}
    try:
        return ReferenceFeatures(features, encoder, per_frame)
    except ReferenceMismatchError as found:
        raise ReferenceFileError(f"{name}: {found}") from found
