"""Real photos in, faces out: what is found, with each model."""

from concurrent.futures import ThreadPoolExecutor
from statistics import mean

import pytest
from PIL import Image
from shared import (
    box,
    distance,
    encoded,
    group,
    overlap,
    photo,
    picture,
    scaled,
)

# Where the faces are, as a person would frame them: left, top, right, bottom.
FRAMES = {
    "obama.jpg": (370, 140, 620, 400),
    "biden.jpg": (420, 230, 730, 560),
    "obama2.jpg": (170, 275, 455, 570),
    "astronaut.png": (165, 60, 270, 175),
}


@pytest.mark.parametrize("name", FRAMES)
def test_the_face_is_found_where_it_is(each_service, name):
    status, answer = each_service.detect(photo(name), filename=name)
    assert status == 200
    assert list(answer) == ["filename", "faces-count", "faces"]
    assert answer["filename"] == name
    assert answer["faces-count"] == len(answer["faces"])
    (face,) = (
        face for face in answer["faces"] if overlap(box(face), FRAMES[name]) > 0.5
    )
    # HOG takes the badge on the astronaut's arm for a face, too.
    if (each_service.model, name) != (3, "astronaut.png"):
        assert answer["faces-count"] == 1
    assert face["detection_confidence"] > 0.99
    assert len(face["landmarks"]) == (68 if each_service.model == 2 else 5)
    assert len(face["descriptor"]) == 128
    assert all(type(face[side]) is int for side in ("left", "top", "right", "bottom"))
    left, top, right, bottom = box(face)
    x = mean(point["x"] for point in face["landmarks"])
    y = mean(point["y"] for point in face["landmarks"])
    assert left < x < right and top < y < bottom


def test_one_person_is_near_and_others_are_far(each_app):
    one, again, other = (
        each_app.detect(photo(name))[1]["faces"][0]
        for name in ("obama.jpg", "obama2.jpg", "biden.jpg")
    )
    assert distance(one, again) < 0.6 < distance(one, other)


def test_hog_has_one_confidence(apps):
    (face,) = apps(3).detect(photo("obama.jpg"))[1]["faces"]
    assert face["detection_confidence"] == 1.1


def test_everybody_in_a_group_is_found(each_app):
    status, answer = each_app.detect(encoded(group(), quality=95))
    assert (status, answer["faces-count"]) == (200, 3)
    thirds = sorted(
        (face["left"] + face["right"]) // 2 // 480 for face in answer["faces"]
    )
    assert thirds == [0, 1, 2]


def test_compute_gives_what_detect_gave(each_app):
    together = encoded(group(), quality=95)
    for face in each_app.detect(together)[1]["faces"]:
        sent = {side: face[side] for side in ("left", "top", "right", "bottom")}
        status, answer = each_app.compute(together, sent | {"id": 7})
        assert status == 200
        assert answer["filename"] == "photo.jpg"
        computed = answer["face"]
        assert computed["id"] == 7 and box(computed) == box(face)
        assert computed["landmarks"] == face["landmarks"]
        assert computed["descriptor"] == pytest.approx(face["descriptor"], abs=1e-6)


def test_model_4_lowers_the_confidence_of_faces_that_hog_does_not_find(apps):
    """One of two faces is turned on its side: the CNN finds both, HOG the upright one."""
    pair = Image.new("RGB", (1100, 620), "grey")
    upright = picture("obama.jpg").crop((250, 30, 750, 530))
    pair.paste(upright, (20, 60))
    pair.paste(
        upright.rotate(60, Image.Resampling.BICUBIC, fillcolor="grey"), (560, 60)
    )
    sent = encoded(pair, quality=95)
    cnn = apps(1).detect(sent)[1]["faces"]
    hog = apps(3).detect(sent)[1]["faces"]
    both = apps(4).detect(sent)[1]["faces"]
    assert len(cnn) == 2 and [box(face) for face in cnn] == [box(face) for face in both]
    assert all(face["left"] < 550 for face in hog)
    for alone, judged in zip(cnn, both):
        seen = alone["left"] < 550
        factor = 1 if seen else 0.8
        assert judged["detection_confidence"] == pytest.approx(
            alone["detection_confidence"] * factor
        )


def test_no_faces_are_no_error(each_app):
    status, answer = each_app.detect(encoded(Image.new("RGB", (400, 300), "green")))
    assert (status, answer["faces-count"], answer["faces"]) == (200, 0, [])


@pytest.mark.parametrize(
    "size", [(1, 1), (9, 9), (1, 300), (300, 1), (9, 40), (10, 10), (20, 20), (40, 11)]
)
def test_tiny_images_have_no_faces(each_app, size):
    assert each_app.detect(encoded(Image.new("RGB", size)))[1]["faces-count"] == 0


def test_a_photo_of_the_largest_area(app):
    largest = Image.new("RGB", (3840, 2160), "grey")
    largest.paste(picture("obama.jpg").resize((1728, 2160)), (1000, 0))
    status, answer = app.detect(encoded(largest))
    assert (status, answer["faces-count"]) == (200, 1)


def test_coordinates_are_those_of_the_file_whatever_exif_says(app):
    upright = picture("obama.jpg")
    plain = app.detect(encoded(upright, quality=95))[1]["faces"]
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    assert app.detect(encoded(upright, quality=95, exif=exif))[1]["faces"] == plain


def test_an_answer_is_the_same_alone_and_among_others(each_app):
    photos = [
        photo(name)
        for name in ("obama.jpg", "biden.jpg", "obama2.jpg", "astronaut.png")
    ]
    photos += [encoded(scaled(picture("biden.jpg"), size)) for size in (0.1, 0.4, 1)]
    photos.append(encoded(Image.new("RGB", (640, 480))))
    alone = [each_app.detect(sent) for sent in photos]
    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(each_app.detect, photos))
    for (status, one), (_, other) in zip(alone, together):
        assert status == 200
        for a, b in zip(one["faces"], other["faces"], strict=True):
            assert distance(a, b) < 1e-5
            assert a["landmarks"] == b["landmarks"] and box(a) == box(b)
