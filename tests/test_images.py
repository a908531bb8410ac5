"""Decoding: Pillow's pixels equal dlib's, and a broken photo harms nobody."""

import functools
import random
import struct
import tempfile
import zlib

import numpy as np
import pytest
import shared
from PIL import Image
from shared import SMALL, encoded, module, picture, refused, scaled

FRAME = (370, 140, 620, 400)  # of the face in obama.jpg


one_decoder = functools.cache(lambda: module.Decoder(1))


def pixels(content, decoder=None, memory=1 << 30):
    """Decode an image as the service does."""
    decoder = decoder or one_decoder()
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        limits = {"memory": memory, "pixels": 1 << 30, "border": 0}
        return decoder.decode(file, region=None, **limits)[0]


def tiny(mode="RGB"):
    return scaled(picture(), 0.02).convert(mode)


def test_transparency_as_dlib_blends_it():
    """White of each alpha, onto black; the values are stock dlib's."""
    alphas = np.array([[0, 1, 2, 127, 128, 254, 255]], np.uint8)
    rgba = Image.new("RGBA", (alphas.size, 1), "white")
    rgba.putalpha(Image.fromarray(alphas))
    blended = [0, 0, 1, 126, 127, 253, 255]
    assert pixels(encoded(rgba, "PNG"))[0, :, 1].tolist() == blended


@pytest.mark.parametrize(
    "format, mode, seen",
    [
        *(("PNG", "RGBA", 0), ("PNG", "RGB", 0), ("PNG", "P", 0), ("PNG", "LA", 204)),
        *(("PNG", "L", 204), ("WEBP", "RGBA", 204), ("GIF", "P", 204)),
    ],
)
def test_what_is_transparent_is_black_only_where_dlib_heeds_it(format, mode, seen):
    """In colours and palettes of PNG; elsewhere it drops alpha."""
    image, options = Image.new("RGBA", (64, 64), "white"), {}
    image.paste((204, 204, 204, 0), (0, 0, 32, 64))
    if mode in ("L", "RGB", "P"):  # one colour is declared transparent
        image = image.convert("RGB").convert(mode)
        options["transparency"] = image.getpixel((0, 0))
    content = encoded(image.convert(mode), format, exact=True, lossless=True, **options)
    decoded = pixels(content)
    assert (decoded[:, :32] == seen).all() and (decoded[:, 32:] == 255).all()


@pytest.mark.parametrize(
    "mode, format",
    [
        *(("L", "JPEG"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF")),
        *(("CMYK", "JPEG"), ("RGB", "WEBP"), ("RGB", "BMP"), ("RGB", "MPO")),
    ],
)
def test_modes_and_formats(mode, format):
    image = scaled(picture(), 0.05).convert(mode)
    seen = pixels(encoded(image, format)).astype(int)
    assert seen.shape == (image.height, image.width, 3)
    assert np.abs(seen - np.asarray(image.convert("RGB"))).mean() < 5


def test_16_bit_grey_is_scaled_and_not_cut_off():
    """Stock dlib takes the wrong byte."""
    grey = np.asarray(tiny("L")).astype(np.uint16)
    seen = pixels(encoded(Image.fromarray(grey * 256 + 255 - grey), "PNG"))
    assert np.array_equal(seen, grey[..., np.newaxis].repeat(3, 2))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "MPO"])
def test_the_first_frame_of_several(format):
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue")]
    seen = pixels(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
    assert seen.shape == (40, 60, 3)
    assert abs(seen[20, 30].astype(int) - (255, 0, 0)).max() < 5


def chunk(kind, data, wrong=0):
    checksum = zlib.crc32(kind + data) ^ wrong
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png_of(side):
    """A black and white PNG of side x side pixels that has only the first of them."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", LONG) + chunk(b"IEND", b"")


def segment(kind, data):
    return bytes([0xFF, kind]) + struct.pack(">H", len(data) + 2) + data


LONG = zlib.compress(bytes(70_000_000))
JFIF, ADOBE, EXIF = b"JFIF\0\1\1\0\0\1\0\1\0\0", b"Adobe\0d\0\0\0\0\1", b"Exif\0\0MM"


@pytest.mark.parametrize(
    "part",
    [
        *(chunk(kind, b"a\0b", wrong=1) for kind in (b"tEXt", b"eXIf", b"iCCP")),
        *(chunk(kind, b"") for kind in (b"gAMA", b"pHYs", b"cHRM", b"sRGB", b"tRNS")),
        *(chunk(kind, b"x") for kind in (b"gAMA", b"pHYs", b"cHRM", b"fcTL", b"acTL")),
        chunk(b"zTXt", b"a\0\0" + LONG),
        chunk(b"iTXt", b"a\0\1\0\0\0" + LONG),
        chunk(b"tRNS", bytes(6), wrong=1),
        chunk(b"iCCP", b"a\0\1")[:-4] + bytes(4),
        *(segment(0xE0, JFIF[:length]) for length in (0, 4, 5, 8, 13)),
        *(segment(0xEE, ADOBE[:length]) for length in (0, 4, 5, 6, 11)),
        *(segment(0xE1, EXIF[:length]) for length in (0, 5, 8)),
        segment(0xFE, b"") * 1000,
    ],
    ids=lambda part: repr(part[:20]),
)
def test_damaged_side_data_is_no_error(part):
    """Stock dlib reads each of these files, and no pixel depends on what is damaged."""
    if part[0] == 0xFF:
        whole = encoded(tiny(), quality=90)
        # In the place of its JFIF segment, and after that.
        sent = [start + part + whole[20:] for start in (whole[:2], whole[:20])]
    else:
        whole = encoded(tiny(), "PNG")
        sent = [whole[:place] + part + whole[place:] for place in (33, -12)]
    for content in sent:
        assert np.array_equal(pixels(content), pixels(whole))


def test_a_damaged_png_tells_what_is_wrong(app):
    whole = encoded(tiny(), "PNG")
    for end in (len(whole) // 2, -12, -1):
        refused(app.detect(whole[:end]), 400, "cut short")
    damaged = bytearray(whole)
    damaged[whole.index(b"IDAT") + 50] ^= 1
    refused(app.detect(bytes(damaged)), 400, "chunk IDAT is damaged")


def test_arithmetic_coding_is_read():
    """Huffman's codes taken for such give a picture of something, but no error."""
    whole = encoded(scaled(picture(), 2), quality=95)
    assert len(whole) > 200_000  # more than Pillow reads at a time
    assert pixels(whole.replace(b"\xff\xc0", b"\xff\xc9")).shape == pixels(whole).shape


@pytest.mark.parametrize(
    "markers", [b"", b"\xff\xd9", b"\xff\xd8\xff\xe1", b"\xff\xda"]
)
def test_a_motion_photo(app, markers):
    """A JPEG with seven megabytes of video after its end, with markers or without."""
    video = b"\0\0\0\x18ftypmp42" + random.Random(1).randbytes(7_000_000)
    video = video.replace(b"\xff", b"\xfe") + markers * 100
    status, answer = app.detect(shared.photo("obama.jpg") + video)
    assert (status, answer["faces-count"]) == (200, 1)
    assert shared.overlap(shared.box(answer["faces"][0]), FRAME) > 0.5


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("part", [0.5, 0.7, 0.99])
def test_a_jpeg_cut_short_is_decoded_as_far_as_it_goes(app, progressive, part):
    """Its rest is grey, or coarse; cut after 0xFF, too, as if in a marker."""
    whole = encoded(picture(), quality=90, progressive=progressive)
    cut = int(len(whole) * part)
    for content in (whole[:cut], whole[: whole.index(b"\xff", cut) + 1]):
        status, answer = app.detect(content)
        assert (status, answer["faces-count"]) == (200, 1)
        face = answer["faces"][0]
        assert shared.overlap(shared.box(face), FRAME) > 0.5
        assert app.compute(content, face)[1]["face"] == face


def test_where_a_jpeg_is_cut_decides_only_how_much_is_seen():
    whole = encoded(tiny(), quality=90)
    start = whole.index(b"\xff\xda") + 20
    seen = [pixels(whole[:cut]) for cut in range(start, len(whole), 97)]
    differences = [np.abs(one.astype(int) - pixels(whole)).mean() for one in seen]
    assert differences == sorted(differences, reverse=True) and differences[-1] < 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_400_if_nothing_can_be_decoded(app, format):
    whole = shared.resized(0.1, format=format)
    assert app.detect(whole)[0] == 200
    for end in (16, 20, 100) if format == "JPEG" else (16, 20, 50, len(whole) // 2):
        refused(app.detect(whole[:end]), 400, "decoded")
    refused(app.detect(b""), 400, "empty")


@pytest.mark.parametrize(
    "content",
    [
        *(b"hello", b"x", bytes(5000), b"%!PS-Adobe-3.0 EPSF-3.0\n"),
        b"RIFF\x24\0\0\0WAVEfmt " + bytes(28),
        *("TIFF", "AVIF", "PDF", "ICO", "PPM"),
    ],
)
def test_415_for_other_files(app, content):
    content = content if isinstance(content, bytes) else encoded(tiny(), content)
    refused(app.detect(content), 415, "WEBP")
    refused(app.compute(content, '{"left":1,"top":1,"right":9,"bottom":9}'), 415)


def damaged(content, chance):
    """Return the file with some bytes flipped, zeroed, set or left out, or its start."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 3, 20))):
        near = chance.choice((40, 700, 10**7))
        i, what = chance.randrange(min(near, len(content) + 1)), chance.randrange(4)
        if what == 0 and content[i:]:
            content[i] ^= 1 << chance.randrange(8)
        elif what == 1:
            content[i : i + 4] = chance.choice((b"\0", b"\xff", b"\x7f")) * 4
        elif what == 2:
            del content[i : i + chance.randrange(1, 50)]
        else:
            del content[i:]
    return bytes(content)


@pytest.mark.parametrize("seed", range(6))
def test_broken_images_are_the_clients_errors(app, seed):
    """Some of them are above half a megabyte, and so read from a file."""
    chance, image = random.Random(seed), tiny()
    noise = Image.merge("RGB", [Image.effect_noise((540, 400), 90) for _ in range(3)])
    two = {"save_all": True, "append_images": [image]}
    whole = [encoded(image, format) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP")]
    whole += [encoded(image, format, **two) for format in ("MPO", "WEBP")]
    whole += [encoded(image.convert(mode), "PNG") for mode in ("P", "RGBA")]
    whole += [encoded(image.convert("CMYK")), encoded(image, progressive=True)]
    whole += [encoded(noise, "PNG"), encoded(noise, "WEBP", lossless=True)]
    for _ in range(60):
        content = damaged(chance.choice(whole), chance)
        status, answer = app.detect(content)
        assert status in (200, 400, 412, 415), (answer, content[:100])
    assert app.detect(SMALL)[1]["faces-count"] == 1
