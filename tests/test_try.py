"""make try: its output and its drawings."""

import importlib
import os
import subprocess
import sys

import pytest
from PIL import Image
from shared import KEY, ROOT, encoded, free_port, photo, picture
from test_nextcloud import AREAS, SIZES, as_the_app_scales

os.environ.setdefault("API_KEY", KEY)
sys.path.insert(0, str(ROOT / "tests/tools"))
scaling = importlib.import_module("try")


def run(folder, *photos, port, key=KEY):
    """Return the exit status and the output of tests/tools/try.py for photos in the folder."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/tools/try.py", *photos],
        cwd=folder,
        env={**os.environ, "PORT": str(port), "API_KEY": key, "HOST": "127.0.0.1"},
        check=False,
        capture_output=True,
        text=True,
    )
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.fixture
def folder(tmp_path):
    for name in ("obama.jpg", "obama2.jpg", "biden.jpg"):
        (tmp_path / name).write_bytes(photo(name))
    return tmp_path


def test_who_is_who(service, folder):
    status, said = run(
        folder, "obama.jpg", "obama2.jpg", "biden.jpg", port=service.port
    )
    assert status == 0 and len(said) == 12
    size = scaling.as_the_app_scales(picture("obama.jpg").size, 4_320_000)
    assert said[:2] == [
        f"obama.jpg goes upright, in {size[0]} x {size[1]} pixels",
        "obama.jpg: 1 face, drawn in obama.faces.jpg",
    ]
    sent = encoded(picture("obama.jpg").resize(size), quality=95)
    (face,) = service.detect(sent)[1]["faces"]
    assert f"confidence {face['detection_confidence']:.2f}" in said[2]
    assert f"at {face['left']}, {face['top']}" in said[2]
    assert [line.split(", ")[-1] for line in said[9:]] == [
        "the same person",
        "different people",
        "different people",
    ]
    drawn = Image.open(folder / "obama.faces.jpg")
    red, green, blue = drawn.getpixel((face["right"] - 3, face["bottom"] - 20))
    assert drawn.size == size
    assert green > 200 and red + blue < 100  # the box


def test_it_scales_as_the_app_does():
    """Up and down, with rounded sides."""
    for area in AREAS:
        for size in SIZES:
            expected = as_the_app_scales(*size, area)
            assert scaling.as_the_app_scales(size, area) == expected
    assert scaling.as_the_app_scales((4032, 3024), 8294400) == (3326, 2494)


def test_a_phones_photo_goes_as_the_app_sends_it(service, folder, monkeypatch):
    """12 megapixels, rotated by EXIF."""
    monkeypatch.setenv("AREA", "99999999")
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees, clockwise"
    upright = picture("obama.jpg").resize((3024, 4032))
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    (folder / "phone.jpg").write_bytes(encoded(lying, exif=exif))
    status, said = run(folder, "phone.jpg", port=service.port)
    assert status == 0 and said[0] == "phone.jpg goes upright, in 2494 x 3326 pixels"
    assert said[1].startswith("phone.jpg: 1 face,")
    assert Image.open(folder / "phone.faces.jpg").size == (2494, 3326)


def test_a_service_is_started_if_there_is_none(folder):
    port = free_port()
    status, said = run(folder, "obama.jpg", port=port)
    assert status == 0
    assert said[0] == f"No service answers at http://127.0.0.1:{port}: starting one"
    assert any(line.startswith("obama.jpg: 1 face,") for line in said)


def test_errors_are_one_line(service, folder):
    (folder / "a.txt").write_text("no photo")
    (folder / "cut.jpg").write_bytes(photo("obama.jpg")[:9000])
    for photos, key, words in (
        ([], KEY, "make try PHOTO=family.jpg"),
        (["none.jpg"], KEY, "There is no none.jpg"),
        (["a.txt"], KEY, "a.txt"),
        (["cut.jpg"], KEY, "cut.jpg"),
        (["obama.jpg"], "wrong", "401, The API key"),
    ):
        status, said = run(folder, *photos, port=service.port, key=key)
        assert status == 1 and len(said) == 1 and words in said[0], said
