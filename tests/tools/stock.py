"""Writes tests/stock.json: what stock dlib answers, and so what tests/test_stock.py expects.

It needs a stock dlib that was built where the headers of libjpeg and libpng are installed (dlib's
own libjpeg is of 1998, and rounds otherwise), and each training of the CNN detector that
vendor/models.json knows:

    apt install libjpeg-dev libpng-dev && make .venv/stock
    PYTHONPATH=tests .venv/stock/bin/python tests/tools/stock.py PINNED.dat LATER.dat

Nothing of the service is imported: this is the contract once more, read plainly, face by face.
"""

import hashlib
import json
import sys
from itertools import pairwise
from pathlib import Path

import dlib
from stock_photos import PHOTOS, digest, photos

TESTS = Path(__file__).resolve().parents[1]
MODELS = TESTS.parent / "vendor" / "models"
CLEAR = 1e-4  # scores that are closer, to zero or to each other, can be rounded away

# Boxes for /compute that no detector gave: left, top, right, bottom.
FRAMES = {
    "obama": [(185, 70, 310, 200), (190, 40, 300, 220), (240, 120, 260, 140)]
    + [(0, 0, 454, 567), (-75, -75, 25, 25), (400, 500, 500, 600)],
    "cut": [(-40, 60, 80, 180), (-90, 70, 20, 180), (2500, 2500, 2600, 2600)],
}


def hog_faces(detector, pixels):
    boxes, scores, _ = detector.run(pixels, 1, -CLEAR)
    check_clear(scores)
    return [(box, 1.1) for box in boxes]


def cnn_faces(detector, pixels):
    faces = detector(pixels, 0)
    check_clear([face.confidence for face in faces])
    return [(face.rect, face.confidence) for face in faces]


def check_clear(scores):
    """Exit unless each score, and which is larger, survives another rounding."""
    gaps = [abs(a - b) for a, b in pairwise([*scores, 0])]
    if not all(gap == 0 or gap > CLEAR for gap in gaps):
        sys.exit(f"Scores are too close, to zero or to each other: {list(scores)}")


def validated(faces, hog_faces):
    """Model 4: lower the confidence of faces that HOG does not find."""

    def factor(box):
        return 1 if any(overlap(box, seen) >= 0.35 for seen, _ in hog_faces) else 0.8

    return [(box, factor(box) * confidence) for box, confidence in faces]


def overlap(a, b):
    """Return the intersection over union."""
    common = a.intersect(b).area()
    return common / (a.area() + b.area() - common)


def sides(box):
    return box.left(), box.top(), box.right(), box.bottom()


def describe(pixels, boxes, predictor, describer):
    """Return landmarks and descriptor by the box's sides."""
    described = {}
    for box in boxes:
        shape = predictor(pixels, dlib.rectangle(*box))
        descriptor = describer.compute_face_descriptor(pixels, shape)
        described[" ".join(map(str, box))] = {
            "landmarks": [[point.x, point.y] for point in shape.parts()],
            "descriptor": [round(number, 6) for number in descriptor],
        }
    return described


def main(trainings):
    images = photos()
    hog = dlib.get_frontal_face_detector()
    found = {"HOG": {name: hog_faces(hog, pixels) for name, pixels in images.items()}}
    for file in trainings:
        training = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        cnn = dlib.cnn_face_detection_model_v1(file)
        faces = {name: cnn_faces(cnn, pixels) for name, pixels in images.items()}
        found[training] = faces
        found[f"{training} and HOG"] = {
            name: validated(faces[name], found["HOG"][name]) for name in images
        }
    describer = dlib.face_recognition_model_v1(
        str(MODELS / "dlib_face_recognition_resnet_model_v1.dat")
    )
    described = {}
    for points in 5, 68:
        file = MODELS / f"shape_predictor_{points}_face_landmarks.dat"
        predictor = dlib.shape_predictor(str(file))
        described[points] = {}
        for name, pixels in images.items():
            boxes = {sides(box) for faces in found.values() for box, _ in faces[name]}
            boxes = sorted(boxes) + FRAMES.get(name, [])
            described[points][name] = describe(pixels, boxes, predictor, describer)
    files = sorted(PHOTOS.glob("*.*g"))
    values = {
        "load_rgb_image": {
            file.name: digest(dlib.load_rgb_image(str(file))) for file in files
        },
        "photos": {name: digest(pixels) for name, pixels in images.items()},
        "detections": {
            detector: {
                name: [[round(confidence, 6), *sides(box)] for box, confidence in faces]
                for name, faces in by_photo.items()
            }
            for detector, by_photo in found.items()
        },
        "faces": described,
    }
    (TESTS / "stock.json").write_text(in_lines(values, 3) + "\n")


def in_lines(value, depth):
    """Write JSON with a line for each value at that depth."""
    if not isinstance(value, dict) or depth < 0:
        return json.dumps(value, separators=(",", ":"))
    items = [f'"{key}": {in_lines(item, depth - 1)}' for key, item in value.items()]
    return "{\n" + ",\n".join(items) + "\n}"


main(sys.argv[1:])
