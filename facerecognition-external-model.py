"""Finds and describes the faces in photos, for Nextcloud's app Face Recognition.

The app's model 5 posts photos, and gets each face's box, landmarks and descriptor as
JSON.  Settings come from the environment (defaults in parentheses):

    API_KEY         the key shared with Nextcloud        (the content of ./api.key)
    FACE_MODEL      the app's number of the model, 1 to 4                       (1)
    HOST, PORT      the address to listen on              (all, IPv4 and IPv6; 5000)
    MAXIMUM_AREA    what /open tells the app     (3840 x 2160, or what memory holds)
    PHOTOS_AT_ONCE  how many are analysed in parallel  (cores, or what memory holds)
"""

import ctypes
import hmac
import json
import logging
import os
import re
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from types import SimpleNamespace

from flask import Blueprint, Flask, Request, Response, abort, current_app, request
from werkzeug.exceptions import (
    BadRequest,
    HTTPException,
    NotFound,
    RequestEntityTooLarge,
)

from vendor.decoding import Decoder, Refusal, can_shut_in
from vendor.models import paths, training

try:
    import dlib
except ImportError as error:  # it can be FACES_CPU that is wrong
    sys.exit(f"dlib can't be loaded: {error}")

__version__ = "1.0.0"
HERE = Path(__file__).resolve().parent
OUR_ENGINE = getattr(dlib, "DLIB_FAST_FACES", None)  # for which level of CPU
DLIB = f"{dlib.__version__}, {OUR_ENGINE or 'stock and slow'}"
log = logging.getLogger("facerecognition")

# What a small photo takes stays for the next one, and what a large one takes goes back to
# the system.  By default glibc keeps up to 64 MB for each thread, and what is free below
# a used block.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # as in glibc's malloc.h
if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # musl has none
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_MMAP_THRESHOLD, 4 << 20)
    mallopt(M_TRIM_THRESHOLD, 32 << 20)


# ---------------------------------------------------------------------------- settings

# Bytes, as "make memory" measures them.  A photo in flight has a model set.
MEMORY_AT_REST = 180 << 20
MEMORY_PER_PHOTO = 104 << 20
MEMORY_PER_PIXEL = 64 if OUR_ENGINE else 1050
REFERENCE_AREA = 3840 * 2160  # pixels; the reference service's maximum_area
SMALLEST_AREA = 640 * 480  # pixels; the least that the app can be set to
MOST_BYTES = {"/detect": 64 << 20, "/compute": 512 << 20}  # of a request
MOST_OBJECTS = 500  # and lists in a face: how deep they nest would depend on Python
URL = "https://github.com/freakdude/facerecognition-external-model.git"
EXAMPLE_KEY = "put-the-output-of-openssl-rand-base64-32-here"  # as in api.key.example
# A black BMP of 64 x 64 pixels.
BMP_HEAD = struct.pack("<6I2H6I", 12342, 0, 54, 40, 64, 64, 1, 24, *[0] * 6)
EXAMPLE_PHOTO = b"BM" + BMP_HEAD + bytes(64 * 64 * 3)


@cache
def checked_settings():
    """Return Flask's configuration, or exit with one line that names what is wrong.

    What would fail every photo is wrong, too: model files, temporary files, decoding.
    """
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s")
    if os.environ.get("FACE_MODEL", "").strip() == "5":
        sys.exit("FACE_MODEL is 5, as Nextcloud calls this service: give 1 to 4.")
    face_model = whole_number("FACE_MODEL", 1, largest=4)
    # From all the memory there is, not from what is free: the app's jobs stop if the
    # area is smaller after a restart than what its admin has set.
    memory = all_memory() - MEMORY_AT_REST
    per_pixel = MEMORY_PER_PIXEL * 11 // 10  # with the CNN's border
    fitting = (memory - MEMORY_PER_PHOTO) // per_pixel // 100_000 * 100_000
    area = whole_number("MAXIMUM_AREA", min(REFERENCE_AREA, fitting))
    largest = MEMORY_PER_PHOTO + per_pixel * area
    at_once = min(len(os.sched_getaffinity(0)), memory // largest)
    at_once = whole_number("PHOTOS_AT_ONCE", max(at_once, 1))
    asked = max(area, SMALLEST_AREA)
    needed = MEMORY_AT_REST + at_once * (MEMORY_PER_PHOTO + per_pixel * asked)
    if needed > memory + MEMORY_AT_REST:
        photos = f"{at_once} photos (PHOTOS_AT_ONCE) of {asked} pixels (MAXIMUM_AREA)"
        sys.exit(f"Memory is too small for {photos}: it takes {needed >> 20} MB.")
    if area < SMALLEST_AREA:
        sys.exit(f"MAXIMUM_AREA is {area}: the app needs {SMALLEST_AREA} at least.")
    settings = {
        "API_KEY": read_api_key(),
        "FACE_MODEL": face_model,
        "MODEL_FILES": check_model_files(face_model),
        "MAXIMUM_AREA": area,
        "PHOTOS_AT_ONCE": at_once,
        "PHOTO_MEMORY": memory // at_once,
    }
    check_decoding()
    return settings


def whole_number(name, default, largest=10**9):
    text = os.environ.get(name, "").strip()
    if text and not (re.fullmatch("[0-9]{1,10}", text) and 0 < int(text) <= largest):
        sys.exit(f"{name} is {text!r}: give a whole number from 1 to {largest}.")
    return int(text or default)


def read_api_key():
    """Return the key, or exit with one line that says which of its faults it has."""
    key, file = os.environ.get("API_KEY", "").strip(), HERE / "api.key"
    try:
        key = key or file.read_text("utf-8-sig").strip()
    except FileNotFoundError:
        wrong = f"There is no key: API_KEY is not set, and there is no file {file}."
    except IsADirectoryError:
        wrong = f"{file} is a folder: Docker makes one if the file to mount is missing."
    except (OSError, ValueError) as error:
        wrong = f"The key can't be read: {error}."
    else:
        if key and len(key.split()) == 1 and key != EXAMPLE_KEY:
            return key
        wrong = f"{file} is empty." if not key else "The key has more than one word."
        wrong = "The key is still the example's." if key == EXAMPLE_KEY else wrong
    sys.exit(f"{wrong}  A new key: openssl rand -base64 32")


def all_memory():
    """Return how many bytes of memory the machine, or our cgroup, has."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(memory, *limits_of_cgroup("memory.max", "memory.limit_in_bytes"))


def limits_of_cgroup(*names):
    """Return the numbers in files of these names, of our cgroup and those above it."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)  # none in version 2
        group = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
        for folder in (group, *group.parents):  # a container can see its own as the top
            for name in names:
                with suppress(OSError, ValueError):  # no such limit
                    limits.append(int((folder / name).read_text()))
    return limits


def check_decoding():
    """Exit with one line unless a photo can be stored and decoded; warn if not shut in."""
    if not can_shut_in():
        log.warning(
            "This system has no seccomp filters: a bug in libjpeg, libpng or libwebp"
            " would let a photo do what the service can."
        )
    folder = os.environ.get("TMPDIR")
    try:
        if folder and not os.path.samefile(gettempdir(), folder):
            raise OSError(f"no file can be written in {folder}")
        with closing(Decoder(1, pauses=[0])) as decoder, TemporaryFile() as file:
            file.write(EXAMPLE_PHOTO)
            file.flush()
            decoder.decode(file, None, 1 << 28, 1 << 12, 0)
    except (OSError, Refusal) as error:
        sys.exit(f"No photo can be stored (TMPDIR) and decoded here: {error}")


# ------------------------------------------------------------------------------ models

SAME_FACE = 0.35  # overlap, from which on a box of HOG is of the same face
UNSEEN_FACTOR = 0.8  # for the confidence of a face that HOG does not find
BATCH = 16  # faces described together: many faces take no more memory than that
# Model sets share what running does not change.  It changes more of stock dlib.
load_landmarks = cache(dlib.shape_predictor)
load_hog = dlib.get_frontal_face_detector
load_descriptor = dlib.face_recognition_model_v1
if OUR_ENGINE:
    load_hog = cache(load_hog)
    load_descriptor = cache(load_descriptor)


def check_model_files(model):
    """Return a model's files, or exit with one line unless all are there and whole."""
    for file in paths(model):
        if not (found := training(file)):
            get = f"make FACE_MODEL={model} setup"
            if not (HERE / "Makefile").exists():  # in an image
                get = f"docker build --build-arg MODELS={model} -t faces {URL}"
            sys.exit(f"{file} is missing or damaged: {get}")
        if found == "later":
            log.warning("%s is a later training: boxes differ by some pixels.", file)
    return [str(file) for file in paths(model)]


def load_model_set(settings):
    """Load a model's parts from dlib, for one photo at a time: running changes them."""
    model = settings["FACE_MODEL"]
    *cnn, landmarks, describer = settings["MODEL_FILES"]
    try:
        return SimpleNamespace(
            cnn=dlib.cnn_face_detection_model_v1(*cnn) if cnn else None,
            hog=load_hog() if model in (3, 4) else None,
            landmarks=load_landmarks(landmarks),
            descriptor=load_descriptor(describer),
        )
    except RuntimeError as error:  # dlib's; the files were checked, so memory ran out
        raise MemoryError(str(error)) from error


def detect_faces(models, pixels):
    """Find the faces in an RGB image.

    ``pixels`` is a uint8 array of shape (height, width, 3).  Returns a list of pairs, a
    ``dlib.rectangle`` in pixels and a confidence, in the detector's order.
    """
    if min(pixels.shape[:2]) < 10:  # stock dlib's CNN crashes
        return []
    if not models.cnn:
        return [(box, 1.1) for box in models.hog(pixels, 1)]  # HOG has no confidence
    faces = [(face.rect, face.confidence) for face in models.cnn(pixels, 0)]
    if not models.hog or not faces:
        return faces
    boxes = models.hog(pixels, 1)
    seen = [any(_overlap(face, box) >= SAME_FACE for box in boxes) for face, _ in faces]
    return [(f, c if s else UNSEEN_FACTOR * c) for (f, c), s in zip(faces, seen)]


def _overlap(a, b):
    """Return the intersection over union of two rectangles."""
    common = a.intersect(b).area()
    return common / (a.area() + b.area() - common)


def describe_faces(models, pixels, boxes):
    """Return each ``dlib.rectangle``'s landmarks (points) and descriptor (128 numbers).

    The descriptor is that of dlib's ResNet for the face aligned by its landmarks with a
    padding of 0.25, without jitter.  Faces whose descriptors are closer than 0.6
    (Euclidean) are one person's: http://dlib.net/face_recognition.py.html
    """
    described = []
    for first in range(0, len(boxes), BATCH):
        shapes = [models.landmarks(pixels, b) for b in boxes[first : first + BATCH]]
        # One at a time: if cut out together, others change a descriptor by up to 0.03.
        chips = [dlib.get_face_chip(pixels, shape, 150, 0.25) for shape in shapes]
        descriptors = models.descriptor.compute_face_descriptor(chips)
        described += [(shape.parts(), list(d)) for shape, d in zip(shapes, descriptors)]
    return described


# ---------------------------------------------------------------------------- analysis


class FaceAnalyser:
    """Analyses photos, some at once; the others wait, first come, first served."""

    def __init__(self, settings):
        self.settings = settings
        self.most = settings["PHOTO_MEMORY"] - MEMORY_PER_PHOTO  # bytes for pixels
        self.decoder = Decoder(settings["PHOTOS_AT_ONCE"])
        self.idle = [load_model_set(settings)]  # more are loaded when needed
        self.pool = ThreadPoolExecutor(settings["PHOTOS_AT_ONCE"])

    def analyse(self, file, box=None):
        """Return all faces in an image file, or the one in ``box``, as ``/detect`` answers.

        Raises what ``Decoder.decode`` does: 412 if it takes more memory than a photo may.
        """
        return self.pool.submit(self._analyse, file, box, time.monotonic()).result()

    def _analyse(self, file, box, queued):
        began = time.monotonic()
        pixels, (x, y), size = self.decoder.decode(file, **self._limits(box))
        with self._model_set() as models:
            if box:
                found = [(dlib.translate_rect(box, dlib.point(-x, -y)), None)]
            else:
                found = detect_faces(models, pixels)
            described = describe_faces(models, pixels, [box for box, _ in found])
        waited, took = began - queued, time.monotonic() - began
        message = "%d faces in %d x %d pixels; waited %.3f s, took %.3f s"
        log.info(message, len(found), *size, waited, took)
        return [
            {
                "detection_confidence": confidence,
                "left": x + box.left(),
                "top": y + box.top(),
                "right": x + box.right(),
                "bottom": y + box.bottom(),
                "landmarks": [{"x": x + p.x, "y": y + p.y} for p in landmarks],
                "descriptor": descriptor,
            }
            for (box, confidence), (landmarks, descriptor) in zip(found, described)
        ]

    def _limits(self, box):
        """Return what to ask of the decoder: as much as there is memory for."""
        if box:
            region, border, per_pixel = surroundings(box), 0, 4  # 3 and what dlib takes
        else:
            region, border, per_pixel = None, 11, MEMORY_PER_PIXEL  # the CNN's border
        pixels = self.most // per_pixel
        limits = {"memory": self.most, "pixels": pixels, "border": border}
        return {"region": region, **limits}

    @contextmanager
    def _model_set(self):
        """Lend a model set, which its user alone may run: running it changes it."""
        try:
            models = self.idle.pop()
        except IndexError:
            models = load_model_set(self.settings)
        yield models
        self.idle.append(models)  # unless its run failed: then it could be broken


def surroundings(box):
    """Return the region on which a face's landmarks and descriptor depend.

    That is its box extended by its size: dlib's landmarks and face chip reach 0.7 of that
    far.
    """
    margin = max(box.width(), box.height())
    left, top = box.left() - margin, box.top() - margin
    return left, top, box.right() + margin + 1, box.bottom() + margin + 1


# ----------------------------------------------------------------------------- service

service = Blueprint("service", __name__)
NO_FACE = "Send the face's left, top, right and bottom as JSON in the field face"


class UploadRequest(Request):
    """A request whose files go to the disk at once: hundreds of clients can wait."""

    max_form_parts = 8  # those that are no files stay in memory

    def _get_file_stream(self, *_, **__):
        return TemporaryFile()


@service.before_request
def check_request():
    """Abort with 401 unless the key is right or not needed, with 413 if it is too much."""
    sent = request.headers.get("x-api-key")
    if request.path == "/health" or (request.path == "/welcome" and sent is None):
        return
    sent = (sent or "").encode("latin-1")  # how WSGI decodes the bytes of headers
    if not hmac.compare_digest(sent, os.fsencode(current_app.config["API_KEY"])):
        abort(401, "The API key is missing or wrong: send it in the header x-api-key.")
    most = MOST_BYTES.get(request.path, sys.maxsize)
    if (request.content_length or 0) > most:
        abort(413, f"The request has more than {most} bytes: send a smaller file.")
    request.max_content_length = most  # of one that does not say its length


@service.get("/welcome")
def welcome():
    """Return the version, model and dlib in use.  Checks a key if one is sent."""
    what = {"version": __version__, "model": current_app.config["FACE_MODEL"]}
    return {"facerecognition-external-model": "welcome", **what, "dlib": DLIB}


@service.get("/health")
def health():
    """Return "ok" while requests are answered."""
    return "ok", {"Content-Type": "text/plain"}


@service.get("/open")
def open_model():
    """Return which photos to send: the preferred type and the largest area."""
    area = current_app.config["MAXIMUM_AREA"]
    return {"preferred_mimetype": "image/jpeg", "maximum_area": area}


@service.post("/detect")
def detect():
    """Find and describe all faces of the photo in the field ``file``, as JSON."""
    name, file = _posted_file()
    faces = current_app.config["ANALYSER"].analyse(file)
    return {"filename": name, "faces-count": len(faces), "faces": faces}


@service.post("/compute")
def compute():
    """Describe the face of the photo in ``file`` whose box is in ``face``, as JSON.

    The photo can be a large original: only what the face depends on is analysed.
    """
    name, file = _posted_file()
    face, box = _posted_face()
    (described,) = current_app.config["ANALYSER"].analyse(file, box)
    face |= {key: described[key] for key in ("landmarks", "descriptor")}
    return {"filename": name, "face": face}


def _posted_file():
    """Return the base name and the file of the form's field ``file``."""
    try:
        upload = request.files.get("file")
    except Exception as error:
        if isinstance(error, (RequestEntityTooLarge, MemoryError, OSError)):
            raise  # too many parts, or the disk is full
        reason = "The request is malformed or broke off: send it again, whole."
        raise BadRequest(reason) from error
    if upload is None:
        abort(400, "There is no photo, or it broke off: send it as the form's file.")
    return os.path.basename(upload.filename or ""), upload.stream


def _posted_face():
    """Return the object in the form's field ``face``, and its box, a ``dlib.rectangle``."""
    text = request.form.get("face", "")
    if text.count("{") + text.count("[") > MOST_OBJECTS:
        abort(400, f"{NO_FACE}, with no more than {MOST_OBJECTS} objects and lists.")
    try:
        face = json.loads(text)
        json.dumps(face, allow_nan=False)  # nor infinite, such as 1e999
        sides = [round(face[side]) for side in ("left", "top", "right", "bottom")]
        if max(map(abs, sides)) > 1 << 20 or dlib.rectangle(*sides).is_empty():
            raise ValueError("no pixel")
    except (KeyError, OverflowError, TypeError, ValueError):
        abort(400, f"{NO_FACE}: four finite numbers.")
    return face, dlib.rectangle(*sides)


@service.app_errorhandler(Exception)
def refuse(error):
    """Answer an error with its reason, as JSON, and log it: the app shows the status."""
    answer = error.get_response() if isinstance(error, HTTPException) else Response()
    if isinstance(error, NotFound):
        reason = "There is nothing here: /welcome tells what runs, README.md what else."
    elif isinstance(error, HTTPException):
        reason = error.description
    elif isinstance(error, Refusal):
        answer.status_code, reason = error.args
    elif isinstance(error, (MemoryError, OSError)):
        answer.status_code = 507
        lacking = getattr(error, "strerror", None) or str(error) or "none left"
        reason = f"Add memory, disk or open files: {lacking}"
    else:
        answer.status_code = 500
        reason = "The service failed: its log says why."
        log.exception("Internal error")
    # A client that still sends would not get the answer.  If reading is what has failed,
    # that error is the cause of this one: no need to wait for more.
    with suppress(Exception):
        while not error.__cause__ and request.stream.read(1 << 16):
            pass
    size, status = request.content_length or 0, answer.status_code
    log.warning("%r of %d bytes: %d, %s", request.path, size, status, reason)
    answer.data, answer.mimetype = json.dumps({"error": reason}), "application/json"
    return answer


def create_app(settings=None):
    """Load the models, and return the Flask application."""
    settings = settings or checked_settings()
    app = Flask(__name__, static_folder=None)
    app.request_class = UploadRequest
    app.json.sort_keys = False
    app.config.update(settings, ANALYSER=FaceAnalyser(settings))
    app.config["MAX_CONTENT_LENGTH"] = max(MOST_BYTES.values())
    app.register_blueprint(service)
    log.info("Version %s, dlib %s, model %d", __version__, DLIB, settings["FACE_MODEL"])
    return app


if __name__ == "__main__":
    sys.exit("Start it so: gunicorn -c .deploy/gunicorn.conf.py")
