"""Finds and describes the faces in photos, for Nextcloud's app Face Recognition.

The app's model 5 posts photos here, one a request, and gets back each face's box,
landmarks and descriptor as JSON:

    GET  /welcome   version, model and dlib; needs no key, but checks one that is sent
    GET  /health    "ok"; needs no key
    GET  /open      the largest area accepted, and the preferred type
    POST /detect    all faces of the photo in the form field ``file``
    POST /compute   the one face of ``file`` whose box is in the form field ``face``

Settings come from the environment (defaults in parentheses):

    API_KEY         the key shared with Nextcloud        (the content of ./api.key)
    FACE_MODEL      the app's number of the model, 1 to 4                       (1)
    HOST, PORT      the address to listen on              (all, IPv4 and IPv6; 5000)
    MAXIMUM_AREA    the most pixels of a photo   (3840 x 2160, or what memory holds)
    MAXIMUM_BODY    the most bytes of a photo; /compute accepts eight times (64 MiB)
    PHOTOS_AT_ONCE  how many photos are analysed in parallel          (one per core)
    DLIB_NUM_THREADS  how many cores dlib uses                                 (all)
    LOG_LEVEL       debug, info (a line per photo), warning or error          (info)

``python facerecognition-external-model.py`` runs it under gunicorn; ``flask run`` and
other WSGI servers find ``create_app`` or ``app``.
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
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

# One malloc arena for all threads: an arena for each takes half as much memory again.
# Images and tensors are mapped outside it, so that freeing them returns their memory.
libc = ctypes.CDLL(None)
with suppress(AttributeError):  # not glibc
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

logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s")
log = logging.getLogger("facerecognition")


# ---------------------------------------------------------------------------- settings


class Settings(NamedTuple):
    """Settings from the environment and the machine; constant while we run."""

    api_key: str
    face_model: int
    host: str
    port: int
    log_level: str
    maximum_area: int  # pixels of one photo
    maximum_body: int  # bytes of a request; for /compute eight times that
    photos_at_once: int
    memory: int  # bytes for all photos in flight, from what is free at the start
    memory_in_all: int  # bytes for a single photo, from what there is in total


BINDV6ONLY = Path("/proc/sys/net/ipv6/bindv6only")
ANY_ADDRESS = (
    "::" if BINDV6ONLY.exists() and "0" in BINDV6ONLY.read_text() else "0.0.0.0"
)
LOG_LEVELS = ("debug", "info", "warning", "error")
EXAMPLE_KEY = "put-the-output-of-openssl-rand-base64-32-here"  # as in api.key.example
MAKE_KEY = "openssl rand -base64 32 makes a good one."
SMALLER = "scale it down."
LESS_MEMORY = "lower PHOTOS_AT_ONCE or MAXIMUM_AREA, or add memory."


def read_settings():
    """Return the ``Settings``, or exit with one line that names the wrong setting."""
    log_level = (os.environ.get("LOG_LEVEL") or "info").strip().lower()
    if log_level not in LOG_LEVELS:
        sys.exit(f"LOG_LEVEL is {log_level!r}, but can be {', '.join(LOG_LEVELS)}.")
    log.setLevel(log_level.upper())
    for name in {"GUNICORN_WORKERS", "REQ_TIMEOUT"} & os.environ.keys():
        log.info("%s is not needed: all cores are used, and no photo times out.", name)
    face_model = _whole_number("FACE_MODEL", 1)
    if face_model not in MODELS:
        sys.exit(
            f"FACE_MODEL is {face_model}, but the models are 1, 2, 3 and 4: choose one."
        )
    check_model_files(face_model)
    # dlib reads it from the environment, at its first photo.
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
        host=os.environ.get("HOST") or ANY_ADDRESS,
        port=_whole_number("PORT", 5000, 65535),
        log_level=log_level,
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
    """Return the only line of a file that is neither empty nor a comment."""
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
    """Return maximum_area, photos_at_once, memory and memory_in_all.

    The area is a step of ``AREAS`` and depends on the total memory only, not on what is
    free: the app's jobs stop if it is smaller after a restart than the admin's setting.
    """
    pixel = bytes_per_pixel(face_model)
    total, available = _memory()
    room = total - BYTES_AT_REST - BYTES_OF_A_SET
    if not maximum_area:
        areas = [area for area in AREAS if area * pixel <= room]
        if not areas:
            needed = (total - room + AREAS[-1] * pixel >> 20) + 1
            sys.exit(f"{needed} MB of memory are needed, but there are {total >> 20}.")
        maximum_area = areas[0]
        if maximum_area < AREAS[0]:
            log.warning(
                "Memory is enough for photos of up to %d pixels.  Add memory, or set "
                "the app's area to at most that: otherwise its jobs stop.",
                maximum_area,
            )
    largest = maximum_area * pixel
    fitting = 1 + max(room - largest, 0) // BYTES_OF_A_SET
    at_once = photos_at_once or min(CORES, fitting)
    in_all = room - (at_once - 1) * BYTES_OF_A_SET
    room = in_all - (total - available)
    if largest > room or (photos_at_once or 0) * largest > room:
        log.warning(
            "Memory is enough for %d photos of the largest area at once; others wait.  "
            "If it runs out: %s",
            max(room // largest, 1),
            LESS_MEMORY,
        )
    return maximum_area, at_once, max(room, largest), max(in_all, largest)


def _memory():
    """Return the bytes of memory that this process can use, in total and now."""
    text = Path("/proc/meminfo").read_text()
    total, available = (
        1024 * int(re.search(rf"^{name}: *(\d+)", text, re.MULTILINE)[1])
        for name in ("MemTotal", "MemAvailable")
    )
    for group in _cgroups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # no such limit
                total = min(total, int((group / name).read_text()))
    return total, min(total, available)


def _count_cores():
    """Return how many cores this process can use.  A CPU quota is rounded up."""
    cores = len(os.sched_getaffinity(0))
    for group in _cgroups("cpu"):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            with suppress(OSError, ValueError):  # no such limit
                text = " ".join((group / name).read_text() for name in names)
                quota, period = map(int, text.split())
                cores = min(cores, -(-quota // period)) if quota > 0 else cores
    return cores


def _cgroups(controller):
    """Yield the folders of the cgroups (v1 or v2) that limit this process.

    These are its own and its parents.  A container may see its own as the root.
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
# check of model 4, is part of dlib.
MODELS = {
    1: (DETECTOR, LANDMARKS_5, DESCRIPTOR),
    2: (DETECTOR, LANDMARKS_68, DESCRIPTOR),
    3: (None, LANDMARKS_5, DESCRIPTOR),
    4: (DETECTOR, LANDMARKS_5, DESCRIPTOR),
}

HOG_CONFIDENCE = 1.1  # told to the app, as HOG gives none
SAME_FACE_OVERLAP = 0.35  # intersection over union
UNSEEN_FACTOR = 0.8  # for the confidence of a face that HOG does not find
SMALLEST_SIDE = 10  # pixels; dlib's CNN crashes on narrower images
BORDER = 11  # pixels of black that the CNN adds around an image

# The instruction set that vendor/dlib.patch is compiled for, or "" without the patch.
FAST_DLIB = getattr(dlib, "DLIB_FAST_FACES", "")
WIDEST_FOR_STOCK = 30000  # pixels; above 38,000 stock dlib writes out of bounds

# Steps of maximum_area: the app's largest, All-in-One's, Full HD, the app's smallest.
AREAS = (3840 * 2160, 4_320_000, 1920 * 1080, 640 * 480)
UNIT = 1 << 20  # bytes; the semaphore for memory counts in it
LARGEST_ORIGINAL = 200_000_000  # pixels of a photo for /compute
BYTES_AT_REST = 200 << 20  # of memory, with no photo in flight
BYTES_OF_A_SET = 40 << 20  # of a model set; there is one for each photo at once


def bytes_per_pixel(face_model):
    """Return the peak memory of /detect: what ``make memory`` says, and a margin."""
    return 70 if face_model == 3 else 120 if FAST_DLIB else 1050


class ModelSet(NamedTuple):
    """The dlib models for one photo at a time: running a network changes it."""

    cnn: "dlib.cnn_face_detection_model_v1 | None"
    hog: "dlib.fhog_object_detector | None"
    landmarks: dlib.shape_predictor
    descriptor: dlib.face_recognition_model_v1


def check_model_files(face_model):
    """Exit with one line unless the model's files match vendor/models.sha256."""
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
    """Load the ``ModelSet`` of a model (1 to 4), in 0.2 s.  All share its landmarks."""
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
    # The first run allocates filters and threads: if that fails, it fails at the start.
    describe_faces(models, blank, [dlib.rectangle(20, 20, 60, 60)])
    detect_faces(models, blank)
    return models


@functools.cache
def _load_landmarks(file):
    return dlib.shape_predictor(file)  # unlike a network it can run in parallel


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

    It is the box, extended on each side by its size.  dlib's landmarks, and the face
    chip cut out by them, reach 0.7 of that far.
    """
    width, height = size
    margin = max(box.width(), box.height())
    left = min(max(box.left() - margin, 0), width - 1)
    top = min(max(box.top() - margin, 0), height - 1)
    right = max(min(box.right() + margin + 1, width), left + 1)
    bottom = max(min(box.bottom() + margin + 1, height), top + 1)
    return left, top, right, bottom


def _seen(face, boxes):
    """Return whether one of the boxes is of the same face."""
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
    # One at a time: if cut out together, descriptors depend on the other faces (0.03).
    chips = [dlib.get_face_chip(pixels, shape, 150, 0.25) for shape in shapes]
    descriptors = models.descriptor.compute_face_descriptor(chips)
    return [
        (shape.parts(), list(descriptor))
        for shape, descriptor in zip(shapes, descriptors)
    ]


# ------------------------------------------------------------------------------ images

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
TILE_WIDTH, TILE_HEIGHT = 322, 323  # tags of a TIFF
LARGEST_TILE = 1 << 20  # pixels, of a TIFF that is smaller itself
BROKEN_IMAGE = "The image is broken or cut short: send the whole file."
START_OF_SCAN = b"\xff\xda"
MOST_SCANS = 100  # of a progressive JPEG; libjpeg writes ten, and each takes time
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.ENOENT, errno.EMFILE, errno.ENFILE),
)


def open_photo(file):
    """Read an image file's header; return a ``PIL.Image`` that is not decoded yet.

    Aborts with 415 if the file is none of ``FORMATS``, with 400 if it is broken, and
    with 412 if decoding takes far more time or memory than its size suggests.
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
            abort(412, "The TIFF's tiles are larger than it is: save it without tiles.")
        if image.format in ("JPEG", "MPO"):
            file.seek(0)
            parts = iter(functools.partial(file.read, 1 << 20), b"")
            if sum(part.count(START_OF_SCAN) for part in parts) > MOST_SCANS:
                abort(412, "The JPEG has too many scans: save it with fewer.")
    return image


def decoding_memory(image):
    """Return the peak memory, in bytes, of decoding an image."""
    direct = image.format in ("BMP", "JPEG", "MPO", "PNG") and image.mode not in "IF"
    pixel = 4 if direct and "progressive" not in image.info else 16
    return image.width * image.height * pixel


def decode(image, region):
    """Return a region's pixels in RGB, as a uint8 array of shape (height, width, 3).

    EXIF orientation is not applied.  ``region`` is left, top, right and bottom, the
    last two exclusive.  Aborts with 400 if the image is broken.
    """
    left, top, right, bottom = region
    with _refusals():
        image.load()
        if image.mode in ("I", "F"):  # scaled from the darkest to the lightest pixel
            values = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
            values -= values.min()
            values *= 255 / max(values.max(), 1e-9)
            image = Image.fromarray(values.astype(np.uint8))
        pixels = np.empty((bottom - top, right - left, 3), np.uint8)
        # In bands, because converting the whole image takes twice the memory.
        rows = (1 << 20) // (right - left) + 1
        for y in range(top, bottom, rows):
            band = image.crop((left, y, right, min(y + rows, bottom)))
            pixels[y - top : y - top + rows] = _rgb(band)
    return pixels


def _rgb(image):
    """Return an image's pixels in RGB.

    Transparent pixels are blended onto black like in dlib (``assign_pixel`` of an
    ``rgb_alpha_pixel``, in its pixel.h).  16-bit grey becomes 8-bit.
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
    """Turn any error in what a client sent into a 400."""
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
    """Accept file names in Latin-1, at which werkzeug fails, as well as in UTF-8."""
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
    sent = (sent or "").encode("latin-1")  # how WSGI decodes the bytes of headers
    if not hmac.compare_digest(sent, os.fsencode(_settings().api_key)):
        abort(401, "The API key is missing or wrong: send it in the header x-api-key.")
    if endpoint == "compute":
        request.max_content_length = 8 * _settings().maximum_body


@service.get("/welcome")
def welcome():
    """Return the version, model and dlib in use.  Checks a key if one is sent."""
    return {
        "facerecognition-external-model": "welcome",
        "version": __version__,
        "model": _settings().face_model,
        "dlib": about_dlib(),
    }


@service.get("/health")
def health():
    """Return "ok" while requests are answered."""
    return "ok", {"Content-Type": "text/plain"}


@service.get("/open")
def open_model():
    """Return which photos to send: the preferred type and the largest area."""
    return {
        "preferred_mimetype": "image/jpeg",
        "maximum_area": _settings().maximum_area,
    }


@service.post("/detect")
def detect():
    """Find and describe all faces of the photo in the field ``file``, as JSON."""
    upload = _posted_file()
    settings = _settings()
    image = open_photo(upload.stream)
    width, height = image.size
    # The app scales each photo to an area, then rounds its sides.
    if (width - 0.5) * (height - 0.5) > settings.maximum_area:
        abort(412, f"The image has more than {settings.maximum_area} pixels: {SMALLER}")
    # The CNN's border is negligible for a photo, but makes a thin strip much larger.
    bordered = (width + 2 * BORDER) * (height + 2 * BORDER)
    needed = bordered * bytes_per_pixel(settings.face_model)
    if (
        bordered > 1.25 * max(settings.maximum_area, AREAS[0])
        or needed > 1.25 * settings.memory_in_all
        or (width > WIDEST_FOR_STOCK and not FAST_DLIB)
    ):
        abort(412, f"The image is too narrow for its length: {SMALLER}")
    faces = analyse(image, (0, 0, width, height), needed, detect_faces)
    return {
        "filename": os.path.basename(upload.filename),
        "faces-count": len(faces),
        "faces": faces,
    }


@service.post("/compute")
def compute():
    """Describe the face of the photo in ``file`` whose box is in ``face``, as JSON.

    The photo can be larger than for ``/detect``, as only the face's surroundings count.
    """
    upload = _posted_file()
    face, box = _posted_face()
    image = open_photo(upload.stream)
    region = left, top, right, bottom = surroundings(box, image.size)
    needed = decoding_memory(image) + 4 * (right - left) * (bottom - top)
    memory = _settings().memory_in_all
    if image.width * image.height > LARGEST_ORIGINAL or needed > memory:
        abort(
            412, f"It takes {needed >> 20} MB to decode, of {memory >> 20}: {SMALLER}"
        )
    box = dlib.translate_rect(box, dlib.point(-left, -top))
    (described,) = analyse(image, region, needed, lambda models, pixels: [(box, None)])
    face |= {name: described[name] for name in ("landmarks", "descriptor")}
    return {"filename": os.path.basename(upload.filename), "face": face}


def analyse(image, region, needed, find):
    """Describe the faces that ``find(models, pixels)`` finds in a region of an image.

    Waits for ``needed`` bytes of memory, decodes the image, and waits for a model set.
    Returns a list of dicts, as in the answer to ``/detect``.
    """
    times = [time.monotonic()]
    if image.format == "AVIF":  # it can be larger than its header says: decode it alone
        needed = _settings().memory
    with _memory_for(needed):
        times.append(time.monotonic())
        pixels = decode(image, region)
        image.close()
        times.append(time.monotonic())
        with _free_model_set() as models:
            times.append(time.monotonic())
            if _client_is_gone():
                abort(400, "The client hung up while it waited.")
            found = find(models, pixels)
            times.append(time.monotonic())
            described = describe_faces(models, pixels, [box for box, _ in found])
    times.append(time.monotonic())
    waited, decoded, queued, detected, encoded = (
        1000 * (end - start) for start, end in pairwise(times)
    )
    log.info(
        "%s: %d faces in %d x %d pixels; ms: waited %.0f, decoded %.0f, detected %.0f, "
        "encoded %.0f",
        *(request.path, len(found), *image.size),
        *(waited + queued, decoded, detected, encoded),
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
    """Reserve memory, first come, first served, so that large photos get theirs."""
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

    A network that was interrupted crashes on the next photo.  So a set that fails is
    replaced by None, and loaded again when it is needed.
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
    except RuntimeError as error:  # dlib's: the files were checked, so memory ran out
        raise MemoryError from error


def _settings():
    return current_app.config["SETTINGS"]


def _posted_file():
    with _refusals("The request is malformed or broke off: send it again, whole."):
        files = request.files
    if "file" in request.form:
        abort(400, "The field file is text: send the photo as a file.")
    if "file" not in files:
        abort(400, "There is no photo: send it as a file, in the form's field file.")
    return files["file"]


def _posted_face():
    """Return the field ``face`` as a dict, and as the ``dlib.rectangle`` that it is."""
    try:
        text = request.form["face"]
        if text.count("[") + text.count("{") > 500:  # could nest too deep for json
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
    """Return whether the client has closed its connection.

    A client that only finished sending looks the same, until something is sent to it.
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
    """Answer a refused request with the reason, as JSON, after reading its body.

    If the connection were closed before, the client would not get the answer.
    """
    with suppress(Exception):  # more than twice the limit, or malformed
        request.max_content_length = 2 * _settings().maximum_body
        while request.stream.read(1 << 16):
            pass
    answer = error.get_response()
    answer.data = json.dumps({"error": error.description})
    answer.content_type = "application/json"
    return answer


@service.app_errorhandler(Exception)
def fail(error):
    """Answer an internal error: 507 if memory or disk are exhausted, otherwise 500."""
    if isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM:
        what = f"Memory is exhausted: {LESS_MEMORY}"
    elif getattr(error, "errno", None) in DISK_ERRORS:
        what = f"The photo can't be stored ({error.strerror}): make room in TMPDIR."
    else:
        log.exception("Internal error")
        return {"error": "The service failed: its log says why."}, 500
    log.error(what)
    return {"error": what}, 507


def about_dlib():
    """Return a line about the dlib in use that tells how fast it is."""
    cuda = "CUDA" if dlib.DLIB_USE_CUDA else "no CUDA"
    if not FAST_DLIB:
        return (
            f"{dlib.__version__} unpatched, {cuda}: slow, run make DLIB=patched setup"
        )
    threads = os.environ.get("DLIB_NUM_THREADS", CORES)
    return f"{dlib.__version__} patched, {FAST_DLIB}, {threads} threads, {cuda}"


def create_app(settings=None):
    """Load the models, and return the Flask application."""
    settings = settings or read_settings()
    Image.MAX_IMAGE_PIXELS = None  # each endpoint has its own limit
    MultipartDecoder._parse_headers = _parse_headers
    app = Flask(__name__, static_folder=None)
    app.json.sort_keys = False
    model_sets = queue.LifoQueue()  # the set used last is still in the CPU's cache
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
        "Version %s, model %d; dlib %s; %d photos at once, up to %d pixels, in %d MB",
        __version__,
        settings.face_model,
        about_dlib(),
        settings.photos_at_once,
        settings.maximum_area,
        settings.memory >> 20,
    )
    return app


# ------------------------------------------------------------------------------ server

SILENCE = 60  # seconds without sending or receiving, after which a client is dropped


def serve():
    """Serve with gunicorn until SIGTERM, then finish the photos in flight.

    One worker process holds the models.  It has a thread for each connection, so that
    clients wait for a model set instead of being refused.  SIGHUP starts a new worker
    process with the current code, key and models, and stops the old one gracefully.
    """
    from gunicorn.app.base import BaseApplication
    from gunicorn.workers.gthread import ThreadWorker

    settings = read_settings()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 1 << 16 if files == resource.RLIM_INFINITY else files
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    connections = max(min(1024, (files - 100) // 2), 1)  # a socket and a file for each

    class Threads(ThreadPoolExecutor):
        def _adjust_thread_count(self):
            with suppress(RuntimeError):  # no more threads: the existing ones go on
                super()._adjust_thread_count()

    class Worker(ThreadWorker):
        last_read = math.inf  # when a stopping worker no longer waits for uploads

        def get_thread_pool(self):
            return Threads(self.cfg.threads)

        def init_signals(self):
            super().init_signals()
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # meant for the main process

        def run(self):
            silence = struct.pack("ll", SILENCE, 0)
            for listener in self.sockets:  # connections inherit this
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, silence)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, silence)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                listener.setsockopt(socket.SOL_TCP, socket.TCP_KEEPIDLE, SILENCE)
            super().run()

        def set_accept_enabled(self, enabled):
            """When stopping, accept the backlog, as closing would reset it."""
            super().set_accept_enabled(enabled)
            if enabled or self.alive or not self.sockets:
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
            except OSError as error:  # such as too many open files
                log.error("A connection can't be accepted: %s", error.strerror)
                time.sleep(0.1)

        def handle(self, conn):
            """Answer; wait for slow clients here instead of in the accepting thread."""
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
            """Read from the client, unless a stop has waited long enough for that."""
            if time.monotonic() > self.last_read:
                raise TimeoutError("The upload was too slow for a stop to wait for")
            return chunk(*size)

    class Server(BaseApplication):
        create = staticmethod(functools.partial(create_app, settings))

        def load_config(self):
            options = {
                "bind": f"{host}:{settings.port}",
                "worker_class": Worker,
                "threads": connections,
                "worker_connections": connections,
                "timeout": 0,  # a photo may take any time
                "graceful_timeout": 3600,
                "keepalive": 0,  # a reused connection can close just as a photo is sent
                "control_socket_disable": True,
                "loglevel": settings.log_level,
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
                log.error("Not reloaded: %s", error)
            except Exception:
                log.exception("Not reloaded")
            super().reload()

    logging.getLogger("gunicorn.error").addFilter(_in_one_line)
    Server().run()


def _in_one_line(record):
    """Have gunicorn log a client's errors without a traceback."""
    if record.exc_info:
        record.msg = f"{record.msg} {record.exc_info[1]!r}"
        record.exc_info = None
    return True


def __getattr__(name):
    """Create ``app`` for WSGI servers that import it."""
    if name == "app":
        return create_app()
    raise AttributeError(name)


if __name__ == "__main__":
    serve()
