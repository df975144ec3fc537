"""The similarity to the published template, alignment on pictures whose every value is known, and the user's keypoints."""

import math

import pytest
import torch
from test_face_detection import PEOPLE, check, errors, picture, points, rotated, tensor

from emma_core.encoders.face_alignment import (
    ARCFACE_TEMPLATE,
    align_faces,
    keypoints_from_box,
    keypoints_of_mask,
    parse_keypoints,
    similarity_transform,
)
from emma_core.encoders.face_detection import load_face_detector
from emma_core.errors import ImageInputError

TEMPLATE = torch.tensor(ARCFACE_TEMPLATE)
ONE = "38 52 74 52 56 72 42 92 71 92"


def similarity(degrees: float, scale: float, shift: tuple[float, float]) -> torch.Tensor:
    cos, sin = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    return torch.tensor([[cos, -sin, shift[0]], [sin, cos, shift[1]]], dtype=torch.float64)


def moved(points_K2: torch.Tensor, matrix_23: torch.Tensor) -> torch.Tensor:
    matrix_23 = matrix_23.to(points_K2)
    return points_K2 @ matrix_23[:, :2].T + matrix_23[:, 2]


def ramp(height: int, width: int) -> torch.Tensor:
    """Red is x and green is y, in shares of the size: bilinear sampling is exact on it."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([(x + 0.5) / width, (y + 0.5) / height, torch.ones(height, width)], -1)


@pytest.fixture(scope="module")
def detector():
    return load_face_detector()


def found(detector, image_HW3: torch.Tensor) -> torch.Tensor:
    """The keypoints (5, 2) of the one face of a picture."""
    (face,) = detector.detect(image_HW3)
    return torch.tensor(face.keypoints)


@pytest.mark.parametrize(("degrees", "scale", "shift"), [(0, 1, (0, 0)), (37, 0.6, (80, -20)), (-170, 12, (-5, 900))])
def test_transform_finds_the_similarity_that_was_applied(degrees, scale, shift):
    wanted_23 = similarity(degrees, scale, shift)
    found_23 = similarity_transform(TEMPLATE.double(), moved(TEMPLATE.double(), wanted_23))
    torch.testing.assert_close(found_23, wanted_23, rtol=1e-9, atol=1e-7)


def test_transform_is_the_least_squares_answer():
    source = TEMPLATE.double()
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = moved(source, similarity(25, 1.7, (3, 4))) + 4 * noise
    (x, y), one, zero = source.T, torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    system = torch.cat([torch.stack([x, -y, one, zero], 1), torch.stack([y, x, zero, one], 1)])
    a, b, c, d = torch.linalg.lstsq(system, torch.cat([target[:, 0], target[:, 1]])).solution.tolist()
    wanted_23 = torch.tensor([[a, -b, c], [b, a, d]], dtype=torch.float64)
    torch.testing.assert_close(similarity_transform(source, target), wanted_23, rtol=1e-9, atol=1e-9)


def test_transform_never_mirrors():
    mirrored = TEMPLATE * torch.tensor([-1.0, 1.0])
    assert torch.linalg.det(similarity_transform(mirrored, TEMPLATE)[:, :2]) > 0


@pytest.mark.parametrize("value", [7.0, float("nan"), float("inf")])
def test_points_that_tell_no_direction_are_refused(value):
    with pytest.raises(ImageInputError, match="do not tell how the face lies; wanted the left eye, right eye"):
        similarity_transform(torch.full((5, 2), value), TEMPLATE)
    with pytest.raises(ImageInputError, match="do not tell how the face lies"):
        align_faces(ramp(20, 20), torch.full((1, 5, 2), value))


@pytest.mark.parametrize("size_px", [112, 224])
@pytest.mark.parametrize("degrees", [0, 30, 180])
def test_keypoints_land_on_the_template(size_px, degrees):
    width, height = 640, 480
    keypoints_52 = moved(TEMPLATE - 56, similarity(degrees, 1.5, (300, 250)))
    (face,) = align_faces(ramp(height, width), keypoints_52[None], size_px)
    assert face.shape == (size_px, size_px, 3)
    pixel_52 = ((TEMPLATE + 0.5) * size_px / 112 - 0.5).round().long()
    exact_52 = (pixel_52 + 0.5) * 112 / size_px - 0.5
    for (x, y), wanted_2 in zip(pixel_52.tolist(), moved(exact_52 - 56, similarity(degrees, 1.5, (300, 250))), strict=True):
        source_2 = face[y, x, :2] * torch.tensor([width, height]) - 0.5
        torch.testing.assert_close(source_2, wanted_2, rtol=0, atol=0.01)


def test_the_published_place_is_kept_pixel_for_pixel():
    image_HW3 = torch.rand(112, 112, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(align_faces(image_HW3, TEMPLATE[None])[0], image_HW3, rtol=0, atol=1e-4)


def test_beyond_the_picture_is_black():
    (face,) = align_faces(torch.ones(50, 60, 3), TEMPLATE[None])
    assert face[:50, :60].min() > 0.9999
    assert face[51:].abs().max() == 0 and face[:, 61:].abs().max() == 0


def test_faces_are_aligned_as_if_alone():
    image_HW3 = torch.rand(90, 130, 3, generator=torch.Generator().manual_seed(0))
    keypoints_F52 = torch.stack([moved(TEMPLATE, similarity(angle, 0.5, (20, 10))) for angle in (0, 20, -50)])
    together = align_faces(image_HW3, keypoints_F52)
    for face, keypoints_52 in zip(together, keypoints_F52, strict=True):
        torch.testing.assert_close(face, align_faces(image_HW3, keypoints_52[None])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["collins", "hopper"])
def test_an_aligned_face_is_found_on_the_template(detector, name):
    image_HW3 = tensor(picture(name))
    keypoints_52 = found(detector, image_HW3)
    again_52 = found(detector, align_faces(image_HW3, keypoints_52[None])[0])
    wanted_52 = moved(keypoints_52, similarity_transform(keypoints_52, TEMPLATE))
    assert (again_52 - wanted_52).norm(dim=1).max() < 1.5
    # faces differ from the template, and two of them by no more than this
    assert (again_52 - TEMPLATE).norm(dim=1).mean() < 6


@pytest.mark.parametrize("name", ["collins", "hopper"])
@pytest.mark.parametrize("degrees", [-30, 45, 90, 105, 180])
def test_a_turned_copy_gives_nearly_the_same_crop(detector, name, degrees):
    places_52 = moved(TEMPLATE, similarity_transform(TEMPLATE, found(detector, tensor(picture(name)))))
    turned_HW3, turned_52 = rotated(name, degrees, places_52)
    keypoints_52 = found(detector, turned_HW3)
    assert (moved(turned_52, similarity_transform(keypoints_52, TEMPLATE)) - TEMPLATE).norm(dim=1).max() < 2.5


def test_crops_of_two_people_differ_and_of_a_copy_do_not(detector):
    def crop(image_HW3):
        return align_faces(image_HW3, found(detector, image_HW3)[None])[0, 20:92, 20:92]

    one, other = crop(tensor(picture("collins"))), crop(tensor(picture("hopper")))
    copy = crop(rotated("collins", 30)[0])
    assert (copy - one).abs().mean() < 0.03 and (copy - other).abs().mean() > 0.1


@pytest.mark.parametrize("name", ["collins", "hopper"])
def test_a_box_alone_tells_the_keypoints_of_a_frontal_face(detector, name):
    (face,) = detector.detect(tensor(picture(name)))
    assert errors(face, keypoints_from_box(face.box)).mean() < 0.15


def test_keypoints_follow_the_box():
    first = keypoints_from_box((10.0, 20.0, 88.0, 123.0))
    twice = keypoints_from_box((20.0, 40.0, 176.0, 246.0))
    torch.testing.assert_close(twice + 0.5, 2 * (first + 0.5))
    wider = keypoints_from_box((0.0, 20.0, 98.0, 123.0))
    torch.testing.assert_close(wider, first)


def test_a_mask_gives_the_keypoints_of_its_box():
    mask_HW = torch.zeros(200, 300)
    mask_HW[40:143, 110:188] = 0.2
    mask_HW[0, 0] = 0.09  # less than half of the mask's white
    torch.testing.assert_close(keypoints_of_mask(mask_HW), keypoints_from_box((110, 40, 188, 143)))
    torch.testing.assert_close(keypoints_of_mask(mask_HW > 0.1), keypoints_from_box((110, 40, 188, 143)))


def test_an_empty_mask_is_refused():
    with pytest.raises(ImageInputError, match="the mask is empty; wanted white where the face is"):
        keypoints_of_mask(torch.zeros(8, 8))


def test_keypoints_are_read_line_by_line():
    points_5 = ((38.0, 52.0), (74.0, 52.0), (56.0, 72.0), (42.0, 92.0), (71.0, 92.0))
    moved_5 = tuple((x + 0.5, y + 100) for x, y in points_5)
    assert parse_keypoints(ONE) == ((points_5,),)
    commas = "38,52, 74,52, 56,72, 42,92, 71,92; 38.5 152 74.5 152 56.5 172 42.5 192 71.5 1.92e2"
    assert parse_keypoints(f"\n{commas}\n{ONE}\n") == ((points_5, moved_5), (points_5,))
    as_json = "[[[[38,52],[74,52],[56,72],[42,92],[71,92]]], [[[38.5,152],[74.5,152],[56.5,172],[42.5,192],[71.5,192]]]]"
    assert parse_keypoints(as_json) == ((points_5,), (moved_5,))
    assert parse_keypoints("") == parse_keypoints(" \n ") == ()


@pytest.mark.parametrize("name", PEOPLE)
@pytest.mark.parametrize("degrees", [0, 90, -135])
def test_keypoints_of_turned_and_profile_faces_are_accepted(name, degrees):
    numbers = moved(points(name), similarity(degrees, 1, (500, 500))).flatten().tolist()
    assert len(parse_keypoints(" ".join(map(str, numbers)))) == 1


@pytest.mark.parametrize(("text", "message"), [
    (f"{ONE}\n1 2 3", "line 2 of the keypoints, face 1: 3 numbers; wanted 10"),
    (f"{ONE}\n\n{ONE}", "line 2 of the keypoints, face 1: 0 numbers"),
    (f"{ONE}; {ONE} 5", "line 1 of the keypoints, face 2: 11 numbers"),
    (f"{ONE};", "line 1 of the keypoints, face 2: 0 numbers"),
    (ONE.replace("74", "seven"), "line 1 of the keypoints, face 1: could not convert string to float: 'seven'"),
    (ONE.replace("74", "nan"), "line 1 of the keypoints, face 1 holds .*wanted five finite x and y"),
    (ONE.replace("74", "1e999"), "wanted five finite x and y"),
    ("74 52 38 52 56 72 71 92 42 92", "line 1 of the keypoints, face 1: the keypoints are those of a mirrored face"),
    ("[[\n[[1,2],]]", "the text of the keypoints is not JSON .* at line 2"), ("[" * 100_000, "nested more than 64 deep"),
    (f"[[[[{'9' * 5000}, 2]]]]", "a number of 5000 digits"),
    ("1e300 2 3 4 5 6 7 8 9 10", "wanted five finite x and y in pixels"),
    ("[]", r"the text of the keypoints holds \[\]"),
    ("[[]]", r"picture 1 of the keypoints holds \[\]"),
    ("[5]", "picture 1 of the keypoints holds 5"),
    ("[[[[1,2],[3,4]]]]", "picture 1 of the keypoints, face 1 holds .*wanted five"),
    ("[[[1,2,3,4,5]]]", "picture 1 of the keypoints, face 1: cannot unpack"),
])
def test_wrong_keypoints_are_refused_by_line(text, message):
    with pytest.raises(ImageInputError, match=message):
        parse_keypoints(text)


def test_hand_read_keypoints_align_as_detected_ones(detector):
    check(detector.detect(align_faces(tensor(picture("hopper")), points("hopper")[None])[0]), [TEMPLATE])
