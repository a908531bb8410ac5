"""Real photos in, faces out: what is found, with each model."""

import functools
from statistics import mean

import pytest
import shared
from PIL import Image
from shared import box, distance, encoded, face_in, overlap, photo, picture

# Where the faces are, as a person would frame them: left, top, right, bottom.
FRAMES = {
    "obama.jpg": (370, 140, 620, 400),
    "biden.jpg": (420, 230, 730, 560),
    "obama2.jpg": (170, 275, 455, 570),
    "astronaut.png": (165, 60, 270, 175),
}


@functools.cache
def found(app, name):
    return app.detect(photo(name), filename=name)


@pytest.mark.parametrize("name", FRAMES)
def test_the_face_is_found_where_it_is(each_app, name):
    status, answer = found(each_app, name)
    assert status == 200 and list(answer) == ["filename", "faces-count", "faces"]
    assert answer["filename"] == name
    assert answer["faces-count"] == len(answer["faces"])
    (face,) = (f for f in answer["faces"] if overlap(box(f), FRAMES[name]) > 0.5)
    # HOG takes the badge on the astronaut's arm for a face, too.
    if (each_app.model, name) != (3, "astronaut.png"):
        assert answer["faces-count"] == 1
    confidence = face["detection_confidence"]
    assert confidence == 1.1 if each_app.model == 3 else confidence > 0.99
    assert len(face["landmarks"]) == (68 if each_app.model == 2 else 5)
    assert len(face["descriptor"]) == 128
    left, top, right, bottom = box(face)
    assert all(type(side) is int for side in box(face))
    assert left < mean(point["x"] for point in face["landmarks"]) < right
    assert top < mean(point["y"] for point in face["landmarks"]) < bottom


def test_one_person_is_near_and_others_are_far(each_app):
    names = ("obama.jpg", "obama2.jpg", "biden.jpg")
    one, again, other = (found(each_app, name)[1]["faces"][0] for name in names)
    assert distance(one, again) < 0.6 < distance(one, other)


def test_everybody_in_a_group_is_found_and_compute_gives_the_same(each_app):
    together = encoded(shared.group(), quality=95)
    status, answer = each_app.detect(together)
    assert (status, answer["faces-count"]) == (200, 3)
    middles = [(face["left"] + face["right"]) // 2 for face in answer["faces"]]
    assert sorted(middle // 480 for middle in middles) == [0, 1, 2]
    for face in answer["faces"]:
        sent = face_in(box(face)) | {"id": 7}
        status, computed = each_app.compute(together, sent)
        assert (status, computed["filename"]) == (200, "photo.jpg")
        assert list(computed["face"]) == [*sent, "landmarks", "descriptor"]
        assert computed["face"].items() >= sent.items()
        assert computed["face"]["landmarks"] == face["landmarks"]
        assert distance(computed["face"], face) < 1e-5


def test_model_4_lowers_the_confidence_of_faces_that_hog_does_not_find():
    """One of two faces is on its side: the CNN finds both, HOG the upright one."""
    pair = Image.new("RGB", (1100, 620), "grey")
    upright = picture().crop((250, 30, 750, 530))
    turned = upright.rotate(60, Image.Resampling.BICUBIC, fillcolor="grey")
    pair.paste(upright, (20, 60))
    pair.paste(turned, (560, 60))
    sent = encoded(pair, quality=95)
    cnn, hog, both = (
        shared.app_with(model).detect(sent)[1]["faces"] for model in (1, 3, 4)
    )
    assert len(cnn) == 2 and list(map(box, cnn)) == list(map(box, both))
    assert all(face["left"] < 550 for face in hog)
    for alone, judged in zip(cnn, both):
        factor = 1 if alone["left"] < 550 else 0.8
        expected = pytest.approx(alone["detection_confidence"] * factor)
        assert judged["detection_confidence"] == expected


@pytest.mark.parametrize(
    "size",
    [(1, 1), (9, 9), (1, 300), (300, 1), (9, 40), (10, 10), (20, 20), (40, 11)],
)
def test_no_faces_are_no_error(each_app, size):
    status, answer = each_app.detect(encoded(Image.new("RGB", size, "green")))
    assert (status, answer["faces-count"], answer["faces"]) == (200, 0, [])


def test_coordinates_are_those_of_the_file_whatever_exif_says(app):
    plain = app.detect(encoded(picture(), quality=95))[1]["faces"]
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    assert app.detect(encoded(picture(), quality=95, exif=exif))[1]["faces"] == plain


@pytest.mark.parametrize(
    "sides",
    [
        *((-150, -150, 50, 50), (900, 1000, 1100, 1200), (5000, 5000, 5200, 5200)),
        *((-(10**6), -(10**6), 10**6, 10**6), (400, 400, 400, 400)),
        (374.6, 154.4, 610.9, 390.0),
    ],
)
def test_a_face_is_described_wherever_it_is(app, sides):
    """What lies outside of the photo is black, as dlib has it."""
    sent = face_in(sides) | {"confidence": 1.5}
    status, answer = app.compute(photo("obama.jpg"), sent)
    assert status == 200 and len(answer["face"]["descriptor"]) == 128
    assert answer["face"].items() >= sent.items()
