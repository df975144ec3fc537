"""Encoding many pictures: chunks, the cache, order, keypoints of each picture."""

import pytest
import torch
from torch import nn

from emma_core.encoders.base import Encoded, FeatureCache, PictureEncoder, encode_pictures
from emma_core.encoders.options import EncodeOptions, FaceChoice, Framing
from emma_core.encoders.pictures import Preparation
from emma_core.errors import ImageInputError, ReferenceMismatchError

OPTIONS = EncodeOptions(("colour",))


class Counting(PictureEncoder):
    """The mean colour of what it sees; remembers the size of each chunk."""

    feature_names = ("colour", "zero")
    description = {"family": "counting"}
    bytes_per_picture = 1

    def __init__(self):
        self.model = nn.Identity()
        self.preparation = Preparation(8, (0, 0, 0), (1, 1, 1))
        self.chunks = []

    def features_of(self, seen_B3SS, options):
        self.chunks.append(len(seen_B3SS))
        return {"colour": seen_B3SS.mean((2, 3))[:, None], "zero": torch.zeros(len(seen_B3SS), 1, 1)}


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 8, 8, 3, generator=torch.Generator().manual_seed(seed))


def test_chunks_change_nothing_and_keep_the_order():
    encoder = Counting()
    images = (pictures(7) * 255).round() / 255
    features, seen = encode_pictures(encoder, images, None, OPTIONS, at_once=3)
    assert encoder.chunks == [3, 3, 1]
    torch.testing.assert_close(features["colour"][:, 0], images.mean((1, 2)))
    torch.testing.assert_close(seen, images)
    assert set(features) == {"colour"}


def test_known_and_repeated_pictures_are_not_encoded_again():
    encoder, cache = Counting(), FeatureCache()
    images = pictures(4)
    first, _ = encode_pictures(encoder, images, None, OPTIONS, cache)
    again, seen = encode_pictures(encoder, images.clone(), None, OPTIONS, cache)
    assert encoder.chunks == [4]
    assert torch.equal(first["colour"], again["colour"]) and len(seen) == 4
    images = torch.cat([images[3:], pictures(1, 9), images[:1], pictures(1, 9)])
    mixed, _ = encode_pictures(encoder, images, None, OPTIONS, cache)
    assert encoder.chunks == [4, 1]
    assert torch.equal(mixed["colour"][0], first["colour"][3]) and torch.equal(mixed["colour"][1], mixed["colour"][3])


@pytest.mark.parametrize("change", [
    lambda image, mask: (image + 0.01, mask, OPTIONS), lambda image, mask: (image, 1 - mask / 2, OPTIONS),
    lambda image, mask: (image, None, OPTIONS),
    lambda image, mask: (image, mask, EncodeOptions(("colour",), framing=Framing(background="white"))),
    lambda image, mask: (image, mask, EncodeOptions(("colour",), layer="penultimate")),
])
def test_anything_that_changes_the_result_is_encoded_anew(change):
    encoder, cache = Counting(), FeatureCache()
    image, mask = pictures(1), torch.ones(1, 8, 8)
    encode_pictures(encoder, image, mask, OPTIONS, cache)
    encode_pictures(encoder, *change(image, mask), cache)
    assert encoder.chunks == [1, 1]


def test_cache_forgets_the_least_recently_used():
    entry = Encoded({"colour": torch.zeros(1, 1, 100)}, torch.zeros(1, 1, 1, 3))
    cache = FeatureCache(2 * entry.nbytes)
    cache.put("a", entry)
    cache.put("b", entry)
    assert cache.get("a") is entry
    cache.put("c", entry)
    assert cache.get("b") is None and cache.get("a") is entry and cache.get("c") is entry
    cache.put("large", Encoded({"colour": torch.zeros(1, 1, 1000)}, torch.zeros(1, 1, 1, 3)))
    assert cache.get("large") is None and cache.get("a") is entry


def test_an_error_raised_between_chunks_ends_the_work_and_keeps_what_is_done():
    encoder, cache = Counting(), FeatureCache()

    def stop(done: int):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_pictures(encoder, pictures(6), None, OPTIONS, cache, 2, stop)
    encode_pictures(encoder, pictures(6), None, OPTIONS, cache, 2)
    assert encoder.chunks == [2, 2, 2]


def test_progress_counts_known_pictures_too():
    encoder, cache, done = Counting(), FeatureCache(), []
    encode_pictures(encoder, pictures(6)[:3], None, OPTIONS, cache)
    encode_pictures(encoder, pictures(6), None, OPTIONS, cache, 2, done.append)
    assert sum(done) == 6 and done[0] == 3


def test_a_feature_the_encoder_lacks_is_refused():
    with pytest.raises(ReferenceMismatchError, match="features skeleton are needed; this encoder gives colour, zero"):
        encode_pictures(Counting(), pictures(1), None, EncodeOptions(("colour", "skeleton")))


def test_keypoints_for_another_number_of_pictures_are_refused():
    points = tuple((((0.0, 0.0),) * 5,) for _ in range(2))
    with pytest.raises(ReferenceMismatchError, match="keypoints for 2 pictures, but there are 3"):
        encode_pictures(Counting(), pictures(3), None, EncodeOptions(("colour",), faces=FaceChoice(keypoints=points)))


@pytest.mark.parametrize(("options", "found"), [
    (lambda: EncodeOptions(("a",), layer="first"), "layer 'first' is not known; choose one of last, penultimate"),
    (lambda: FaceChoice("smallest"), "face 'smallest' is not known"), (lambda: FaceChoice(index=-1), "face -1; wanted 0"),
])
def test_unknown_options_are_refused(options, found):
    with pytest.raises(ImageInputError, match=found):
        options()
