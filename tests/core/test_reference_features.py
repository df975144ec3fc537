"""Combining the features of several pictures, and refusing those of another encoder."""

import pytest
import torch
from small_models import OBJECT, random_tensor, small_config, small_connector, small_module, small_text

from emma_core import Assembly, Reference
from emma_core.errors import ReferenceMismatchError
from emma_core.reference_features import COMBINATIONS, ReferenceFeatures, check_for_module, combine_features

CLIP = {"family": "clip-vit-h-14", "fingerprint": "aaaa1111bbbb2222", "input_size": 224, "layer": -2, "masked": True}


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
    ({"family": "adaface"}, r"adaface \(fingerprint aaaa1111bbbb\)"),
    ({"fingerprint": "cccc3333dddd4444"}, r"clip-vit-h-14 \(fingerprint cccc3333dddd\)"),
    ({"family": None, "fingerprint": None}, "an unnamed encoder"),
])
def test_another_encoder_is_refused_even_if_the_shapes_agree(changes, named):
    config = small_config("object", OBJECT, encoder=CLIP)
    reference = combine_features(features(1), "concat", {**CLIP, **changes})
    needed = r"the object module needs clip-vit-h-14 \(fingerprint aaaa1111bbbb\)"
    with pytest.raises(ReferenceMismatchError, match=rf"encoded by {named}; {needed}. Load that encoder"):
        check_for_module(reference, config)


def test_features_of_other_names_are_refused():
    with pytest.raises(ReferenceMismatchError, match=r"holds the features global, local; the style module needs global"):
        check_for_module(combine_features(features(1), "concat"), small_config())
