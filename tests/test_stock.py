"""The answers are stock dlib's, which tests/tools/stock.py has written to stock.json."""

import functools
import hashlib
import json

import PIL
import pytest
import shared
from PIL import Image
from shared import box, encoded, face_in
from stock_photos import digest, photos
from test_images import pixels

STOCK = json.loads((shared.ROOT / "tests" / "stock.json").read_text())
CLOSE = 1e-5  # the largest difference of a confidence, or of a descriptor's number


def expected_detections(model):
    """Return [confidence, left, top, right, bottom] of each face, by photo."""
    if model == 3:
        return STOCK["detections"]["HOG"]
    file = shared.ROOT / f"vendor/models/{model}/mmod_human_face_detector.dat"
    training = hashlib.sha256(file.read_bytes()).hexdigest()
    return STOCK["detections"][f"{training} and HOG" if model == 4 else training]


def expected_faces(model):
    """Return landmarks and descriptor, by photo and box."""
    return STOCK["faces"]["68" if model == 2 else "5"]


@functools.cache
def sent(name):
    pixels = photos()[name]
    assert digest(pixels) == STOCK["photos"][name], (
        f"Pillow {PIL.__version__} decodes tests/photos to other pixels than the Pillow"
        " that stock.json was made with: that says nothing about faces"
    )
    return encoded(Image.fromarray(pixels), "PNG", compress_level=1)


def check_description(face, expected):
    landmarks = [[point["x"], point["y"]] for point in face["landmarks"]]
    assert landmarks == expected["landmarks"]
    pairs = zip(face["descriptor"], expected["descriptor"], strict=True)
    assert max(abs(ours - stocks) for ours, stocks in pairs) < CLOSE


@pytest.mark.parametrize("name", STOCK["photos"])
def test_detect_answers_the_faces_of_stock_dlib(each_app, name):
    status, answer = each_app.detect(sent(name))
    expected = expected_detections(each_app.model)[name]
    assert (status, answer["faces-count"]) == (200, len(expected))
    assert [list(box(face)) for face in answer["faces"]] == [b for _, *b in expected]
    for face, (confidence, *sides) in zip(answer["faces"], expected):
        assert abs(face["detection_confidence"] - confidence) < CLOSE
        stocks = expected_faces(each_app.model)[name][" ".join(map(str, sides))]
        check_description(face, stocks)


@pytest.mark.parametrize("name", STOCK["photos"])
def test_compute_describes_a_box_as_stock_dlib_does(each_app, name):
    for sides, expected in expected_faces(each_app.model)[name].items():
        face = face_in(map(int, sides.split()))
        status, answer = each_app.compute(sent(name), face)
        assert status == 200
        check_description(answer["face"], expected)


@pytest.mark.parametrize("name", STOCK["load_rgb_image"])
def test_photos_are_decoded_as_stock_dlib_does(name):
    assert digest(pixels(shared.photo(name))) == STOCK["load_rgb_image"][name]
