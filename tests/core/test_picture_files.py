"""Picture files of strangers: what can be read is read, in bounded memory, and nothing else is started or unfolded."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from emma_core.encoders.options import Framing
from emma_core.encoders.pictures import Preparation, prepare_pictures
from emma_core.errors import EmmaWarning, ImageInputError
from emma_core.files.picture_file import open_mask, open_picture, picture_size
from emma_core.training.buckets import look_at

ROOT = Path(__file__).resolve().parents[2]


def png(width: int, height: int, depth: int, colour: int, row: bytes | None = None) -> bytes:
    """A PNG file of one row again and again; of zeros it is a thousand times smaller than its picture."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    channels = {0: 1, 2: 3, 6: 4}[colour]
    row = row or bytes(width * channels * depth // 8)
    packer = zlib.compressobj(1)
    packed = b"".join([packer.compress(b"\0" + row) for _ in range(height)]) + packer.flush()
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
            + chunk(b"IDAT", packed) + chunk(b"IEND", b""))


MEASURE = """
import sys
from pathlib import Path
from PIL import Image
from emma_core.files import picture_file

def peak(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1000

Image.init()
for path in sys.argv[1:]:
    for read in (picture_file.open_picture, picture_file.open_mask, picture_file.picture_size):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        before = peak("VmRSS")
        try:
            read(Path(path))
        except Exception:
            pass
        print(peak("VmHWM") - before)
"""


def megabytes_to_read(*paths: Path) -> list[float]:
    """What reading each as a picture, as a mask, and its size takes beyond what the process had, in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks of memory can be counted anew on Linux alone")
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_of_a_huge_picture_takes_little_memory(tmp_path):
    kinds = {"huge grey": (13_000, 16, 0), "huge RGB": (13_000, 8, 2), "RGBA": (5_000, 8, 6), "grey": (5_000, 16, 0)}
    paths = [tmp_path / f"{kind}.png" for kind in kinds]
    for path, (side, depth, colour) in zip(paths, kinds.values(), strict=True):
        path.write_bytes(png(side, side, depth, colour))
        assert path.stat().st_size < 5_000_000
    most = [3 * path.stat().st_size / 1e6 + 200 for path in paths for _ in range(3)]
    found = megabytes_to_read(*paths)
    assert all(one <= bound for one, bound in zip(found, most, strict=True)), found
    with pytest.raises(ImageInputError, match=r"is 13000 x 13000 px, which takes \d+ MB to read, .*25 megapixels at most"):
        open_picture(paths[0])
    assert "13000 x 13000 px" in look_at(paths[0]).fault
    assert open_picture(paths[3]).size == (5000, 5000)


def test_a_large_photograph_is_read_at_half_its_size_where_all_of_it_does_not_fit(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8000, 6000), (200, 100, 50)).save(tmp_path / "a.jpg", exif=exif)
    assert (tmp_path / "a.jpg").stat().st_size < 2_000_000
    assert picture_size(tmp_path / "a.jpg") in ((6000, 8000), (3000, 4000))
    found = open_picture(tmp_path / "a.jpg")
    assert found.size == (3000, 4000) and found.getpixel((5, 5)) == pytest.approx((200, 100, 50), abs=3)
    assert max(megabytes_to_read(tmp_path / "a.jpg")) < 210


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp"])
def test_a_postscript_file_under_another_name_starts_nothing(tmp_path, monkeypatch, name):
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *words, **more: started.append(words))
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *words, **more: started.append(words))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.eps")
    content = (tmp_path / "a.eps").read_bytes()
    (tmp_path / name).write_bytes(content)
    assert look_at(tmp_path / name).fault == "is no picture that can be read; save it as PNG or JPEG"
    for read in (open_picture, open_mask, picture_size):
        with pytest.raises(Image.UnidentifiedImageError):
            read(tmp_path / name)
    assert not started


def large_profile() -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile + np.random.default_rng(0).bytes(3 << 20)


def texts(kind: str) -> PngInfo:
    info = PngInfo()
    if kind == "a workflow":
        info.add_text("workflow", "{" + "x" * (3 << 20) + "}")
    elif kind == "a packed workflow":
        info.add_text("workflow", "x" * (80 << 20), zip=True)
    elif kind == "international":
        info.add_itxt("prompt", "字" * (1 << 20), zip=True)
    elif kind == "many":
        for number in range(70):
            info.add_text(f"t{number}", "y" * (1 << 20), zip=True)
    return info


@pytest.mark.parametrize("kind", ["a workflow", "a packed workflow", "international", "many", "a colour profile"])
def test_large_texts_and_profiles_do_not_keep_a_picture_from_being_read(tmp_path, kind):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    profile = large_profile() if kind == "a colour profile" else None
    picture.save(tmp_path / "a.png", pnginfo=texts(kind), icc_profile=profile)
    found = look_at(tmp_path / "a.png")
    assert (found.fault, found.size) == ("", (30, 40))
    assert np.array_equal(np.asarray(open_picture(tmp_path / "a.png")), np.asarray(picture))
    assert picture_size(tmp_path / "a.png") == (30, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_the_orientation_is_kept_without_the_texts(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("RGB", (24, 16))
    picture.paste("red", (0, 0, 12, 8))
    picture.save(tmp_path / f"a.{ending}", exif=exif, quality=95)
    with Image.open(tmp_path / f"a.{ending}") as opened:
        wanted = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert np.array_equal(np.asarray(open_picture(tmp_path / f"a.{ending}")), wanted)
    assert picture_size(tmp_path / f"a.{ending}") == wanted.shape[1::-1]


def test_a_damaged_text_does_not_hide_damage_of_the_picture(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png", pnginfo=texts("a workflow"))
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[content.index(b"IDAT") + 6] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    assert look_at(tmp_path / "a.png").fault.startswith("cannot be decoded")


def test_transparency_is_blended_as_whole_pictures_are(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (700, 20, 4), dtype=np.uint8)
    picture = Image.fromarray(levels, "RGBA")
    picture.save(tmp_path / "a.png")
    for behind, mode, read in (("white", "RGB", open_picture), ("black", "L", open_mask)):
        sheet = Image.new("RGBA", picture.size, behind)
        sheet.alpha_composite(picture)
        assert np.array_equal(np.asarray(read(tmp_path / "a.png")), np.asarray(sheet.convert(mode)))
    quarters = picture.quantize(4)
    quarters.save(tmp_path / "p.png", transparency=2)
    whole = Image.new("RGBA", picture.size, "white")
    with Image.open(tmp_path / "p.png") as opened:
        whole.alpha_composite(opened.convert("RGBA"))
    assert np.array_equal(np.asarray(open_picture(tmp_path / "p.png")), np.asarray(whole.convert("RGB")))


@pytest.mark.parametrize(("levels", "wanted"), [((0, 1), (0, 255)), ((0, 38), (0, 255)), ((0, 100), (0, 255)),
                                                ((0, 255), (0, 255)), ((0, 200), (0, 200)), ((1, 2), (128, 255))])
def test_masks_of_other_levels_are_stretched(tmp_path, levels, wanted):
    mask = Image.new("L", (10, 10), levels[0])
    mask.paste(levels[1], (0, 0, 5, 5))
    mask.save(tmp_path / "a.png")
    found = open_mask(tmp_path / "a.png")
    assert (found.getpixel((9, 9)), found.getpixel((0, 0))) == wanted


def test_what_leaves_nothing_to_see_is_refused(tmp_path):
    Image.new("L", (10, 10), 0).save(tmp_path / "black.png")
    assert "is all black" in look_at(tmp_path / "black.png", is_mask=True).fault
    assert look_at(tmp_path / "black.png").fault == "", "a black picture is a picture"
    for mode, colour in (("RGBA", (255, 0, 0, 0)), ("LA", (9, 0))):
        Image.new(mode, (10, 10), colour).save(tmp_path / "clear.png")
        assert "is transparent everywhere" in look_at(tmp_path / "clear.png").fault


def test_a_mask_that_leaves_the_encoder_nothing_is_refused():
    preparation, picture = Preparation(32, (0.5,) * 3, (0.5,) * 3), torch.rand(1, 64, 200, 3)
    edge = torch.zeros(1, 64, 200)
    edge[:, :, :20] = 1
    with pytest.raises(ImageInputError, match=r"the mask leaves 0.000% of what the encoder sees; white marks .* another frame"):
        prepare_pictures(picture, edge, preparation, Framing())
    for framing in (Framing(frame="left"), Framing(frame="pad"), Framing(crop_to_mask=True)):
        assert prepare_pictures(picture, edge, preparation, framing).shape == (1, 3, 32, 32)
    with pytest.raises(ImageInputError, match="leaves 0.000%"):
        prepare_pictures(picture, torch.zeros(1, 64, 200), preparation, Framing())


def test_a_faint_mask_is_stretched_and_said():
    preparation, picture = Preparation(32, (0.5,) * 3, (0.5,) * 3), torch.rand(1, 64, 64, 3)
    mask = torch.zeros(1, 64, 64)
    mask[:, 8:40, 8:40] = 1
    wanted = prepare_pictures(picture, mask, preparation, Framing())
    with pytest.warns(EmmaWarning, match=r"brightest value is 0.00392 instead of 1 is stretched"):
        assert torch.equal(prepare_pictures(picture, mask / 255, preparation, Framing()), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not torch.equal(prepare_pictures(picture, mask * 0.6, preparation, Framing()), wanted), "soft masks stay soft"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in folders")
def test_pipes_and_devices_are_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", Path("/dev/zero")):
        assert look_at(path).fault == "is no plain file; check the name"
        with pytest.raises(ImageInputError, match="is a (named pipe|device)"):
            open_picture(path)


def test_bytes_are_read_as_files_are():
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), "blue").save(stream, "PNG")
    assert open_picture(stream).getpixel((0, 0)) == (0, 0, 255)
