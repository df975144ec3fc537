"""MTCNN on pictures of real people: what is found where, and which weights are opened."""

import importlib.util
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emma_core.encoders import face_detection
from emma_core.encoders.face_detection import Face, load_face_detector
from emma_core.errors import EncoderFileError, ImageInputError

FACES = Path(__file__).parent / "data" / "faces"
# keypoints as read by eye, see data/faces/README.md
PEOPLE = {
    "collins": ((103.0, 100.5), (146.0, 103.0), (123.0, 127.0), (102.5, 139.5), (144.5, 140.5)),
    "hopper": ((136.5, 148.5), (220.0, 147.5), (180.5, 194.5), (143.5, 240.5), (223.5, 238.5)),
    "photographer": ((134.5, 117.5), (148.5, 116.5), (152.5, 135.5), (129.5, 150.5), (140.5, 149.5)),
}
# of the distance from the eyes to the mouth: the mean of the five points, and the worst of them
MEAN_ERROR, WORST_ERROR = 0.08, 0.14
# a profile hides two of the points
SLACK = {"photographer": 1.6}


def picture(name: str) -> Image.Image:
    return Image.open(FACES / f"{name}.jpg").convert("RGB")


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).float() / 255


def points(name: str) -> torch.Tensor:
    return torch.tensor(PEOPLE[name])


def errors(face: Face, wanted_52: torch.Tensor) -> torch.Tensor:
    """Of the five keypoints, in shares of the distance from the eyes to the mouth."""
    size = (wanted_52[:2].mean(0) - wanted_52[3:].mean(0)).norm()
    return (torch.tensor(face.keypoints) - wanted_52).norm(dim=1) / size


def check(faces: list[Face], wanted: list[torch.Tensor], slack: float = 1.0) -> None:
    """One face for each of the wanted, in their order, and no other."""
    assert len(faces) == len(wanted)
    for face, wanted_52 in zip(faces, wanted, strict=True):
        error_5 = errors(face, wanted_52)
        assert error_5.mean() < MEAN_ERROR * slack and error_5.max() < WORST_ERROR * slack, error_5


def rotated(name: str, degrees: float, points_K2: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole picture and points of it (its keypoints), turned counterclockwise."""
    image = picture(name)
    turned = image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    about_K2 = (points(name) if points_K2 is None else points_K2) + 0.5 - torch.tensor(image.size) / 2
    turned_K2 = about_K2 @ torch.tensor([[cos, -sin], [sin, cos]]) + torch.tensor(turned.size) / 2 - 0.5
    return tensor(turned), turned_K2


def montage(names: list[str], columns: int, tile_px: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Heads side by side and one below the other, every second one mirrored, and their keypoints from left to right."""
    rows = -(-len(names) // columns)
    canvas, wanted = Image.new("RGB", (columns * tile_px, rows * tile_px), (90, 110, 140)), []
    for index, name in enumerate(names):
        head, head_52 = picture(name), points(name)
        middle_2 = head_52.mean(0)
        half = 1.6 * (head_52[:2].mean(0) - head_52[3:].mean(0)).norm().item()
        left, top = (round(value - half) for value in middle_2.tolist())
        side = round(2 * half)
        head = head.crop((left, top, left + side, top + side)).resize((tile_px, tile_px), Image.Resampling.LANCZOS)
        head_52 = (head_52 + 0.5 - torch.tensor([left, top])) * tile_px / side
        if index % 2:
            head = head.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            head_52 = torch.stack([tile_px - head_52[:, 0], head_52[:, 1]], 1)[[1, 0, 2, 4, 3]]
        corner = (index % columns * tile_px, index // columns * tile_px)
        canvas.paste(head, corner)
        wanted.append(head_52 - 0.5 + torch.tensor(corner))
    return tensor(canvas), wanted


@pytest.fixture(scope="module")
def detector():
    return load_face_detector()


@pytest.mark.parametrize("name", PEOPLE)
def test_keypoints_lie_where_the_eye_sees_them(detector, name):
    check(detector.detect(tensor(picture(name))), [points(name)])


@pytest.mark.parametrize("name", ["collins", "hopper"])
def test_boxes_are_tight_about_the_face(detector, name):
    (face,) = detector.detect(tensor(picture(name)))
    left, top, right, bottom = face.box
    eyes, mouth = points(name)[:2].mean(0), points(name)[3:].mean(0)
    height = (mouth - eyes).norm().item()
    assert 2.0 * height < bottom - top < 3.2 * height and 1.5 * height < right - left < 2.5 * height
    assert left < points(name)[:, 0].min() and points(name)[:, 0].max() < right
    assert top < eyes[1] - 0.6 * height and mouth[1] + 0.3 * height < bottom
    assert 0.99 < face.confidence <= 1


@pytest.mark.parametrize("name", ["collins", "hopper"])
def test_a_mirrored_picture_gives_mirrored_keypoints(detector, name):
    image_HW3 = tensor(picture(name))
    (face,), (mirrored,) = detector.detect(image_HW3), detector.detect(image_HW3.flip(1))
    back_52 = torch.tensor(mirrored.keypoints)[[1, 0, 2, 4, 3]] * torch.tensor([-1.0, 1.0])
    assert errors(face, back_52 + torch.tensor([image_HW3.shape[1] - 1.0, 0.0])).mean() < 0.05


@pytest.mark.parametrize(("name", "degrees"), [
    *((name, degrees) for name in ("collins", "hopper") for degrees in (-45, -30, 30, 45, 90, 135, 180, 270)),
    *(("photographer", degrees) for degrees in (-45, 30, 45, 90, 180, 270)),  # bowed already: not found at -30
])
def test_faces_of_turned_pictures_are_found(detector, name, degrees):
    image_HW3, wanted_52 = rotated(name, degrees)
    check(detector.detect(image_HW3), [wanted_52], SLACK.get(name, 1.0))


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_boxes_turn_with_the_picture(detector, quarters):
    image_HW3 = tensor(picture("hopper"))
    (face,), (turned,) = detector.detect(image_HW3), detector.detect(image_HW3.rot90(quarters, (0, 1)))
    size = [face.box[2] - face.box[0], face.box[3] - face.box[1]]
    found = [turned.box[2] - turned.box[0], turned.box[3] - turned.box[1]]
    assert found == pytest.approx(size[::-1] if quarters % 2 else size, rel=0.08)
    middle = torch.tensor(turned.keypoints).mean(0)
    assert turned.box[0] < middle[0] < turned.box[2] and turned.box[1] < middle[1] < turned.box[3]


@pytest.mark.parametrize("name", PEOPLE)
def test_a_face_of_24_pixels_is_found(detector, name):
    whole = picture(name)
    (face,) = detector.detect(tensor(whole))
    scale = 24 / (face.box[3] - face.box[1])
    small = whole.resize([round(side * scale) for side in whole.size], Image.Resampling.LANCZOS)
    wanted_52 = (points(name) + 0.5) * torch.tensor(small.size) / torch.tensor(whole.size) - 0.5
    check(detector.detect(tensor(small)), [wanted_52], 1.5)


@pytest.mark.parametrize("name", ["collins", "hopper"])
@pytest.mark.parametrize("side", ["forehead", "chin", "left", "right"])
def test_a_face_cut_by_the_edge_is_found(detector, name, side):
    image_HW3 = tensor(picture(name))
    (face,) = detector.detect(image_HW3)
    left, top, right, bottom = face.box
    off_x, off_y = 0.3 * (right - left), 0.3 * (bottom - top)
    rows = slice(round(top + off_y) if side == "forehead" else 0, round(bottom - off_y) if side == "chin" else None)
    columns = slice(round(left + off_x) if side == "left" else 0, round(right - off_x) if side == "right" else None)
    wanted_52 = points(name) - torch.tensor([columns.start, rows.start])
    check(detector.detect(image_HW3[rows, columns]), [wanted_52], 1.5)


def test_a_face_that_fills_the_picture_is_found(detector):
    image_HW3 = tensor(picture("hopper"))
    left, top, right, bottom = (round(edge) for edge in detector.detect(image_HW3)[0].box)
    check(detector.detect(image_HW3[top:bottom, left:right]), [points("hopper") - torch.tensor([left, top])], 1.5)


def test_several_people_come_from_left_to_right(detector):
    image_HW3, wanted = montage(["hopper", "photographer", "collins", "collins", "hopper"], 5, 160)
    check(detector.detect(image_HW3), wanted, 1.5)


def test_64_faces_in_one_picture_are_found(detector):
    image_HW3, wanted = montage(["collins", "hopper", "hopper", "collins"] * 16, 8, 80)
    faces = detector.detect(image_HW3)
    assert len(faces) == 64
    for wanted_52 in wanted:
        assert min(errors(face, wanted_52).mean() for face in faces) < 1.5 * MEAN_ERROR
    middles = [(face.box[0] + face.box[2]) / 2 for face in faces]
    assert middles == sorted(middles)


def bricks() -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    mortar = (y % 24 < 3) | ((x + (y // 24 % 2) * 24) % 48 < 3)
    return torch.where(mortar[..., None], torch.tensor([0.7, 0.7, 0.7]), torch.tensor([0.6, 0.25, 0.2]))


def without_face(name: str) -> torch.Tensor:
    noise = torch.rand(192, 192, 3, generator=torch.Generator().manual_seed(0))
    shades = torch.linspace(0, 1, 200)[:, None, None].expand(200, 150, 3)
    return {"noise": noise, "bricks": bricks(), "shades": shades, "flag": tensor(picture("collins"))[:, :48]}[name]


@pytest.mark.parametrize("name", ["noise", "bricks", "shades", "flag"])
def test_nothing_is_found_where_there_is_no_face(detector, name):
    assert detector.detect(without_face(name)) == []


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 3), (20000, 10), (10, 20000)])
def test_pictures_too_small_or_narrow_for_a_face_hold_none(detector, size):
    assert detector.detect(torch.full((*size, 3), 0.5)) == []


def test_coordinates_of_a_picture_searched_smaller_are_its_own(detector, monkeypatch):
    canvas = Image.new("RGB", (900, 700), (90, 110, 140))
    canvas.paste(picture("hopper"), (520, 300))
    monkeypatch.setattr(face_detection, "_MOST_PIXELS", 400 * 300)
    sizes = []
    with detector.pnet.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0][0, 0].numel())):
        check(detector.detect(tensor(canvas)), [points("hopper") + torch.tensor([520.0, 300.0])], 1.5)
    assert max(sizes) < 400 * 300


def test_the_smallest_face_is_a_limit(detector):
    image_HW3 = tensor(picture("collins"))
    assert len(detector.detect(image_HW3, smallest_face_px=60)) == 1
    assert detector.detect(image_HW3, smallest_face_px=200) == []


def test_detection_is_deterministic(detector):
    image_HW3, _ = montage(["collins", "hopper", "photographer"], 3, 120)
    assert detector.detect(image_HW3) == detector.detect(image_HW3.clone()) == load_face_detector().detect(image_HW3)


def test_pictures_that_are_not_rgb_are_refused(detector):
    for shape in [(8, 8), (8, 8, 4), (1, 8, 8, 3), (0, 8, 3)]:
        with pytest.raises(ImageInputError, match="Give an RGB picture"):
            detector.detect(torch.zeros(shape))


@pytest.mark.parametrize("package", ["mtcnn", "joblib", "lz4"])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(EncoderFileError, match=rf"not installed: {package}\. Run: pip install mtcnn==1\.0\.0"):
        load_face_detector()


class Payload:
    def __reduce__(self):
        return print, ("opened",)


def test_a_changed_weights_file_is_refused_unopened(monkeypatch, tmp_path, capsys):
    folder = face_detection._weights_folder()
    for name in ("pnet", "rnet", "onet"):
        (tmp_path / f"{name}.lz4").write_bytes((folder / f"{name}.lz4").read_bytes())
    monkeypatch.setattr(face_detection, "_weights_folder", lambda: tmp_path)
    assert len(load_face_detector().detect(tensor(picture("collins")))) == 1
    (tmp_path / "rnet.lz4").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(EncoderFileError, match=r"rnet\.lz4 has SHA-256 .*mtcnn==1\.0\.0"):
        load_face_detector()
    assert "opened" not in capsys.readouterr().out


def test_a_missing_weights_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(face_detection, "_weights_folder", lambda: tmp_path)
    with pytest.raises(EncoderFileError, match=r"pnet\.lz4 does not exist.*pip install mtcnn==1\.0\.0"):
        load_face_detector()


def test_loading_does_not_import_the_package():
    load_face_detector()
    assert "mtcnn" not in sys.modules
