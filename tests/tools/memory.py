"""make memory: what a running service takes, at rest and for photos, by HTTP.

It may take MEMORY_AT_REST (model 2: 75 MB more), and 40 MB for each further photo at once; and for each photo
64 MB and MEMORY_PER_PIXEL over that, however many faces it has.  (The module counts on
MEMORY_PER_PHOTO instead of 64 MB, as the model set of the first photo is not there at rest.)
All processes of the service count; what they share counts once at rest.
"""

import itertools
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from PIL import Image
from shared import children, encoded, module, picture, started, threads

PHOTOS = [(0.31, 0), (0.31, 9), (0.31, 20), (1, 9), (1, 60), (4.32, 9), (8.29, 570)]
PAGE = 4096


def mosaic(megapixels, faces):
    """Return a photo of so many megapixels with about so many faces, as JPEG."""
    width, height = (round((megapixels * 1e6 * part) ** 0.5) for part in (4 / 3, 3 / 4))
    photo = Image.new("RGB", (width, height), "grey")
    side = round((width * height / max(faces, 1)) ** 0.5)
    face = picture().crop((255, 30, 735, 510)).resize((side, side))
    for i in range(faces):
        column, row = i % (width // side), i // (width // side)
        photo.paste(face, (column * side, row * side))
    return encoded(photo)


def processes(pid):
    """Return the ids of a process and all that come from it."""
    return [pid] + [one for child in children(pid) for one in processes(child)]


def at_rest(pid):
    """Return the bytes that the service takes; those of a file are shared by all."""
    files = [Path(f"/proc/{one}/smaps_rollup").read_text() for one in processes(pid)]
    return sum(int(f.split("\nPss:")[1].split()[0]) << 10 for f in files)


def private(pid):
    """Return the bytes of all processes that are of no file."""
    pages = [Path(f"/proc/{one}/statm").read_text().split() for one in processes(pid)]
    return sum(int(resident) - int(shared) for _, resident, shared, *_ in pages) * PAGE


def measure(service, photo, count):
    """Return how many bytes so many photos at once take over what is there at rest."""
    pid, before, peak = service.process.pid, private(service.process.pid), [0]

    def watch(stopped):
        while not stopped.wait(0.003):
            with suppress(OSError):  # a process has just ended
                peak[0] = max(peak[0], private(pid) - before)

    with threads(watch), ThreadPoolExecutor(count) as clients:
        answers = list(clients.map(service.detect, [photo] * count * 2))
    assert all(status == 200 for status, _ in answers), answers
    return peak[0], answers[0][1]["faces-count"]


def main(models, counts):
    print(
        "model | at once | megapixels | faces | MB at rest | limit | peak over it | limit"
    )
    print("---|---|---|---|---|---|---|---", flush=True)
    for model, count in itertools.product(models, counts):
        settings = {"FACE_MODEL": model, "PHOTOS_AT_ONCE": count}
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            service = stack.enter_context(started(folder, **settings))
            measure(service, mosaic(0.31, 9), count * 4)  # loads all model sets
            for megapixels, faces in PHOTOS:
                peak, found = measure(service, mosaic(megapixels, faces), count)
                time.sleep(0.5)
                rest = at_rest(service.process.pid)
                rest_limit = module.MEMORY_AT_REST + ((count - 1) * 40 << 20)
                rest_limit += 75 << 20 if model == "2" else 0
                limit = (64 << 20) + module.MEMORY_PER_PIXEL * megapixels * 1e6
                row = [model, count, megapixels, found]
                for size, most in (rest, rest_limit), (peak, count * limit):
                    row += [f"{size / 2**20:.0f}", f"{most / 2**20:.0f}"]
                    row[-1] += "" if size <= most else " EXCEEDED"
                print(*row, sep=" | ", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or "1234", (1, 2, 4))
