"""Pictures as plain RGB, and the sizes that they are trained at."""

import random

import numpy as np
import pytest
from PIL import Image

from emma_core.errors import TrainingConfigError
from emma_core.files.picture_file import open_mask, open_picture, picture_size
from emma_core.training.buckets import bucket_of, buckets, enlargement, fit, random_crop
from emma_core.training.config import DataConfig


@pytest.mark.parametrize(("resolution", "step", "longest"), [(512, 64, 2.0), (768, 64, 3.0), (64, 64, 2.0), (128, 8, 1.5)])
def test_buckets_keep_area_step_and_longest_shape(resolution, step, longest):
    found = buckets(DataConfig(resolution_px=resolution, bucket_step_px=step, longest_shape=longest))
    assert (resolution, resolution) in found and len(set(found)) == len(found)
    for width, height in found:
        assert width % step == height % step == 0 and max(width, height) / min(width, height) <= longest
        assert 0.75 <= width * height / resolution**2 <= 4 / 3 and (height, width) in found


def test_sd_buckets_at_512():
    assert buckets(DataConfig()) == ((384, 704), (448, 576), (512, 512), (576, 448), (704, 384))


def test_a_resolution_off_the_step_is_refused():
    with pytest.raises(TrainingConfigError, match="= 500 is no multiple of data.bucket_step_px = 64; choose 512"):
        buckets(DataConfig(resolution_px=500))


@pytest.mark.parametrize(("size", "bucket"), [
    ((512, 512), (512, 512)), ((100, 100), (512, 512)), ((3000, 2000), (576, 448)), ((400, 800), (384, 704)),
    ((100, 5000), (384, 704)), ((576, 448), (576, 448)),
])
def test_a_picture_goes_to_the_nearest_shape(size, bucket):
    assert bucket_of(*size, DataConfig()) == bucket


def test_fit_covers_and_cuts_around_the_centre():
    levels = np.zeros((40, 120, 3), np.uint8)
    levels[:, 40:80] = 255
    fitted = fit(Image.fromarray(levels), (20, 20))
    assert fitted.size == (20, 20) and np.asarray(fitted)[:, 1:-1].min() >= 250
    assert enlargement(120, 40, (20, 20)) == 0.5 and enlargement(10, 40, (20, 20)) == 2
    assert fit(Image.new("L", (30, 10), 255), (64, 64)).getextrema() == (255, 255)


def test_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (30, 10), "red")
    picture.paste("blue", (0, 0, 15, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left edge is shown at the top
    picture.save(tmp_path / "a.png", exif=exif)
    shown = open_picture(tmp_path / "a.png")
    assert shown.size == picture_size(tmp_path / "a.png") == (10, 30)
    assert shown.getpixel((5, 2)) == (0, 0, 255) and shown.getpixel((5, 28)) == (255, 0, 0)


def test_transparency_becomes_white_in_pictures_and_black_in_masks(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert open_picture(tmp_path / "half.png").getpixel((0, 0)) == pytest.approx((255, 127, 127), abs=1)
    nearly = Image.new("LA", (4, 4), (40, 0))
    nearly.putpixel((3, 3), (40, 255))
    nearly.save(tmp_path / "none.png")
    assert open_picture(tmp_path / "none.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_mask(tmp_path / "none.png").getpixel((0, 0)) == 0
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert open_picture(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)


def test_grey_cmyk_and_16_bits_become_rgb(tmp_path):
    Image.new("L", (4, 4), 90).save(tmp_path / "grey.png")
    assert open_picture(tmp_path / "grey.png").getpixel((0, 0)) == (90, 90, 90)
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert open_picture(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
    assert open_mask(tmp_path / "deep.png").getpixel((0, 0)) == 128
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "print.jpg")
    shown = open_picture(tmp_path / "print.jpg")
    assert shown.mode == "RGB" and shown.getpixel((8, 8))[0] < 20


def test_crops_keep_area_shape_and_borders():
    chance = random.Random(0)
    boxes = [random_crop(400, 200, chance) for _ in range(300)]
    areas = [(right - left) * (bottom - top) / 80_000 for left, top, right, bottom in boxes]
    shapes = [(right - left) / (bottom - top) / 2 for left, top, right, bottom in boxes]
    assert 0.49 <= min(areas) < 0.55 and 0.95 < max(areas) <= 1 and 0.74 <= min(shapes) < 0.8 and 1.25 < max(shapes) <= 1.35
    assert all(0 <= left < right <= 400 and 0 <= top < bottom <= 200 for left, top, right, bottom in boxes)
    assert random_crop(1, 1, chance) == (0, 0, 1, 1)


def test_crops_show_half_of_a_masked_object_at_least():
    mask_HW = np.zeros((100, 100))
    mask_HW[:20, :20] = 255
    boxes = [random_crop(100, 100, random.Random(seed), mask_HW) for seed in range(60)]
    assert all(mask_HW[top:bottom, left:right].sum() >= mask_HW.sum() / 2 for left, top, right, bottom in boxes)
    assert len(set(boxes)) > 30
    without = [random_crop(100, 100, random.Random(seed)) for seed in range(60)]
    assert any(mask_HW[top:bottom, left:right].sum() < mask_HW.sum() / 2 for left, top, right, bottom in without)
