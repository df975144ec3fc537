"""Numbers over the frames of a video, and references blended with them."""

import math

import pytest
import torch
from small_models import random_tensor

from emma_core.encoders.matching import blend_references
from emma_core.errors import ReferenceMismatchError, TextInputError
from emma_core.model.frame_values import INTERPOLATIONS, parse_keyframes, values_between, values_over_frames
from emma_core.model.reference_features import ReferenceFeatures

CLIP = {"family": "clip-vit-h-14", "fingerprint": "aaaa1111bbbb2222", "layer": "last"}


@pytest.mark.parametrize(("text", "wanted"), [
    ("0: 0.0, 12: 1.0", {0: 0.0, 12: 1.0}), ("12:1,0:-.5", {0: -0.5, 12: 1.0}), ("3: 0.25", {3: 0.25}),
    ("0:(0.5),\n 7 : ( 1e-1 ) ,\n", {0: 0.5, 7: 0.1}), ("0: 1\n4: 2; 5: 3", {0: 1.0, 4: 2.0, 5: 3.0}),
])
def test_keyframes_are_read(text, wanted):
    found = parse_keyframes(text)
    assert found == wanted and list(found) == sorted(wanted)


@pytest.mark.parametrize(("text", "message"), [
    ("", "no keyframes; wanted frames and numbers"), (" ,\n", "no keyframes"),
    ("9" * 5000 + ": 1", "the keyframe '9999.* cannot be read; wanted a frame and a number"),
    ("0: 0, twelve: 1", "the keyframe 'twelve: 1' cannot be read; wanted a frame and a number, as in '0: 0.0, 12: 1.0'"),
    ("0: 0, 12: one", "'12: one' cannot be read"), ("0: nan", "'0: nan' cannot be read"), ("0: inf", "'0: inf' cannot"),
    ("-1: 0", "'-1: 0' cannot be read"), ("1.5: 0", "'1.5: 0' cannot be read"), ("0: 1 2", "'0: 1 2' cannot be read"),
    ("0 1", "'0 1' cannot be read"), ("3: 1, 03: 2", "'03: 2' names frame 3 a second time"),
])
def test_keyframes_that_cannot_be_read_are_named(text, message):
    with pytest.raises(TextInputError, match=message):
        parse_keyframes(text)


@pytest.mark.parametrize(("interpolation", "wanted"), [
    ("linear", [2.0, 2.0, 2.5, 3.0, 3.5, 4.0, 1.0, 1.0]), ("hold", [2.0, 2.0, 2.0, 2.0, 2.0, 4.0, 1.0, 1.0]),
    ("ease", [2.0, 2.0, 3 - math.sqrt(0.5), 3.0, 3 + math.sqrt(0.5), 4.0, 1.0, 1.0]),
])
def test_values_between_and_outside_of_keyframes(interpolation, wanted):
    assert values_over_frames({1: 2.0, 5: 4.0, 6: 1.0}, 8, interpolation) == pytest.approx(wanted)


def test_keyframes_behind_the_last_frame_are_aimed_at():
    assert values_over_frames({0: 0.0, 8: 1.0}, 3, "linear") == [0.0, 0.125, 0.25]
    assert values_over_frames({5: 0.5, 8: 1.0}, 3, "linear") == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_both_ends_are_exact(interpolation):
    values = values_between(0.1, 0.7, 7, interpolation)
    assert (values[0], values[-1], len(values)) == (0.1, 0.7, 7)
    assert values_between(0.1, 0.7, 1, interpolation) == [0.1]


def reference(seed, rows=1, vectors=5, encoder=CLIP):
    features = {"global": random_tensor((rows, 1, 24), seed), "local": 3 * random_tensor((rows, vectors, 20), seed + 1)}
    return ReferenceFeatures(features, encoder, per_frame=rows > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_blend_begins_and_ends_bit_for_bit(dtype):
    a, b = (ReferenceFeatures({name: tensor.to(dtype) for name, tensor in reference(seed).features.items()}, CLIP)
            for seed in (1, 5))
    blend = blend_references(a, b, [0.0, 0.25, 1.0])
    assert blend.per_frame and blend.rows == 3 and blend.encoder == CLIP
    for name, tensor in blend.features.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor[0], a.features[name][0]) and torch.equal(tensor[2], b.features[name][0])
        torch.testing.assert_close(tensor[1], 0.75 * a.features[name][0] + 0.25 * b.features[name][0])


def test_one_weight_blends_into_one_reference_for_all_frames():
    blend = blend_references(reference(1), reference(5), [0.5])
    assert not blend.per_frame and blend.rows == 1


def test_references_for_each_frame_blend_frame_by_frame():
    frames, one = reference(1, rows=3), reference(5)
    blend = blend_references(frames, one, [0.0, 0.5, 0.5])
    wanted = 0.5 * frames.features["local"][2] + 0.5 * one.features["local"][0]
    torch.testing.assert_close(blend.features["local"][2], wanted)


@pytest.mark.parametrize(("other", "message"), [
    (reference(5, encoder={**CLIP, "fingerprint": "cccc"}), "reference_a was encoded by .*aaaa1111bbbb.*reference_b by .*cccc.*"
                                                            "only references of one encoder"),
    (reference(5, encoder={**CLIP, "layer": "penultimate"}), "penultimate layer; only references of one encoder"),
    (reference(5, vectors=10), r"'local': \(5, 20\).*'local': \(10, 20\).*as many pictures for each"),
    (ReferenceFeatures({"global": random_tensor((1, 1, 24), 5)}, CLIP), "of reference_a are .*wanted the same"),
    (reference(5, rows=2), "reference_b holds 2 per-frame references for 3 frames; wanted 1 or 3. Set frames to 2"),
])
def test_references_that_do_not_go_together_are_refused(other, message):
    with pytest.raises(ReferenceMismatchError, match=message):
        blend_references(reference(1), other, [0.0, 0.5, 1.0])


def test_an_encoder_that_names_no_layer_means_the_last():
    assert blend_references(reference(1), reference(5, encoder={key: CLIP[key] for key in ("family", "fingerprint")}), [0.5])
