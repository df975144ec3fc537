"""Combining the features of several pictures, and refusing those of another encoder."""

import pytest
import torch
from small_models import OBJECT, random_tensor, small_config, small_connector, small_module, small_text

from emma_core import Assembly, FeatureSpec, Reference
from emma_core.encoders.families import encoder_title
from emma_core.encoders.matching import check_encoder, check_for_module, encode_options
from emma_core.encoders.options import Framing
from emma_core.errors import ImageInputError, ReferenceMismatchError
from emma_core.model.reference_features import COMBINATIONS, ReferenceFeatures, combine_features

CLIP = {"family": "clip-vit-h-14", "fingerprint": "aaaa1111bbbb2222", "input_size": 224, "layer": "penultimate", "masked": True}


def features(pictures: int) -> dict[str, torch.Tensor]:
    return {"global": random_tensor((pictures, 1, 24), 1), "local": 3 * random_tensor((pictures, 5, 20), 2)}


def test_concat_keeps_every_vector_in_the_order_of_the_pictures():
    given = features(3)
    combined = combine_features(given, "concat").features
    assert combined["global"].shape == (1, 3, 24) and combined["local"].shape == (1, 15, 20)
    assert torch.equal(combined["local"][0, 5:10], given["local"][1])


def test_average_is_the_mean_of_the_pictures():
    given = features(3)
    combined = combine_features(given, "average").features
    wanted = (given["local"][0] + given["local"][1] + given["local"][2]) / 3
    torch.testing.assert_close(combined["local"][0], wanted)


def test_normalised_average_weighs_pictures_by_direction_only_and_keeps_the_mean_length():
    given = {"global": torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]])}
    found = combine_features(given, "normalised average").features["global"]
    torch.testing.assert_close(found, torch.tensor([[[2**0.5, 2**0.5]]]))


def test_per_frame_changes_nothing_and_says_so():
    given = features(3)
    combined = combine_features(given, "per frame", CLIP)
    assert combined.per_frame and combined.rows == 3 and combined.encoder == CLIP
    assert torch.equal(combined.features["local"], given["local"])


@pytest.mark.parametrize("how", ["concat", "average", "per frame"])
def test_one_picture_stays_as_it_is(how):
    given = features(1)
    combined = combine_features(given, how)
    assert combined.rows == 1
    assert all(torch.equal(combined.features[name], given[name]) for name in given)


def test_one_picture_keeps_direction_and_length_in_a_normalised_average():
    given = features(1)
    torch.testing.assert_close(combine_features(given, "normalised average").features["local"], given["local"])


def test_the_order_of_concatenated_pictures_does_not_matter():
    module, connector = small_module("object", features=OBJECT), small_connector()
    several = combine_features(features(3), "concat")
    tokens_BKW = connector.tokens(small_text(), 500, Assembly([Reference(module, several.features)]))
    reordered = {name: tensor.flip(1) for name, tensor in several.features.items()}
    flipped_BKW = connector.tokens(small_text(), 500, Assembly([Reference(module, reordered)]))
    torch.testing.assert_close(tokens_BKW, flipped_BKW, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", COMBINATIONS)
def test_no_pictures_are_refused(how):
    with pytest.raises(ReferenceMismatchError, match=r"no pictures: the feature 'global' has shape \(0, 1, 24\)"):
        combine_features({"global": torch.zeros(0, 1, 24)}, how)


def test_no_features_are_refused():
    with pytest.raises(ReferenceMismatchError, match=r"without features"):
        combine_features({}, "concat")


def test_unequal_numbers_of_pictures_are_refused():
    given = {"global": torch.zeros(2, 1, 24), "local": torch.zeros(3, 5, 20)}
    with pytest.raises(ReferenceMismatchError, match=r"unequal numbers of pictures .*'global': 2, 'local': 3"):
        combine_features(given, "average")


def test_an_unknown_way_is_refused_with_the_known_ones():
    with pytest.raises(ReferenceMismatchError, match=r"'median'; choose one of concat, average, normalised average"):
        combine_features(features(2), "median")


def test_several_references_for_one_row_are_refused():
    with pytest.raises(ReferenceMismatchError, match=r"2 references that are not one per frame; wanted 1"):
        ReferenceFeatures(features(2))


def test_the_modules_own_encoder_passes():
    config = small_config("object", OBJECT, encoder=CLIP)
    check_for_module(combine_features(features(2), "average", {**CLIP, "masked": False}), config)


def test_a_module_without_encoder_takes_features_of_its_sizes():
    check_for_module(combine_features(features(1), "concat", CLIP), small_config("object", OBJECT))


@pytest.mark.parametrize(("changes", "named"), [
    ({"family": "adaface-ir-101"}, r"adaface-ir-101, fingerprint aaaa1111bbbb, penultimate layer"),
    ({"fingerprint": "cccc3333dddd4444"}, r"CLIP ViT-H/14 \(hidden 1280.*\), fingerprint cccc3333dddd, penultimate layer"),
    ({"family": None, "fingerprint": None, "layer": None}, "an unnamed encoder"),
    ({"layer": "last"}, r"CLIP ViT-H/14 \(hidden 1280.*\), fingerprint aaaa1111bbbb, last layer"),
])
def test_another_encoder_is_refused_even_if_the_shapes_agree(changes, named):
    config = small_config("object", OBJECT, encoder=CLIP)
    reference = combine_features(features(1), "concat", {**CLIP, **changes})
    needed = r"the object module needs CLIP ViT-H/14 \(hidden 1280.*\), fingerprint aaaa1111bbbb, penultimate layer"
    with pytest.raises(ReferenceMismatchError, match=rf"encoded by {named}; {needed}. Load that encoder"):
        check_for_module(reference, config)


def test_features_of_other_names_are_refused():
    with pytest.raises(ReferenceMismatchError, match=r"holds the features global, local; the style module needs global"):
        check_for_module(combine_features(features(1), "concat"), small_config())


# family -> its features, name -> dim; SigLIP's are those of an open_clip model
ENCODERS = {
    "clip-vit-h-14": {"global": 1024, "local": 1280}, "clip-vit-l-14": {"global": 768, "local": 1024},
    "clip-vit-l-14-336": {"global": 768, "local": 1024}, "clip-vit-bigg-14": {"global": 1280, "local": 1664},
    "adaface-ir-18": {"face": 512, "face_map": 512}, "adaface-ir-50": {"face": 512, "face_map": 512},
    "adaface-ir-101": {"face": 512, "face_map": 512}, "open_clip:ViT-B-16-SigLIP2": {"global": 768, "local": 768},
    "open_clip:ViT-H-14": {"global": 1024, "local": 1280}, "playground": {"global": 256, "local": 128},
    "clip-miniature": {"global": 128, "local": 160},
}


@pytest.mark.parametrize("needed", ENCODERS)
@pytest.mark.parametrize("found", ENCODERS)
def test_every_wrong_pairing_of_encoder_and_module_is_refused(found, needed):
    """By name where both say what they are; by the shapes of the features where the module does not."""
    reference = ReferenceFeatures({name: torch.ones(1, 2, dim) for name, dim in ENCODERS[found].items()}, {"family": found})
    specs = {name: FeatureSpec(dim) for name, dim in ENCODERS[needed].items()}
    named, unnamed = (small_config("test", specs, encoder=encoder) for encoder in ({"family": needed}, {}))
    for config in (named, unnamed):
        if found == needed or (config is unnamed and ENCODERS[found] == ENCODERS[needed]):
            check_for_module(reference, config)
            continue
        with pytest.raises(ReferenceMismatchError) as refusal:
            check_for_module(reference, config)
        if config is named:
            assert encoder_title(found) in str(refusal.value) and f"needs {encoder_title(needed)}" in str(refusal.value)
            with pytest.raises(ReferenceMismatchError, match="this encoder is .* Load that encoder"):
                check_encoder(reference.encoder, config, before=True)


def test_what_once_named_its_encoder_by_the_sum_of_nothing_is_taken_at_its_family():
    """Such modules and references exist; a CLIP of another family is refused as ever."""
    of_nothing, other = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "0" * 64
    for needed, found in ((of_nothing, other), (other, of_nothing)):
        config = small_config("style", encoder={"family": "clip-vit-h-14", "fingerprint": needed})
        check_encoder({"family": "clip-vit-h-14", "fingerprint": found}, config)
        with pytest.raises(ReferenceMismatchError, match="needs CLIP ViT-H/14"):
            check_encoder({"family": "clip-vit-l-14", "fingerprint": found}, config)
    with pytest.raises(ReferenceMismatchError, match="fingerprint 111111111111"):
        check_encoder({"family": "clip-vit-h-14", "fingerprint": "1" * 64}, config)


def test_options_come_from_the_module_unless_the_user_chose():
    trained = {"layer": "penultimate", "frame": "pad", "background": "white"}
    config = small_config("object", OBJECT, encoder=trained)
    options = encode_options(config)
    assert (options.features, options.layer) == (("global", "local"), "penultimate")
    assert (options.framing.frame, options.framing.background) == ("pad", "white")
    chosen = encode_options(config, Framing("top", margin=0.3)).framing
    assert (chosen.frame, chosen.background, chosen.margin) == ("top", "white", 0.3)
    assert encode_options(small_config("object", OBJECT)).framing == Framing()


def test_metadata_with_an_unknown_layer_is_refused():
    with pytest.raises(ImageInputError, match="layer -2 is not known; choose one of last, penultimate"):
        encode_options(small_config("object", OBJECT, encoder={"layer": -2}))
