"""make try PHOTO="one.jpg two.jpg": draw what the service finds in photos.

Sends each to the service on this machine (HOST, PORT), which is started for it if none answers,
and writes one.faces.jpg with boxes, landmarks and confidences.  Prints a line a face, and, of
several photos, which faces are the same person's: those less than 0.6 apart.

A photo goes as Nextcloud's app would send it: upright, and scaled, up or down, to the area that is
set there (AREA, in pixels: 4,320,000, or what the service takes at the most).
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

from PIL import Image, ImageDraw, ImageFont, ImageOps
from werkzeug.datastructures import FileStorage
from werkzeug.test import encode_multipart

ROOT = Path(__file__).resolve().parents[2]
HOST = os.environ.get("HOST") or "::"
if HOST in ("0.0.0.0", "::"):
    HOST = "127.0.0.1"
URL = f"http://{f'[{HOST}]' if ':' in HOST else HOST}:{os.environ.get('PORT') or 5000}"
KEY = os.environ.get("API_KEY") or (ROOT / "api.key").read_text().strip()
SAME_PERSON = 0.6
AREA = int(os.environ.get("AREA") or 4_320_000)

Image.MAX_IMAGE_PIXELS = None  # the photos are one's own


def call(path, body=None, headers=None):
    """Return the JSON that the service answers, or exit with its error."""
    headers = {"x-api-key": KEY, **(headers or {})}
    request = urllib.request.Request(URL + path, body, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        sys.exit(f"{URL}{path}: {error.code}, {json.loads(error.read())['error']}")


def running_service():
    """Return the process of a service started here, or None if one is running."""
    try:
        call("/welcome")
        return None
    except OSError:
        print(f"No service answers at {URL}: starting one", flush=True)
    process = subprocess.Popen(
        [sys.executable, ROOT / "facerecognition-external-model.py"]
    )
    while process.poll() is None:
        time.sleep(0.1)
        try:
            call("/welcome")
            return process
        except OSError:
            pass
    sys.exit("The service did not start.")


def as_the_app_scales(size, area):
    """Return the sides that the app gives a photo of this size, as its ImageProcessingTask does."""
    factor = (area / (size[0] * size[1])) ** 0.5
    return tuple(round(side * factor) for side in size)


def prepared(photo, area):
    """Return (file, image): the photo as the app would make it."""
    try:
        image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    except (OSError, SyntaxError) as error:
        sys.exit(f"{photo}: {error}")
    image = image.resize(as_the_app_scales(image.size, area))
    print(f"{photo} goes upright, in {image.width} x {image.height} pixels")
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue(), image


def faces_in(file, name):
    boundary, body = encode_multipart({"file": FileStorage(io.BytesIO(file), name)})
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return call("/detect", body, headers)["faces"]


def draw(image, faces):
    """Draw the faces into the image."""
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


def distance(one, other):
    numbers = zip(one["descriptor"], other["descriptor"])
    return sum((a - b) ** 2 for a, b in numbers) ** 0.5


def tell(photo, drawn, faces):
    count = f"{len(faces)} face{'s' * (len(faces) != 1)}"
    print(f"{photo}: {count}, drawn in {drawn}")
    for number, face in enumerate(faces, 1):
        size = (face["right"] - face["left"] + 1, face["bottom"] - face["top"] + 1)
        print(
            f"  {number}: confidence {face['detection_confidence']:.2f},"
            f" {size[0]} x {size[1]} pixels at {face['left']}, {face['top']}"
        )


def compare(found):
    for (one, faces), (other, others) in itertools.combinations(found.items(), 2):
        for i, a in enumerate(faces, 1):
            for j, b in enumerate(others, 1):
                apart = distance(a, b)
                who = "the same person" if apart < SAME_PERSON else "different people"
                print(f"{one} {i} and {other} {j}: {apart:.2f} apart, {who}")


def main():
    photos = [Path(name) for name in sys.argv[1:]]
    if not photos:
        sys.exit('Which photo?  make try PHOTO=family.jpg, or PHOTO="one.jpg two.jpg"')
    missing = [str(photo) for photo in photos if not photo.is_file()]
    if missing:
        sys.exit(f"There is no {', '.join(missing)}.")
    found = {}
    service = running_service()
    try:
        area = min(AREA, call("/open")["maximum_area"])
        for photo in photos:
            file, image = prepared(photo, area)
            found[photo] = faces_in(file, photo.name)
            draw(image, found[photo])
            drawn = photo.with_suffix(".faces.jpg")
            image.save(drawn, quality=90)
            tell(photo, drawn, found[photo])
    finally:
        if service:
            service.terminate()
            service.wait()
    compare(found)


if __name__ == "__main__":
    main()
