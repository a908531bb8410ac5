"""Finds and describes the faces in photos, for Nextcloud's app Face Recognition.

The app's model 5 posts photos here, one a request, and gets back each face's box,
landmarks and descriptor as JSON:

    GET  /welcome   who is there; needs no key, but checks one that is sent
    GET  /health    "ok"; needs no key
    GET  /open      the largest photo taken, and the preferred type
    POST /detect    all faces of the photo in the form's field ``file``
    POST /compute   the one face of ``file`` whose box is in the field ``face``

Settings come from the environment:

    API_KEY         the key shared with Nextcloud; else the file api.key beside this one
    FACE_MODEL      1 to 4, the app's number of the model                            (1)
    HOST, PORT      where to listen                                      (0.0.0.0, 5000)
    MAXIMUM_AREA    the most pixels of a photo       (3840 x 2160, or what memory holds)
    MAXIMUM_BODY    the most bytes of a photo; for /compute eight times that    (64 MiB)
    PHOTOS_AT_ONCE  how many are analysed at a time                       (one per core)
    DLIB_NUM_THREADS  how many cores one photo may use, as dlib names it           (all)

``python facerecognition-external-model.py`` serves it with gunicorn; ``flask run`` and
other WSGI servers find ``create_app``, or ``app``.
"""

import ctypes
import errno
import functools
import hashlib
import hmac
import json
import logging
import math
import os
import queue
import re
import resource
import runpy
import signal
import socket
import stat
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

# One heap for all threads, as several take half as much again.  Images and tensors lie
# outside of it, so that their memory goes back to the system; the rest is kept.
libc = ctypes.CDLL(None)
with suppress(AttributeError):  # of another libc
    libc.mallopt(-8, 1)  # M_ARENA_MAX
    libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD

import dlib
import numpy as np
from flask import Blueprint, Flask, abort, current_app, request
from PIL import Image, UnidentifiedImageError
from werkzeug.exceptions import HTTPException
from werkzeug.sansio.multipart import MultipartDecoder

__version__ = "1.0.0"

HERE = Path(__file__).resolve().parent

logging.basicConfig(
    stream=sys.stdout,
    level=logging.INFO,
    format="%(asctime)s %(levelname)s %(message)s",
)
log = logging.getLogger("facerecognition")


# ---------------------------------------------------------------------------- settings


class Settings(NamedTuple):
    """What the environment and the machine decide; it does not change while we run."""

    api_key: str
    face_model: int
    host: str
    port: int
    maximum_area: int  # pixels of one photo
    maximum_body: int  # bytes of a request; for /compute eight times that
    photos_at_once: int
    memory: int  # bytes for all photos together: what is free, or the largest photo's
    memory_in_all: int  # bytes that one photo may take at the most


EXAMPLE_KEY = "put-the-output-of-openssl-rand-base64-32-here"  # as in api.key.example
MAKE_KEY = "openssl rand -base64 32 makes a good one."
SMALLER = "scale it down."
LESS_MEMORY = "lower PHOTOS_AT_ONCE or MAXIMUM_AREA, or add memory."


def read_settings():
    """Return the ``Settings``, or exit with a line that says which is wrong."""
    face_model = _whole_number("FACE_MODEL", 1)
    if face_model not in MODELS:
        sys.exit(
            f"FACE_MODEL is {face_model}, but the models are 1, 2, 3 and 4: choose one."
        )
    check_model_files(face_model)
    # dlib reads this itself, at its first photo, and fails then if it is no number.
    threads = _whole_number("DLIB_NUM_THREADS", CORES, 1024)
    os.environ["DLIB_NUM_THREADS"] = str(threads)
    maximum_area, photos_at_once, memory, memory_in_all = _fit_memory(
        face_model,
        _whole_number("MAXIMUM_AREA", None),
        _whole_number("PHOTOS_AT_ONCE", None),
    )
    return Settings(
        api_key=_read_api_key(),
        face_model=face_model,
        host=os.environ.get("HOST") or "0.0.0.0",
        port=_whole_number("PORT", 5000, 65535),
        maximum_area=maximum_area,
        maximum_body=_whole_number("MAXIMUM_BODY", 64 << 20),
        photos_at_once=photos_at_once,
        memory=memory,
        memory_in_all=memory_in_all,
    )


def _whole_number(name, default, largest=10**15):
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (re.fullmatch("[0-9]{1,16}", text) and 0 < int(text) <= largest):
        sys.exit(f"{name} is {text!r}: give a whole number from 1 to {largest}.")
    return int(text)


def _read_api_key():
    file = HERE / "api.key"
    from_file = not os.environ.get("API_KEY", "").strip()
    key = _key_in(file) if from_file else os.environ["API_KEY"].strip()
    if key in ("", EXAMPLE_KEY):
        sys.exit(f"The API key (API_KEY or {file}) is empty or an example. {MAKE_KEY}")
    if from_file and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("Others on this machine can read %s: chmod 600 it.", file)
    return key


def _key_in(file):
    """Return the file's one line that is neither empty nor a comment."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except FileNotFoundError:
        sys.exit(
            f"There is no API key: set API_KEY, or put one into {file}. {MAKE_KEY}"
        )
    except (OSError, ValueError) as error:
        sys.exit(f"{file} can't be read ({error}): correct that, or set API_KEY.")
    keys = [line for line in lines if line and not line.startswith("#")]
    if len(keys) > 1:
        sys.exit(f"{file} has {len(keys)} lines: leave only the key. {MAKE_KEY}")
    return "".join(keys)


def _fit_memory(face_model, maximum_area, photos_at_once):
    """Return the largest area, how many photos at once, and bytes: free, and in all.

    The area depends only on how much memory there is in all, in steps: the app stops
    when it is smaller after a restart than what its admin has set.
    """
    pixel = bytes_per_pixel(face_model)
    total, available = _memory()
    room = total - BYTES_AT_REST - BYTES_OF_A_SET
    if not maximum_area:
        areas = [area for area in AREAS if area * pixel <= room]
        if not areas:
            needed = (total - room + AREAS[-1] * pixel >> 20) + 1
            sys.exit(f"There are {total >> 20} MB of memory, but it takes {needed}.")
        maximum_area = areas[0]
        if maximum_area < AREAS[0]:
            log.warning(
                "Memory holds photos of up to %d pixels: with a larger area set, the "
                "app stops.  Set it there to at most that, or add memory.",
                maximum_area,
            )
    largest = maximum_area * pixel
    fitting = 1 + max(room - largest, 0) // BYTES_OF_A_SET
    at_once = photos_at_once or min(CORES, fitting)
    in_all = room - (at_once - 1) * BYTES_OF_A_SET
    room = in_all - (total - available)
    if largest > room or (photos_at_once or 0) * largest > room:
        log.warning(
            "Memory holds %d photos of the largest area at once: further ones wait.  "
            "If it runs out: %s",
            max(room // largest, 1),
            LESS_MEMORY,
        )
    return maximum_area, at_once, max(room, largest), max(in_all, largest)


def _memory():
    """Return the bytes of memory that there are for this process, and that are free."""
    text = Path("/proc/meminfo").read_text()
    total, available = (
        1024 * int(re.search(rf"^{name}: *(\d+)", text, re.MULTILINE)[1])
        for name in ("MemTotal", "MemAvailable")
    )
    for group in _control_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # no such limit
                total = min(total, int((group / name).read_text()))
    return total, min(total, available)


def _count_cores():
    """Return how many cores this process may use; of a CPU quota a part counts, too."""
    cores = len(os.sched_getaffinity(0))
    for group in _control_groups("cpu"):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            with suppress(OSError, ValueError):  # no such limit
                text = " ".join((group / name).read_text() for name in names)
                quota, period = map(int, text.split())
                cores = min(cores, -(-quota // period)) if quota > 0 else cores
    return cores


def _control_groups(controller):
    """Yield the folders of the control groups, version 1 or 2, that limit this process.

    Those around its own limit it, too; and a container may see its own as their root.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            group = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
            yield from (group, *group.parents)


CORES = _count_cores()


# ------------------------------------------------------------------------------ models

DETECTOR = "mmod_human_face_detector.dat"
LANDMARKS_5 = "shape_predictor_5_face_landmarks.dat"
LANDMARKS_68 = "shape_predictor_68_face_landmarks.dat"
DESCRIPTOR = "dlib_face_recognition_resnet_model_v1.dat"

# The files of each model, in vendor/models/N.  HOG, the detector of model 3 and the
# second opinion of model 4, is a part of dlib.
MODELS = {
    1: (DETECTOR, LANDMARKS_5, DESCRIPTOR),
    2: (DETECTOR, LANDMARKS_68, DESCRIPTOR),
    3: (None, LANDMARKS_5, DESCRIPTOR),
    4: (DETECTOR, LANDMARKS_5, DESCRIPTOR),
}

HOG_CONFIDENCE = 1.1  # it gives none of its own: this is what the app is told
SAME_FACE_OVERLAP = 0.35  # intersection over union
UNSEEN_FACTOR = 0.8  # for the confidence of a face that HOG does not see
SMALLEST_SIDE = 10  # pixels of an image; dlib's CNN crashes on less
BORDER = 11  # pixels of black that the CNN surrounds an image with

FAST_DLIB = hasattr(dlib, "DLIB_FAST_FACES")  # whether vendor/dlib.patch is in it
WIDEST_FOR_STOCK = 30000  # pixels; beyond 38,000 the stock dlib overwrites memory

# Pixels of /detect's photos: of the app's largest, All-in-One's, Full HD, the app's least.
AREAS = (3840 * 2160, 4_320_000, 1920 * 1080, 640 * 480)
UNIT = 1 << 20  # bytes, in which memory is counted
LARGEST_ORIGINAL = 200_000_000  # pixels of /compute's: more than any phone takes
BYTES_AT_REST = 200 << 20  # of memory, with no photo in work
BYTES_OF_A_SET = 40 << 20  # of models, for each photo at once


def bytes_per_pixel(face_model):
    """Return what /detect takes at its peak, as ``make memory`` finds, and some."""
    return 70 if face_model == 3 else 120 if FAST_DLIB else 1050


class ModelSet(NamedTuple):
    """What an analysis needs of dlib: for one at a time, as networks change in use."""

    cnn: "dlib.cnn_face_detection_model_v1 | None"
    hog: "dlib.fhog_object_detector | None"
    landmarks: dlib.shape_predictor
    descriptor: dlib.face_recognition_model_v1


def check_model_files(face_model):
    """Exit with one line if a file of the model is not, to the bit, as released."""
    known = (HERE / "vendor" / "models.sha256").read_text().splitlines()
    fetch = f"make FACE_MODEL={face_model} download-models"
    for name in filter(None, MODELS[face_model]):
        file = _model_file(face_model, name)
        try:
            with open(file, "rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            sys.exit(f"{file} can't be read ({error.strerror}): {fetch}")
        if f"{digest}  {name}" not in known:
            sys.exit(f"{file} is damaged: delete it, then {fetch}")


def load_model_set(face_model):
    """Load the networks of a model (1 to 4), in 0.2 s; all sets share its landmarks."""
    detector, landmarks, descriptor = (
        name and _model_file(face_model, name) for name in MODELS[face_model]
    )
    blank = np.zeros((80, 80, 3), np.uint8)
    models = ModelSet(
        cnn=detector and dlib.cnn_face_detection_model_v1(detector),
        hog=dlib.get_frontal_face_detector() if face_model in (3, 4) else None,
        landmarks=_load_landmarks(landmarks),
        descriptor=dlib.face_recognition_model_v1(descriptor),
    )
    # What dlib makes at the first photo, filters and threads, is there from the start.
    describe_faces(models, blank, [dlib.rectangle(20, 20, 60, 60)])
    detect_faces(models, blank)
    return models


@functools.cache
def _load_landmarks(file):
    return dlib.shape_predictor(file)  # using it does not change it, unlike a network


def _model_file(face_model, name):
    return str(HERE / "vendor" / "models" / str(face_model) / name)


def detect_faces(models, pixels):
    """Find the faces in an RGB image.

    ``pixels`` is a uint8 array of shape (height, width, 3).  Returns a list of pairs, a
    ``dlib.rectangle`` in pixels and a confidence, in the detector's order.
    """
    if min(pixels.shape[:2]) < SMALLEST_SIDE:
        return []
    if not models.cnn:
        return [(box, HOG_CONFIDENCE) for box in models.hog(pixels, 1)]
    faces = models.cnn(pixels, 0)
    if not models.hog or not faces:
        return [(face.rect, face.confidence) for face in faces]
    boxes = models.hog(pixels, 1)
    factors = [1 if _seen(face.rect, boxes) else UNSEEN_FACTOR for face in faces]
    return [(face.rect, face.confidence * x) for face, x in zip(faces, factors)]


def surroundings(box, size):
    """Return the region (left, top, right, bottom) of an image that a face depends on.

    It goes beyond the box by the box's size.  The points at which dlib's landmarks look,
    and what is cut out around them, lie within 0.7 of that.
    """
    width, height = size
    margin = max(box.width(), box.height())
    left = min(max(box.left() - margin, 0), width - 1)
    top = min(max(box.top() - margin, 0), height - 1)
    right = max(min(box.right() + margin + 1, width), left + 1)
    bottom = max(min(box.bottom() + margin + 1, height), top + 1)
    return left, top, right, bottom


def _seen(face, boxes):
    """Tell whether one of the boxes overlaps the face enough to be the same."""
    for box in boxes:
        common = face.intersect(box).area()
        if common >= SAME_FACE_OVERLAP * (face.area() + box.area() - common):
            return True
    return False


def describe_faces(models, pixels, boxes):
    """Return each ``dlib.rectangle``'s landmarks (points) and descriptor (128 numbers).

    The descriptor is that of dlib's ResNet for the face aligned by its landmarks with a
    padding of 0.25, without jitter.  Faces whose descriptors are closer than 0.6
    (Euclidean) are one person's: http://dlib.net/face_recognition.py.html
    """
    if not boxes:
        return []
    shapes = [models.landmarks(pixels, box) for box in boxes]
    # One by one: cut out together, they would change each other's descriptors by 0.03.
    chips = [dlib.get_face_chip(pixels, shape, 150, 0.25) for shape in shapes]
    descriptors = models.descriptor.compute_face_descriptor(chips)
    return [
        (shape.parts(), list(descriptor))
        for shape, descriptor in zip(shapes, descriptors)
    ]


# ------------------------------------------------------------------------------ images

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # what photos come in
TILE_WIDTH, TILE_HEIGHT = 322, 323  # tags of a TIFF
LARGEST_TILE = 1 << 20  # pixels; a small image may have a larger tile
BROKEN_IMAGE = "The image is broken or cut short: send the whole file."
START_OF_SCAN = b"\xff\xda"
MOST_SCANS = 100  # of a JPEG; libjpeg writes ten, and each takes time
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.ENOENT, errno.EMFILE, errno.ENFILE),
)


def open_photo(file):
    """Read an image file's header; return a ``PIL.Image`` that is not decoded yet.

    Aborts with 415 if the file is none of ``FORMATS``, with 400 if it is one that is
    broken, and with 412 if decoding it takes more than an image of its size does.
    """
    with _refusals():
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            file.seek(0)
            start = file.read(32)
            if start and not any(Image.OPEN[name][1](start) for name in FORMATS):
                abort(415, f"This is no image read here: send {', '.join(FORMATS)}.")
            raise
        tags = getattr(image, "tag_v2", {})
        if tags.get(TILE_WIDTH, 0) * tags.get(TILE_HEIGHT, 0) > max(
            image.width * image.height, LARGEST_TILE
        ):
            abort(412, "The image's tiles are larger than itself: save it without.")
        if image.format in ("JPEG", "MPO"):
            file.seek(0)
            parts = iter(functools.partial(file.read, 1 << 20), b"")
            if sum(part.count(START_OF_SCAN) for part in parts) > MOST_SCANS:
                abort(412, "The JPEG has too many scans: save it with fewer.")
    return image


def decoding_memory(image):
    """Return about how many bytes decoding the image takes at its peak."""
    direct = image.format in ("BMP", "JPEG", "MPO", "PNG") and image.mode not in "IF"
    pixel = 4 if direct and "progressive" not in image.info else 16
    return image.width * image.height * pixel


def decode(image, region):
    """Return a region's pixels in RGB, as a uint8 array of shape (height, width, 3).

    They are the file's, whatever its EXIF orientation.  ``region`` is left, top, right
    and bottom, the latter two exclusive.  Aborts with 400 if the image is broken.
    """
    left, top, right, bottom = region
    with _refusals():
        image.load()
        if image.mode in ("I", "F"):  # their lightest pixel is taken for white
            values = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
            values -= values.min()
            values *= 255 / max(values.max(), 1e-9)
            image = Image.fromarray(values.astype(np.uint8))
        pixels = np.empty((bottom - top, right - left, 3), np.uint8)
        # A band at a time, as converting all at once takes twice the memory.
        rows = (1 << 20) // (right - left) + 1
        for y in range(top, bottom, rows):
            band = image.crop((left, y, right, min(y + rows, bottom)))
            pixels[y - top : y - top + rows] = _rgb(band)
    return pixels


def _rgb(image):
    """Return an image's pixels in RGB.

    Transparent ones are blended onto black as dlib does it (``assign`` of an
    ``rgb_alpha_pixel`` in its pixel.h); greys of 16 bits are scaled down to 8.
    """
    if image.mode.startswith("I;16"):
        return (np.asarray(image) >> 8)[..., np.newaxis]
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        alpha = rgba[..., 3:].astype(np.uint16)
        return rgba[..., :3] * (alpha + (alpha == 255)) >> 8
    return np.asarray(image.convert("RGB"))


@contextmanager
def _refusals(what=BROKEN_IMAGE):
    """Turn what is raised by what a client sent, anything, into the client's error."""
    try:
        yield
    except (HTTPException, MemoryError):
        raise
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOMEM, *DISK_ERRORS):
            raise
        abort(400, what)


# ----------------------------------------------------------------------------- service

service = Blueprint("service", __name__)


strictly_parsed = getattr(MultipartDecoder, "_parse_headers", None)


def _parse_headers(self, data):
    """Have werkzeug take a file name in Latin-1, too, as long as it has this method."""
    try:
        return strictly_parsed(self, data)
    except UnicodeDecodeError:
        return strictly_parsed(self, data.decode("latin-1").encode())


@service.before_request
def check_key():
    """Abort with 401 unless the request carries the API key, or needs none."""
    sent = request.headers.get("x-api-key")
    endpoint = request.endpoint.removeprefix("service.")
    if endpoint == "health" or (endpoint == "welcome" and sent is None):
        return
    sent = (sent or "").encode("latin-1")  # the bytes that came, as WSGI has them
    if not hmac.compare_digest(sent, os.fsencode(_settings().api_key)):
        abort(401, "The API key is missing or wrong: send it in the header x-api-key.")
    if endpoint == "compute":
        request.max_content_length = 8 * _settings().maximum_body


@service.get("/welcome")
def welcome():
    """Say who is there, and on what dlib; needs no key, but a wrong one is told."""
    return {
        "facerecognition-external-model": "welcome",
        "version": __version__,
        "model": _settings().face_model,
        "dlib": about_dlib(),
    }


@service.get("/health")
def health():
    """Say that requests are answered."""
    return "ok", {"Content-Type": "text/plain"}


@service.get("/open")
def open_model():
    """Say what photos to send: of what type, and of how many pixels at the most."""
    return {
        "preferred_mimetype": "image/jpeg",
        "maximum_area": _settings().maximum_area,
    }


@service.post("/detect")
def detect():
    """Find and describe all faces of the photo in the field ``file``."""
    upload = _posted_file()
    settings = _settings()
    image = open_photo(upload.stream)
    width, height = image.size
    # The app scales photos to an area, and then rounds their sides.
    if (width - 0.5) * (height - 0.5) > settings.maximum_area:
        abort(412, f"The image has more than {settings.maximum_area} pixels: {SMALLER}")
    # To a photo the black around it is nothing, but a thin strip grows several times.
    bordered = (width + 2 * BORDER) * (height + 2 * BORDER)
    needed = bordered * bytes_per_pixel(settings.face_model)
    if (
        bordered > 1.25 * max(settings.maximum_area, AREAS[0])
        or needed > 1.25 * settings.memory_in_all
        or (width > WIDEST_FOR_STOCK and not FAST_DLIB)
    ):
        abort(412, f"The image is too thin a strip: {SMALLER}")
    faces = analyse(image, (0, 0, width, height), needed, detect_faces)
    return {
        "filename": os.path.basename(upload.filename),
        "faces-count": len(faces),
        "faces": faces,
    }


@service.post("/compute")
def compute():
    """Describe the face of the photo in ``file`` whose box is in ``face``, as JSON.

    The photo may be larger than for ``/detect``: only the face's surroundings count.
    """
    upload = _posted_file()
    face, box = _posted_face()
    image = open_photo(upload.stream)
    region = left, top, right, bottom = surroundings(box, image.size)
    needed = decoding_memory(image) + 4 * (right - left) * (bottom - top)
    memory = _settings().memory_in_all
    if image.width * image.height > LARGEST_ORIGINAL or needed > memory:
        abort(412, f"The image takes {needed >> 20} MB, of {memory >> 20}: {SMALLER}")
    box = dlib.translate_rect(box, dlib.point(-left, -top))
    (described,) = analyse(image, region, needed, lambda models, pixels: [(box, None)])
    face |= {name: described[name] for name in ("landmarks", "descriptor")}
    return {"filename": os.path.basename(upload.filename), "face": face}


def analyse(image, region, needed, find):
    """Describe the faces that ``find(models, pixels)`` finds in a region of an image.

    It waits for ``needed`` bytes of memory, is decoded, and waits for a model set.
    Returns a list of dicts, as the answer to ``/detect`` has them.
    """
    asked = time.monotonic()
    if image.format == "AVIF":  # what is in it may be larger than it says: alone, then
        needed = _settings().memory
    with _memory_for(needed):
        began = time.monotonic()
        pixels = decode(image, region)
        image.close()
        decoded = time.monotonic()
        with _free_model_set() as models:
            started = time.monotonic()
            if _client_is_gone():
                abort(400, "The client hung up while it waited.")
            found = find(models, pixels)
            described = describe_faces(models, pixels, [box for box, _ in found])
    log.info(
        "%s: %d faces in %d x %d pixels, %.0f ms after %.0f of decoding and %.0f of waiting",
        request.path,
        len(found),
        *image.size,
        1000 * (time.monotonic() - started),
        1000 * (decoded - began),
        1000 * (began - asked + started - decoded),
    )
    x, y, _, _ = region
    return [
        {
            "detection_confidence": confidence,
            "left": x + box.left(),
            "top": y + box.top(),
            "right": x + box.right(),
            "bottom": y + box.bottom(),
            "landmarks": [{"x": x + point.x, "y": y + point.y} for point in landmarks],
            "descriptor": descriptor,
        }
        for (box, confidence), (landmarks, descriptor) in zip(found, described)
    ]


@contextmanager
def _memory_for(needed):
    """Wait until so many bytes are free; in turn, so that large photos get theirs."""
    memory, turn = current_app.config["MEMORY"], current_app.config["TURN"]
    units = max(min(needed, _settings().memory) // UNIT, 1)
    with turn:
        for _ in range(units):
            memory.acquire()
    try:
        yield
    finally:
        memory.release(units)


@contextmanager
def _free_model_set():
    """Wait for a model set, and lend it.

    None takes the place of one that failed, as an interrupted network crashes on the
    next photo: then it is loaded anew.
    """
    model_sets = current_app.config["MODEL_SETS"]
    models = model_sets.get()
    try:
        models = models or _reload_model_set()
        yield models
    except HTTPException:
        raise
    except BaseException:
        models = None
        raise
    finally:
        model_sets.put(models)


def _reload_model_set():
    try:
        return load_model_set(_settings().face_model)
    except RuntimeError as error:  # dlib's, for refused memory: the files are right
        raise MemoryError from error


def _settings():
    return current_app.config["SETTINGS"]


def _posted_file():
    with _refusals("The request is malformed or broke off: send it again, whole."):
        files = request.files
    if "file" in request.form:
        abort(400, "The photo came as text: send the field file as a file.")
    if "file" not in files:
        abort(400, "There is no photo: send it as a file, in the form's field file.")
    return files["file"]


def _posted_face():
    """Return the field ``face`` as a dict, and as the ``dlib.rectangle`` that it is."""
    try:
        text = request.form["face"]
        if text.count("[") + text.count("{") > 500:  # nested, that is too deep for JSON
            raise ValueError
        face = json.loads(text)
        json.dumps(face, allow_nan=False)
        sides = [face[side] for side in ("left", "top", "right", "bottom")]
        if not all(type(x) in (int, float) and abs(x) < 1 << 20 for x in sides):
            raise ValueError
        box = dlib.rectangle(*map(round, sides))
        if box.is_empty():
            raise ValueError
    except (KeyError, TypeError, ValueError):
        abort(
            400,
            "There is no face: send it as a JSON object in the form's field face, with "
            "left, top, right and bottom in pixels, left <= right and top <= bottom.",
        )
    return face, box


def _client_is_gone():
    """Tell whether the client has closed the connection that waits for its answer.

    One that has only finished sending looks the same, until something is sent to it.
    """
    environ = request.environ
    client = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    try:
        if not client or client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            return False
        if environ["SERVER_PROTOCOL"] == "HTTP/1.1":  # 1.0 has no interim answers
            client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            time.sleep(0.05)
            return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False


@service.app_errorhandler(HTTPException)
def refuse(error):
    """Answer what is wrong with a request as JSON, once its body is read.

    A connection that is closed before that loses its answer.
    """
    with suppress(Exception):  # it is more than twice the limit, or malformed
        request.max_content_length = 2 * _settings().maximum_body
        while request.stream.read(1 << 16):
            pass
    answer = error.get_response()
    answer.data = json.dumps({"error": error.description})
    answer.content_type = "application/json"
    return answer


@service.app_errorhandler(Exception)
def fail(error):
    """Answer what is wrong here: with 507 if memory or disk run out, else with 500."""
    if isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM:
        what = f"There is too little memory: {LESS_MEMORY}"
    elif getattr(error, "errno", None) in DISK_ERRORS:
        what = f"The photo can't be kept ({error.strerror}): make room in TMPDIR."
    else:
        log.exception("A fault of the service's own")
        return {"error": "The service failed: its log says why."}, 500
    log.error(what)
    return {"error": what}, 507


def about_dlib():
    """Return a line about the dlib in use, and how fast that is."""
    cuda = "CUDA" if dlib.DLIB_USE_CUDA else "no CUDA"
    if not FAST_DLIB:
        return f"{dlib.__version__} as released, {cuda}: slow, make DLIB=patched setup"
    threads = os.environ.get("DLIB_NUM_THREADS", CORES)
    return f"{dlib.__version__} patched, {threads} threads, {cuda}"


def create_app(settings=None):
    """Load the models, and return the Flask application that answers for them."""
    settings = settings or read_settings()
    Image.MAX_IMAGE_PIXELS = None  # each call has its own limit
    MultipartDecoder._parse_headers = _parse_headers
    app = Flask(__name__, static_folder=None)
    app.json.sort_keys = False
    model_sets = queue.LifoQueue()  # the last one used is still in the CPU's cache
    for _ in range(settings.photos_at_once):
        model_sets.put(load_model_set(settings.face_model))
    app.config.update(
        SETTINGS=settings,
        MODEL_SETS=model_sets,
        MEMORY=threading.Semaphore(max(settings.memory // UNIT, 1)),
        TURN=threading.Lock(),
        MAX_CONTENT_LENGTH=settings.maximum_body,
    )
    app.register_blueprint(service)
    log.info(
        "Version %s, model %d; dlib %s; %d photos at once, of up to %d pixels, in %d MB",
        __version__,
        settings.face_model,
        about_dlib(),
        settings.photos_at_once,
        settings.maximum_area,
        settings.memory >> 20,
    )
    return app


# ------------------------------------------------------------------------------ server

SILENCE = 60  # seconds that a client may send nothing, or take nothing


def serve():
    """Serve with gunicorn until SIGTERM, then finish what is in work.

    There is one worker process, so that the models are in memory once, and a thread for
    each connection: they wait for the models rather than be refused.  SIGHUP replaces
    the worker by one with the code, key and models that are there then.
    """
    from gunicorn.app.base import BaseApplication
    from gunicorn.workers.gthread import ThreadWorker

    settings = read_settings()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 1 << 16 if files == resource.RLIM_INFINITY else files
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    connections = max(min(1024, (files - 100) // 2), 1)  # each may have a file, too

    class Threads(ThreadPoolExecutor):
        def _adjust_thread_count(self):
            with suppress(RuntimeError):  # refused: those that there are will do it
                super()._adjust_thread_count()

    class Worker(ThreadWorker):
        last_read = math.inf  # when it stops to wait for what clients send

        def get_thread_pool(self):
            return Threads(self.cfg.threads)

        def init_signals(self):
            super().init_signals()
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it means the main process

        def run(self):
            silence = struct.pack("ll", SILENCE, 0)
            for listener in self.sockets:  # connections inherit this
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, silence)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, silence)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                listener.setsockopt(socket.SOL_TCP, socket.TCP_KEEPIDLE, SILENCE)
            super().run()

        def set_accept_enabled(self, enabled):
            """Told to stop, take what waits, then refuse: what is left would break."""
            super().set_accept_enabled(enabled)
            if self.alive or not self.sockets:
                return
            for listener in self.sockets:
                accepted = -1
                while accepted != self.nr_conns:
                    accepted = self.nr_conns
                    self.accept(listener)
                listener.close()
            self.sockets = []
            self.last_read = time.monotonic() + SILENCE

        def accept(self, listener):
            try:
                super().accept(listener)
            except OSError as error:  # too many files are open, for one
                log.error("No connection can be taken: %s", error.strerror)
                time.sleep(0.1)

        def handle(self, conn):
            """Answer, and wait here, not in the accepting thread, for the client."""
            conn.data_ready = True
            conn.init()
            unreader = conn.parser.unreader
            unreader.chunk = functools.partial(self.read, unreader.chunk)
            keep = super().handle(conn)
            if not keep:
                conn.close(graceful=True)
                conn.close = lambda graceful=False: None
            return keep

        def read(self, chunk, *size):
            """Read on, unless a stop has waited for that long enough."""
            if time.monotonic() > self.last_read:
                raise TimeoutError("The photo came too slowly for a stop to wait for")
            return chunk(*size)

    class Server(BaseApplication):
        create = functools.partial(create_app, settings)

        def load_config(self):
            options = {
                "bind": f"{host}:{settings.port}",
                "worker_class": Worker,
                "threads": connections,
                "worker_connections": connections,
                "timeout": 0,  # no photo is too slow
                "graceful_timeout": 3600,
                "keepalive": 0,  # one kept for the next photo may break under it
                "control_socket_disable": True,
            }
            for name, value in options.items():
                self.cfg.set(name, value)

        def load(self):
            try:
                return self.create()
            except (MemoryError, RuntimeError) as error:
                time.sleep(1)  # then gunicorn starts the next worker
                sys.exit(f"The models can't be loaded ({error}): {LESS_MEMORY}")

        def reload(self):
            try:
                module = runpy.run_path(__file__)
                fresh = module["read_settings"]()
                self.create = functools.partial(module["create_app"], fresh)
            except SystemExit as error:
                log.error("Going on with what was there before. %s", error)
            except Exception:
                log.exception("Going on with what was there before")
            super().reload()

    logging.getLogger("gunicorn.error").addFilter(_in_one_line)
    Server().run()


def _in_one_line(record):
    """Have gunicorn log what a client did wrong without a traceback."""
    if record.exc_info:
        record.msg = f"{record.msg} {record.exc_info[1]!r}"
        record.exc_info = None
    return True


def __getattr__(name):
    """Make ``app``, for WSGI servers that look for it, only when it is asked for."""
    if name == "app":
        return create_app()
    raise AttributeError(name)


if __name__ == "__main__":
    serve()
