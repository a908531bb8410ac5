"""The photos whose faces are in tests/stock.json.

They are cut out of tests/photos and changed in whole numbers only: so their pixels depend
neither on Pillow's version nor on how a processor rounds.  Stock dlib's Python makes them
too, so this imports neither the service nor pytest.
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOS = Path(__file__).resolve().parent / "photos"


def photos():
    """Return the photos by name, as uint8 arrays of shape (height, width, 3)."""
    obama = halved(read("obama.jpg"))
    biden = halved(read("biden.jpg")[:1100])
    astronaut = read("astronaut.png")
    heads = [obama[15:255, 125:365], biden[80:320, 168:408], astronaut[:240, 100:340]]
    group = np.hstack(heads)
    made = {
        "obama": obama,
        "biden": biden,
        "astronaut": astronaut,
        "group": np.vstack([group, group[:, ::-1]]),
        # The CNN takes more than 768 pixels in bands: here, a face lies at each border.
        "wide": np.hstack([*heads, group[:, ::-1], obama[9:249, 119:359]]),
        "small": halved(group),
        "dark": obama // 8,
        "grey": astronaut[..., [1, 1, 1]],
        "tilted": np.hstack([heads[0], tilted(heads[0])]),
        "lying": np.rot90(heads[0]),
        "cut": obama[:, 200:],
        "tiles": np.tile(obama[56:216, 160:320], (2, 3, 1)),
        "none": astronaut[300:, 200:],
    }
    return {name: np.ascontiguousarray(pixels) for name, pixels in made.items()}


def read(name):
    return np.asarray(Image.open(PHOTOS / name).convert("RGB"))


def halved(pixels):
    """Half as high and wide: the mean of each 2 x 2 pixels, rounded down."""
    height, width = (side // 2 * 2 for side in pixels.shape[:2])
    pixels = pixels[:height, :width].astype(np.uint16)
    rows = pixels[::2] + pixels[1::2]
    return ((rows[:, ::2] + rows[:, 1::2]) // 4).astype(np.uint8)


def tilted(pixels):
    """A square turned by 37 degrees, whose sine is 3/5 and cosine 4/5; grey around it."""
    size = len(pixels)
    y, x = np.mgrid[:size, :size] - size // 2
    y, x = (4 * y - 3 * x) // 5 + size // 2, (3 * y + 4 * x) // 5 + size // 2
    inside = (0 <= y) & (y < size) & (0 <= x) & (x < size)
    turned = np.full_like(pixels, 128)
    turned[inside] = pixels[y[inside], x[inside]]
    return turned


def digest(pixels):
    """Return the SHA-256 of an array's shape and bytes."""
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
