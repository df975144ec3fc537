"""What encoders see: open_clip's own preparation, framing, masks, backgrounds, and pictures of any shape."""

import open_clip.transform
import pytest
import torch
from PIL import Image

from emma_core.encoders.families import MEAN, STD
from emma_core.encoders.options import Framing
from emma_core.encoders.pictures import Preparation, crop_note, prepare_pictures
from emma_core.errors import ImageInputError

CLIP = Preparation(224, MEAN, STD)
SMALL = Preparation(32, MEAN, STD)
OPEN_CLIP_MODES = {"center": "shortest", "pad": "longest", "stretch": "squash"}
LEVEL = 1 / 255


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def levels(height: int, width: int) -> torch.Tensor:
    """A picture as a file holds it: bands, a ramp, and noise."""
    ramp_HW = torch.linspace(0, 1, width).expand(height, width)
    bands_HW = (torch.arange(height)[:, None] // 5 % 2).float().expand(height, width)
    return (torch.stack((ramp_HW, bands_HW, noise(height, width)), -1) * 255).round() / 255


def seen(image_HW3, mask_HW=None, preparation=SMALL, **framing) -> torch.Tensor:
    mask = None if mask_HW is None else mask_HW[None]
    return prepare_pictures(image_HW3[None], mask, preparation, Framing(**framing))[0]


@pytest.mark.parametrize("size", [(480, 640), (1001, 333), (224, 224), (60, 100), (1, 1), (301, 1500), (900, 37)])
@pytest.mark.parametrize("frame", OPEN_CLIP_MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preparation_is_open_clips(size, frame, interpolation):
    image_HW3 = levels(*size)
    settings = open_clip.transform.PreprocessCfg(size=224, resize_mode=OPEN_CLIP_MODES[frame], interpolation=interpolation)
    wanted = open_clip.transform.image_transform_v2(settings, is_train=False)(Image.fromarray((image_HW3 * 255).byte().numpy()))
    preparation = Preparation(224, MEAN, STD, interpolation)
    ours = preparation.normalise(seen(image_HW3, preparation=preparation, frame=frame, background="black"))
    assert ours.shape == (3, 224, 224)
    assert ((ours - wanted).abs() * torch.tensor(STD)[:, None, None]).max() <= LEVEL


@pytest.mark.parametrize(("frame", "rows", "columns"), [
    ("center", (8, 24), (0, 16)), ("top", (0, 16), (0, 16)), ("bottom", (16, 32), (0, 16)), ("left", (8, 24), (0, 16)),
])
def test_crop_position_chooses_the_part_of_a_tall_picture(frame, rows, columns):
    image = levels(32, 16)
    got = seen(image, preparation=Preparation(16, MEAN, STD), frame=frame)
    torch.testing.assert_close(got, image[slice(*rows), slice(*columns)].permute(2, 0, 1), rtol=0, atol=LEVEL / 4)


@pytest.mark.parametrize(("frame", "first"), [("left", 0), ("center", 8), ("right", 16), ("top", 8)])
def test_crop_position_chooses_the_part_of_a_wide_picture(frame, first):
    image = levels(16, 32)
    got = seen(image, preparation=Preparation(16, MEAN, STD), frame=frame)
    torch.testing.assert_close(got, image[:, first:first + 16].permute(2, 0, 1), rtol=0, atol=LEVEL / 4)


@pytest.mark.parametrize(("background", "colour"), [
    ("white", (1, 1, 1)), ("black", (0, 0, 0)), ("mean colour", MEAN), ("as trained", MEAN)])
def test_background_fills_what_the_mask_hides_and_what_padding_adds(background, colour):
    mask = torch.zeros(32, 64)
    mask[:, :32] = 1
    got = seen(levels(32, 64), mask, frame="pad", background=background)
    wanted = torch.tensor(colour)[:, None, None]
    for part in (got[:, :8], got[:, 24:], got[:, 8:24, 20:]):
        torch.testing.assert_close(part, wanted.expand_as(part).float(), rtol=0, atol=LEVEL / 2)


def test_soft_mask_blends():
    grey, mask = torch.full((32, 32, 3), 0.2), torch.full((32, 32), 0.25)
    mask[0, 0] = 1
    assert seen(grey, mask, background="white")[0, 9, 9].item() == pytest.approx(0.25 * 0.2 + 0.75, abs=LEVEL / 2)


def test_cropping_to_the_mask_shows_the_object_with_its_margin():
    image, mask = torch.zeros(200, 300, 3), torch.zeros(200, 300)
    image[40:80, 100:180], mask[40:80, 100:180] = 1, 1  # a bar of 40 x 80
    got = seen(image, mask, Preparation(100, MEAN, STD), crop_to_mask=True, margin=0.125, background="black")
    rows, columns = (got[0] > 0.5).nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (30, 69, 10, 89)


def test_object_at_the_edge_keeps_its_margin():
    image, mask = torch.ones(100, 100, 3), torch.zeros(100, 100)
    mask[:40, :40] = 1
    got = seen(image, mask, Preparation(60, MEAN, STD), crop_to_mask=True, margin=0.25, background="black")
    rows, columns = (got[0] > 0.5).nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 49, 10, 49)


def test_soft_specks_do_not_widen_the_crop():
    image, mask = torch.ones(100, 100, 3), torch.zeros(100, 100)
    mask[30:60, 30:60], mask[99, 99] = 1, 0.1
    got = seen(image, mask, Preparation(30, MEAN, STD), crop_to_mask=True, margin=0, background="black")
    torch.testing.assert_close(got, torch.ones(3, 30, 30))


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 20000), (1, 500), (4096, 4096)])
@pytest.mark.parametrize("frame", ["center", "top", "right", "pad", "stretch"])
def test_pictures_of_any_shape_are_prepared(size, frame):
    image = torch.full((*size, 3), 0.5)
    got = seen(image, preparation=CLIP, frame=frame)
    assert got.shape == (3, 224, 224) and got.min() >= 0 and got.max() <= 1
    assert (got - 0.5).abs().median() < 0.1


def test_each_picture_has_its_own_mask_or_shares_one():
    images, masks = noise(3, 32, 32, 3), (noise(3, 32, 32, seed=1) > 0.5).float()
    together = prepare_pictures(images, masks, SMALL, Framing())
    alone = [prepare_pictures(images[index:index + 1], masks[index:index + 1], SMALL, Framing()) for index in range(3)]
    assert torch.equal(together, torch.cat(alone))
    shared = prepare_pictures(images, masks[:1], SMALL, Framing())
    assert torch.equal(shared, prepare_pictures(images, masks[:1].expand(3, -1, -1), SMALL, Framing()))
    assert not torch.equal(shared[1], together[1])


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (64, 64, 3), (0, 64, 64, 3), (1, 64, 64, 4)])
def test_pictures_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ImageInputError, match=r"wanted \(pictures, height, width, 3\)"):
        prepare_pictures(torch.zeros(shape), None, SMALL, Framing())


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 64, 64), (64, 64)])
def test_masks_of_another_number_or_size_are_refused(shape):
    with pytest.raises(ImageInputError, match="Resize the mask"):
        prepare_pictures(torch.zeros(3, 64, 64, 3), torch.zeros(shape), SMALL, Framing())


def test_nothing_to_crop_to_is_refused():
    with pytest.raises(ImageInputError, match="all black; white marks the object"):
        seen(noise(32, 32, 3), torch.zeros(32, 32), crop_to_mask=True)


@pytest.mark.parametrize(("settings", "found"), [
    ({"frame": "middle"}, "frame 'middle' is not known; choose one of as trained, center"),
    ({"background": "green"}, "background 'green' is not known"),
    ({"margin": -0.1}, "a margin of -0.1 around the mask; wanted 0 to 4"), ({"margin": float("nan")}, "a margin of nan"),
])
def test_unknown_framing_is_refused(settings, found):
    with pytest.raises(ImageInputError, match=found):
        Framing(**settings)


def test_a_note_tells_how_little_of_a_long_picture_is_seen():
    assert crop_note(400, 1200, CLIP, Framing()) == (
        "cropped: of 1200 x 400 the encoder sees 400 x 400, 33% of the picture. Choose another frame (pad shows all of it), or "
        "crop the picture.")
    assert "of 100 x 250 " in crop_note(250, 100, CLIP, Framing("top"))


@pytest.mark.parametrize(("size", "preparation", "frame"), [
    ((480, 640), CLIP, "as trained"), ((1080, 1920), CLIP, "center"), ((400, 1200), CLIP, "pad"),
    ((400, 1200), CLIP, "stretch"), ((400, 1200), Preparation(64, MEAN, STD, frame="pad"), "as trained"),
])
def test_pictures_of_usual_shapes_and_whole_ones_have_no_note(size, preparation, frame):
    assert crop_note(*size, preparation, Framing(frame)) is None
