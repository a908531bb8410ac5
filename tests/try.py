"""make try PHOTO="one.jpg two.jpg": what the service sees in photos, drawn beside them.

Sends each to the service on this machine (HOST, PORT), which is started for it if none answers,
and writes one.faces.jpg with boxes, landmarks and confidences.  Prints a line a face, and, of
several photos, which faces are the same person's: those less than 0.6 apart.
"""

import io
import itertools
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from werkzeug.datastructures import FileStorage
from werkzeug.test import encode_multipart

ROOT = Path(__file__).resolve().parent.parent
HOST = os.environ.get("HOST") or "127.0.0.1"
URL = f"http://{'127.0.0.1' if HOST == '0.0.0.0' else HOST}:{os.environ.get('PORT') or 5000}"
KEY = os.environ.get("API_KEY") or (ROOT / "api.key").read_text().strip()
SAME_PERSON = 0.6


def call(path, body=None, headers=None):
    request = urllib.request.Request(
        URL + path, body, {"x-api-key": KEY, **(headers or {})}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        sys.exit(f"{path}: {error.code}, {json.loads(error.read())['error']}")


def running_service():
    """Return the process of a service started here, or None if one is running."""
    try:
        call("/health")
        return None
    except OSError:
        print(f"No service answers at {URL}: starting one")
    process = subprocess.Popen(
        [sys.executable, ROOT / "facerecognition-external-model.py"]
    )
    while process.poll() is None:
        time.sleep(0.1)
        try:
            call("/health")
            return process
        except OSError:
            pass
    sys.exit("The service did not start.")


def faces_in(photo):
    with open(photo, "rb") as file:
        boundary, body = encode_multipart({"file": FileStorage(file, photo.name)})
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return json.loads(call("/detect", body, headers))["faces"]


def draw(photo, faces):
    """Write the photo, smaller if it is large, with what was found; return where."""
    image = Image.open(io.BytesIO(photo.read_bytes())).convert("RGB")
    pen = ImageDraw.Draw(image)
    width = max(1, max(image.size) // 300)
    font = ImageFont.load_default(max(12, max(image.size) // 50))
    for number, face in enumerate(faces, 1):
        sides = [face[side] for side in ("left", "top", "right", "bottom")]
        pen.rectangle(sides, outline="lime", width=width)
        for point in face["landmarks"]:
            x, y = point["x"], point["y"]
            pen.ellipse((x - width, y - width, x + width, y + width), fill="red")
        label = f"{number}: {face['detection_confidence']:.2f}"
        corner = (max(face["left"], 0), max(face["top"], 0))
        pen.rectangle(pen.textbbox(corner, label, font), fill="black")
        pen.text(corner, label, "white", font)
    drawn = photo.with_suffix(".faces.jpg")
    image.save(drawn, quality=90)
    return drawn


def distance(one, other):
    return (
        sum((a - b) ** 2 for a, b in zip(one["descriptor"], other["descriptor"])) ** 0.5
    )


def main():
    photos = [Path(name) for name in sys.argv[1:]]
    if not photos:
        sys.exit('Which photo?  make try PHOTO=family.jpg, or PHOTO="one.jpg two.jpg"')
    missing = [str(photo) for photo in photos if not photo.is_file()]
    if missing:
        sys.exit(f"There is no {', '.join(missing)}.")
    service = running_service()
    try:
        found = {photo: faces_in(photo) for photo in photos}
    finally:
        if service:
            service.terminate()
            service.wait()
    for photo, faces in found.items():
        print(f"{photo}: {len(faces)} faces, drawn in {draw(photo, faces)}")
        for number, face in enumerate(faces, 1):
            print(
                f"  {number}: confidence {face['detection_confidence']:.2f},"
                f" {face['right'] - face['left'] + 1} x {face['bottom'] - face['top'] + 1} pixels"
                f" at {face['left']}, {face['top']}"
            )
    for (one, faces), (other, others) in itertools.combinations(found.items(), 2):
        for (i, a), (j, b) in itertools.product(
            enumerate(faces, 1), enumerate(others, 1)
        ):
            apart = distance(a, b)
            verdict = "the same person" if apart < SAME_PERSON else "different people"
            print(f"{one} {i} and {other} {j}: {apart:.2f} apart, {verdict}")


if __name__ == "__main__":
    main()
