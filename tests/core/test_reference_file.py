"""Encoded references on disk: what is kept, what is refused, by the file and by the module it meets."""

import json

import pytest
import torch
from bad_files import NOT_SAFETENSORS
from safetensors.torch import load_file, save_file

from emma_core import FeatureSpec, ModuleConfig
from emma_core.encoders.matching import check_for_module
from emma_core.errors import FileError, ReferenceFileError, ReferenceMismatchError
from emma_core.files.reference_file import load_reference, save_reference
from emma_core.model.reference_features import ReferenceFeatures

ENCODER = {"family": "clip-vit-h-14", "fingerprint": "ab" * 32, "input_size": 224, "layer": "penultimate"}


def reference(frames: int = 1) -> ReferenceFeatures:
    vectors_RVD = torch.randn(frames, 6, 16, generator=torch.Generator().manual_seed(frames))
    return ReferenceFeatures({"global": vectors_RVD[:, :1], "local": vectors_RVD[:, 1:, :8]}, ENCODER, per_frame=frames > 1)


@pytest.fixture
def saved(tmp_path):
    save_reference(reference(), tmp_path / "ada.safetensors")
    return tmp_path / "ada.safetensors"


@pytest.mark.parametrize("frames", [1, 3])
def test_loading_gives_what_was_saved(tmp_path, frames):
    save_reference(reference(frames), tmp_path / "ada.safetensors")
    loaded = load_reference(tmp_path / "ada.safetensors")
    assert loaded.encoder == ENCODER and loaded.per_frame == (frames > 1) and loaded.rows == frames
    for name, tensor in reference(frames).features.items():
        assert torch.equal(loaded.features[name], tensor)


def module(**encoder) -> ModuleConfig:
    features = {"global": FeatureSpec(16), "local": FeatureSpec(8)}
    return ModuleConfig("object", 64, 4, 2, features, encoder={**ENCODER, **encoder})


def test_a_loaded_reference_fits_the_module_it_was_made_for(saved):
    check_for_module(load_reference(saved), module())


@pytest.mark.parametrize(("encoder", "found"), [
    ({"fingerprint": "cd" * 32}, "fingerprint abababababab, penultimate layer; .* needs CLIP ViT-H/14 .*nt cdcdcdcdcdcd"),
    ({"family": "clip-vit-l-14"}, r"by CLIP ViT-H/14 \(hidden 1280, projected 1024.* needs CLIP ViT-L/14 \(hidden 1024"),
    ({"layer": "last"}, "penultimate layer; the object module needs .*last layer"),
    ({"family": "adaface-ir-101"}, "needs adaface-ir-101, fingerprint"),
])
def test_a_reference_of_another_encoder_is_refused(saved, encoder, found):
    with pytest.raises(ReferenceMismatchError, match=found):
        check_for_module(load_reference(saved), module(**encoder))


def test_nan_is_not_written(tmp_path):
    bad = ReferenceFeatures({"global": torch.full((1, 1, 4), torch.nan)}, ENCODER)
    with pytest.raises(ReferenceFileError, match="global holds NaN"):
        save_reference(bad, tmp_path / "bad.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileError, match="folder .*none does not exist"):
        save_reference(reference(), tmp_path / "none" / "ada.safetensors")


@pytest.mark.parametrize(("write", "found"), NOT_SAFETENSORS)
def test_damaged_files_are_refused(tmp_path, saved, write, found):
    path = tmp_path / "other.safetensors"
    write(path, saved.read_bytes())
    with pytest.raises(ReferenceFileError, match=found.format(name="other.safetensors")):
        load_reference(path)


ENTRY = {"format_version": 1, "per_frame": False, "encoder": ENCODER}


@pytest.mark.parametrize(("metadata", "found"), [
    (None, "has no `emma_reference` metadata.*Save Reference"), ("{", "is not JSON .*Encode the picture"),
    (json.dumps({**ENTRY, "format_version": 2}), "format version 2, this version .* reads 1. Update"),
    (json.dumps({"format_version": 1}), "per_frame is missing"),
    (json.dumps({**ENTRY, "encoder": 3}), "encoder is a whole number"),
    (json.dumps([1]), "is a list, wanted a JSON object"), (json.dumps({**ENTRY, "per_frame": "no"}), "per_frame is text"),
    (json.dumps({**ENTRY, "encoder": {"family": ["a"]}}), "value of the wrong kind"), ("[" * 10**5, "nested more than 64 deep"),
])
def test_unreadable_metadata_is_refused(saved, metadata, found):
    save_file(load_file(saved), saved, metadata=None if metadata is None else {"emma_reference": metadata})
    with pytest.raises(ReferenceFileError, match=found):
        load_reference(saved)


@pytest.mark.parametrize(("features", "found"), [
    ({"global": torch.zeros(2, 1, 4)}, "2 references that are not one per frame"),
    ({"global": torch.zeros(4)}, r"shape \(4,\)"),
    ({"global": torch.full((1, 1, 4), torch.inf)}, "global holds NaN or infinite"), ({}, "without features"),
])
def test_unusable_features_are_refused(saved, features, found):
    save_file(features, saved, metadata={"emma_reference": json.dumps(ENTRY)})
    with pytest.raises(ReferenceFileError, match=found):
        load_reference(saved)
