"""The face reference encoder: whose face is taken, where it is, and what becomes of it. AdaFace by the fill rule."""

import pytest
import torch
from reference_answers import filled
from test_face_detection import check, montage, picture, points, tensor

from emma_core.encoders.adaface import AdaFace
from emma_core.encoders.face import FaceReferenceEncoder
from emma_core.encoders.face_alignment import ARCFACE_TEMPLATE, align_faces, keypoints_of_mask
from emma_core.encoders.face_detection import load_face_detector
from emma_core.encoders.options import EncodeOptions, FaceChoice
from emma_core.errors import ImageInputError, ReferenceMismatchError

ALL = ("face", "face_map", "face_norm")


def encode(encoder: FaceReferenceEncoder, image_BHW3, mask_BHW, options: EncodeOptions):
    """Features and aligned faces of all pictures, one after the other."""
    encoded = encoder.encode(image_BHW3, mask_BHW, options)
    assert len(encoded) == len(image_BHW3)
    features = {name: torch.cat([one.features[name] for one in encoded]) for name in options.features}
    return features, torch.cat([one.seen_RSS3 for one in encoded])


def options(features=("face",), **choice) -> EncodeOptions:
    return EncodeOptions(features, faces=FaceChoice(**choice))


def no_detector():
    raise AssertionError("the detector is not needed here")


def given(*faces_52: torch.Tensor) -> tuple:
    return tuple(tuple(map(tuple, face_52.tolist())) for face_52 in faces_52)


@pytest.fixture(scope="module")
def backbone():
    model = AdaFace(18)
    shapes = {key: value.shape for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    counters = {key: value for key, value in model.state_dict().items() if key not in shapes}
    model.load_state_dict(filled(shapes) | counters)
    model.fingerprint = "of the fill rule"
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def detector():
    return load_face_detector()


@pytest.fixture
def encoder(backbone, detector):
    return FaceReferenceEncoder(backbone, detector)


@pytest.fixture
def blind(backbone):
    return FaceReferenceEncoder(backbone, no_detector)


def test_features_are_the_backbones_answers_for_blue_green_red(blind, backbone):
    image_1HW3 = tensor(picture("collins"))[None]
    features, seen_R112x3 = encode(blind, image_1HW3, None, options(ALL, keypoints=(given(points("collins")),)))
    torch.testing.assert_close(seen_R112x3, align_faces(image_1HW3[0], points("collins")[None]))
    blue_green_red = torch.stack([seen_R112x3[..., 2], seen_R112x3[..., 1], seen_R112x3[..., 0]], 1)
    embedding_RD, norm_R1, map_RChw = backbone(blue_green_red * 2 - 1)
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "face": (1, 1, 512), "face_map": (1, 49, 512), "face_norm": (1, 1, 1)}
    torch.testing.assert_close(features["face"][:, 0], embedding_RD)
    torch.testing.assert_close(features["face_norm"][:, 0], norm_R1)
    assert features["face"].norm().item() == pytest.approx(1)
    for row, column in [(0, 0), (0, 6), (3, 5), (6, 0)]:
        found_C, wanted_C = features["face_map"][0, 7 * row + column], map_RChw[0, :, row, column]
        torch.testing.assert_close(found_C, wanted_C, rtol=0, atol=1e-4)
    assert (backbone(seen_R112x3.permute(0, 3, 1, 2) * 2 - 1)[0] - embedding_RD).abs().max() > 1e-3


@pytest.mark.parametrize("names", [("face",), ("face_norm", "face"), ALL])
def test_only_the_features_asked_for_are_given(blind, names):
    image_1HW3 = tensor(picture("collins"))[None]
    features, _ = encode(blind, image_1HW3, None, options(names, keypoints=(given(points("collins")),)))
    assert tuple(features) == names


def test_an_unknown_feature_is_refused_with_those_there_are(blind):
    with pytest.raises(ReferenceMismatchError, match="global, local are needed; this encoder gives face, face_map, face_norm"):
        encode(blind, torch.zeros(1, 8, 8, 3), None, options(("global", "face", "local")))


def test_description_tells_the_weights_apart(encoder):
    assert encoder.description == {"family": "adaface-ir-18", "fingerprint": "of the fill rule", "input_size": 112}
    assert encoder.feature_names == ALL


def test_the_detected_face_is_aligned_and_each_picture_has_its_own(encoder, detector):
    image_BHW3 = torch.stack([montage([name], 1, 160)[0] for name in ("collins", "hopper")])
    features, seen_R112x3 = encode(encoder, image_BHW3, None, options())
    assert features["face"].shape == (2, 1, 512)
    for seen in seen_R112x3:
        check(detector.detect(seen), [torch.tensor(ARCFACE_TEMPLATE)], 1.6)
    assert (seen_R112x3[0] - seen_R112x3[1]).abs().mean() > 0.1


def test_which_chooses_the_largest_one_by_index_or_all(encoder):
    small, _ = montage(["collins"], 1, 120)
    large, _ = montage(["hopper"], 1, 240)
    image_1HW3 = torch.full((1, 240, 480, 3), 0.5)
    image_1HW3[0, 60:180, :120], image_1HW3[0, :, 120:360], image_1HW3[0, 60:180, 360:] = small, large, small.flip(1)
    _, all_R = encode(encoder, image_1HW3, None, options(which="all"))
    assert len(all_R) == 3
    for index in range(3):
        features, seen = encode(encoder, image_1HW3, None, options(which="by index", index=index))
        assert torch.equal(seen[0], all_R[index]) and features["face"].shape == (1, 1, 512)
    _, largest = encode(encoder, image_1HW3, None, options(which="largest"))
    assert torch.equal(largest[0], all_R[1])
    assert (all_R[0] - all_R[2].flip(1)).abs().mean() < 0.05 < (all_R[0] - all_R[1]).abs().mean()


def test_all_faces_of_all_pictures_follow_each_other(encoder):
    pair, _ = montage(["collins", "hopper"], 2, 120)
    one, _ = montage(["hopper"], 1, 120)
    image_BHW3 = torch.full((2, 120, 240, 3), 0.5)
    image_BHW3[0], image_BHW3[1, :, :120] = pair, one
    features, seen = encode(encoder, image_BHW3, None, options(ALL, which="all"))
    assert len(seen) == 3 and all(len(value) == 3 for value in features.values())
    mirrored = seen[1].flip(1)  # montage mirrors its second head
    assert (mirrored - seen[2]).abs().mean() < 0.06 < (mirrored - seen[0]).abs().mean()


def test_an_index_beyond_the_faces_says_how_many_there_are(encoder):
    with pytest.raises(ImageInputError, match=r"picture 1 of 1: face 2 is meant, but the picture has 1; wanted 0 .* to 0"):
        encode(encoder, tensor(picture("collins"))[None], None, options(which="by index", index=2))


def test_a_picture_without_face_is_named(encoder):
    image_BHW3 = tensor(picture("collins"))[None].repeat(3, 1, 1, 1)
    image_BHW3[1] = 0.5
    with pytest.raises(ImageInputError, match="picture 2 of 3: no face found.*draw a mask over the face, or give its five"):
        encode(encoder, image_BHW3, None, options())


def test_a_mask_replaces_detection(blind):
    image_BHW3 = torch.rand(2, 90, 80, 3, generator=torch.Generator().manual_seed(0))
    mask_BHW = torch.zeros(2, 90, 80)
    mask_BHW[0, 10:60, 20:60], mask_BHW[1, 30:80, 5:45] = 1, 0.5
    _, seen = encode(blind, image_BHW3, mask_BHW, options(which="all"))
    for index in range(2):
        wanted = align_faces(image_BHW3[index], keypoints_of_mask(mask_BHW[index])[None])[0]
        assert torch.equal(seen[index], wanted)
    _, seen = encode(blind, image_BHW3, mask_BHW[:1], options())
    assert torch.equal(seen[1], align_faces(image_BHW3[1], keypoints_of_mask(mask_BHW[0])[None])[0])


def test_keypoints_replace_mask_and_detection(blind):
    image_BHW3 = torch.rand(2, 112, 112, 3, generator=torch.Generator().manual_seed(0))
    template = torch.tensor(ARCFACE_TEMPLATE)
    mask_BHW = torch.ones(2, 112, 112)
    _, seen = encode(blind, image_BHW3, mask_BHW, options(keypoints=(given(template),)))
    torch.testing.assert_close(seen, image_BHW3, rtol=0, atol=1e-4)
    each = (given(template), given(template.flip(1) * torch.tensor([1.0, -1.0]) + torch.tensor([0.0, 112.0])))
    _, seen = encode(blind, image_BHW3, None, options(keypoints=each))
    torch.testing.assert_close(seen[0], image_BHW3[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(seen[1], align_faces(image_BHW3[1], torch.tensor(each[1]))[0])


def test_given_faces_are_chosen_from_left_to_right_and_by_size(blind):
    image_1HW3 = torch.rand(1, 120, 300, 3, generator=torch.Generator().manual_seed(0))
    template = torch.tensor(ARCFACE_TEMPLATE)
    right, left = template + torch.tensor([150.0, 0.0]), template * 0.5
    faces = (given(right, left),)
    _, by_index = encode(blind, image_1HW3, None, options(which="by index", index=0, keypoints=faces))
    assert torch.equal(by_index[0], align_faces(image_1HW3[0], left[None])[0])
    _, largest = encode(blind, image_1HW3, None, options(keypoints=faces))
    assert torch.equal(largest[0], align_faces(image_1HW3[0], right[None])[0])


@pytest.mark.parametrize(("keypoints", "message"), [
    ((given(torch.tensor(ARCFACE_TEMPLATE)),) * 2, "keypoints for 2 pictures; wanted them for 3, or one entry for all"),
    ((given(torch.tensor(ARCFACE_TEMPLATE) + 200),), r"face keypoints about \(256\.\d+, 271\.\d+\); wanted .*112 x 120 pixels"),
    (((),), r"keypoints of shape \(0,\); wanted \(faces, 5, 2\)"),
    ((given(torch.full((5, 2), 50.0)),), "picture 1 of 3: the face keypoints .* do not tell how the face lies"),
])
def test_unusable_keypoints_are_refused(blind, keypoints, message):
    with pytest.raises(ImageInputError, match=message):
        encode(blind, torch.zeros(3, 120, 112, 3), None, options(keypoints=keypoints))


def test_unusable_pictures_and_masks_are_refused(blind):
    for shape in [(0, 8, 8, 3), (1, 8, 8, 4), (8, 8, 3)]:
        with pytest.raises(ImageInputError, match="Give RGB pictures"):
            encode(blind, torch.zeros(shape), None, options())
    for shape in [(1, 8, 9), (8, 8), (3, 8, 8), (0, 8, 8)]:
        with pytest.raises(ImageInputError, match="Resize the mask to the picture"):
            encode(blind, torch.zeros(2, 8, 8, 3), torch.ones(shape), options())
    mask_BHW = torch.zeros(2, 8, 8)
    mask_BHW[0] = 1
    with pytest.raises(ImageInputError, match="picture 2 of 2: the mask is empty"):
        encode(blind, torch.zeros(2, 8, 8, 3), mask_BHW, options())


def test_a_detector_is_loaded_once_and_only_when_a_face_must_be_found(backbone, detector):
    loaded = []
    encoder = FaceReferenceEncoder(backbone, lambda: loaded.append(1) or detector)
    image_1HW3 = tensor(picture("collins"))[None]
    encode(encoder, image_1HW3, torch.ones(1, 240, 240), options())
    assert loaded == []
    for _ in range(2):
        encode(encoder, image_1HW3, None, options())
    assert loaded == [1]


def test_many_faces_go_through_the_backbone_in_parts(blind, backbone):
    image_1HW3 = torch.rand(1, 60, 400, 3, generator=torch.Generator().manual_seed(0))
    shifts = [torch.tensor([8.0 * index, 0.0]) for index in range(35)]
    faces = given(*(torch.tensor(ARCFACE_TEMPLATE) * 0.5 + shift for shift in shifts))
    batches = []
    hook = backbone.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    features, _ = encode(blind, image_1HW3, None, options(which="all", keypoints=(faces,)))
    hook.remove()
    assert batches == [32, 3] and features["face"].shape == (35, 1, 512)
    alone, _ = encode(blind, image_1HW3, None, options(which="by index", index=33, keypoints=(faces,)))
    torch.testing.assert_close(features["face"][33], alone["face"][0], rtol=0, atol=1e-5)


def test_the_backbone_sets_the_precision(backbone):
    double = AdaFace(18).eval().double()
    double.load_state_dict(backbone.state_dict())
    image_1HW3, chosen = tensor(picture("collins"))[None], options(ALL, keypoints=(given(points("collins")),))
    features, seen = encode(FaceReferenceEncoder(double, no_detector), image_1HW3, None, chosen)
    assert {value.dtype for value in features.values()} == {torch.float64} and seen.dtype == torch.float32
    single, _ = encode(FaceReferenceEncoder(backbone, no_detector), image_1HW3, None, chosen)
    torch.testing.assert_close(features["face"].float(), single["face"], rtol=0, atol=1e-4)
