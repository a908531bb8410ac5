"""make show: draws what models find in a photo, at the areas that the app can be set to.

    show.py PHOTO MODELS MEGAPIXELS      such as: show.py family.jpg "1 3" "1 4"

It starts a service for each model and posts the photo as the app does: upright and
scaled, as JPEG.  The time is that of the second request.
"""

import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps
from shared import box, encoded, scaled, started


def draw(image, faces):
    """Draw each face's box, landmarks and confidence; green is what the app groups."""
    pen, line = ImageDraw.Draw(image), max(2, image.width // 600)
    for face in faces:
        confidence = face["detection_confidence"]
        colour = "lime" if confidence >= 0.99 else "red"
        pen.rectangle(box(face), outline=colour, width=line)
        for point in face["landmarks"]:
            pen.circle((point["x"], point["y"]), line, fill=colour)
        above = (face["left"], face["top"] - 10 * line)
        pen.text(above, f"{confidence:.2f}", colour, font_size=8 * line)


def main(file, models, megapixels):
    try:
        photo = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    except OSError as error:
        sys.exit(f"{error}: make show PHOTO=family.jpg")
    print("model | megapixels | faces | smallest, pixels | seconds | drawn in")
    for model in models.split():
        with (
            tempfile.TemporaryDirectory() as folder,
            started(Path(folder), FACE_MODEL=model) as service,
        ):
            for area in megapixels.split():
                show(service, photo, model, area, Path(file).stem)


def show(service, photo, model, area, name):
    image = scaled(photo, float(area))
    sent = encoded(image, quality=95)
    service.detect(sent)
    began = time.monotonic()
    status, answer = service.detect(sent)
    seconds = time.monotonic() - began
    if status != 200:
        sys.exit(answer["error"])
    faces, drawn = answer["faces"], f"shown-{name}-model-{model}-{area}.jpg"
    draw(image, faces)
    image.save(drawn, quality=90)
    smallest = min((face["right"] - face["left"] for face in faces), default="-")
    print(model, area, len(faces), smallest, f"{seconds:.2f}", drawn, sep=" | ")


if __name__ == "__main__":
    main(*sys.argv[1:])
