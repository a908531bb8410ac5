"""Decoding: Pillow's pixels equal dlib's, in all formats and modes."""

import errno
import io
from pathlib import Path

import dlib
import numpy as np
import pytest
from PIL import Image
from shared import PHOTOS, encoded, module, picture, scaled


def pixels(content):
    image = module.open_photo(io.BytesIO(content))
    return module.decode(image, (0, 0, *image.size))


def small():
    return scaled(picture("obama.jpg"), 0.05)


# Without what make try has drawn.
ORIGINALS = sorted(set(PHOTOS.glob("*.*g")) - set(PHOTOS.glob("*.faces.jpg")))


@pytest.mark.parametrize("file", ORIGINALS, ids=lambda file: file.name)
def test_the_same_as_dlib_loads(file):
    expected = dlib.load_rgb_image(str(file)).astype(int)
    difference = np.abs(pixels(file.read_bytes()) - expected)
    if (
        file.suffix == ".jpg"
        and "/libjpeg.so" not in Path("/proc/self/maps").read_text()
    ):
        # dlib was built without the system's libjpeg: its own, of 1998, rounds otherwise.
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-4
    else:
        assert not difference.any()


def test_transparency_as_dlib_blends_it(tmp_path):
    rgba = small().convert("RGBA")
    ramp = Image.linear_gradient("L").resize(rgba.size)
    rgba.putalpha(ramp)
    rgba.save(tmp_path / "a.png")
    assert np.array_equal(
        pixels((tmp_path / "a.png").read_bytes()),
        dlib.load_rgb_image(str(tmp_path / "a.png")),
    )


@pytest.mark.parametrize("mode", ["LA", "PA", "P", "1", "L", "RGB", "RGBA"])
def test_what_is_transparent_is_black(mode):
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    image.paste((255, 255, 255, 0), (0, 0, 32, 64))
    if mode == "P":
        sent = encoded(image.quantize(4), "PNG")
    elif mode in ("1", "L", "RGB"):  # one colour is declared transparent
        image = Image.new(mode, (64, 64), "white")
        image.paste("black", (0, 0, 32, 64))
        white = 255 if mode != "RGB" else (255, 255, 255)
        seen = pixels(encoded(image, "PNG", transparency=white))
        assert not seen.any()
        return
    else:
        sent = encoded(image.convert(mode), "TIFF" if mode == "PA" else "PNG")
    seen = pixels(sent)
    assert (seen[:, 32:] == 255).all()
    assert mode == "PA" or not seen[:, :32].any()  # TIFF keeps no transparent palette


@pytest.mark.parametrize(
    "mode, format",
    [("L", "JPEG"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF")],
)
def test_grey_and_palette(mode, format):
    image = small().convert(mode)
    seen = pixels(encoded(image, format))
    assert seen.shape == (image.height, image.width, 3) and seen.dtype == np.uint8
    assert np.abs(seen.astype(int) - np.asarray(image.convert("RGB"))).mean() < 3


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_cut_off(format):
    grey = np.asarray(small().convert("L")).astype(np.uint16)
    seen = pixels(encoded(Image.fromarray(grey * 257), format))
    assert np.array_equal(seen[..., 0], grey)
    assert np.array_equal(seen[..., 0], seen[..., 2])


@pytest.mark.parametrize("factor", [np.int32(700), np.float32(7 / 3)])
def test_greys_without_a_white_are_stretched(factor):
    grey = np.asarray(small().convert("L"))
    seen = pixels(encoded(Image.fromarray(grey.astype(factor.dtype) * factor), "TIFF"))
    stretched = (grey.astype(float) - grey.min()) * 255 / (grey.max() - grey.min())
    assert np.abs(seen[..., 1] - stretched).max() <= 1


def test_cmyk():
    image = small()
    seen = pixels(encoded(image.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(seen.astype(int) - np.asarray(image)).mean() < 4


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several(format):
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue")]
    seen = pixels(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
    assert seen.shape == (40, 60, 3)
    assert abs(seen[20, 30].astype(int) - (255, 0, 0)).max() < 5


@pytest.mark.parametrize("format", ["WEBP", "AVIF", "BMP", "TIFF"])
def test_other_formats(format):
    image = small()
    seen = pixels(encoded(image, format)).astype(int)
    assert np.abs(seen - np.asarray(image)).mean() < 5


def test_a_region_is_cut_out_of_the_whole():
    for mode, format in (("RGB", "JPEG"), ("RGBA", "PNG"), ("F", "TIFF")):
        content = encoded(small().convert(mode), format)
        image = module.open_photo(io.BytesIO(content))
        region = module.decode(image, (20, 10, 90, 101))
        assert np.array_equal(region, pixels(content)[10:101, 20:90])


def test_failing_memory_or_disk_is_no_client_error():
    for number in (errno.ENOMEM, errno.ENOSPC, errno.EIO):
        with pytest.raises(OSError), module._refusals():
            raise OSError(number, "refused")
