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
    MAXIMUM_BODY    the most bytes of a request                                 (64 MiB)
    PHOTOS_AT_ONCE  how many are analysed at a time     (one a core, or as memory holds)
    DLIB_NUM_THREADS  how many cores one photo may use, as dlib names it           (all)

``python facerecognition-external-model.py`` serves it with gunicorn; ``flask run`` and
other WSGI servers find ``create_app``, or ``app``.
"""

import ctypes
import functools
import hashlib
import hmac
import json
import logging
import os
import queue
import re
import socket
import stat
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

# dlib spreads a photo's work over threads of its own: a BLAS with more of them would
# only get in their way.  It reads this when dlib loads it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# On an ARM CPU with SME (so AT_HWCAP2 says) OpenBLAS 0.3.34 computes nothing, and no
# photo has faces: have it take the code for an older one.
libc = ctypes.CDLL(None)
if os.uname().machine == "aarch64" and libc.getauxval(26) & 1 << 23:
    os.environ.setdefault("OPENBLAS_CORETYPE", "NEOVERSEN1")

# One heap for all threads: several, as glibc has them, take half as much again.
with suppress(AttributeError):  # of another libc
    libc.mallopt(-8, 1)  # M_ARENA_MAX

import dlib
import numpy as np
from flask import Blueprint, Flask, abort, current_app, request
from PIL import Image, UnidentifiedImageError
from werkzeug.exceptions import HTTPException

__version__ = "1.0.0"

HERE = Path(__file__).resolve().parent
CORES = len(os.sched_getaffinity(0))

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
    maximum_body: int  # bytes of one request
    photos_at_once: int


EXAMPLE_KEY = "put-the-output-of-openssl-rand-base64-32-here"  # as in api.key.example
MAKE_KEY = "openssl rand -base64 32 makes a good one."
LESS_MEMORY = "lower PHOTOS_AT_ONCE or MAXIMUM_AREA, or add some."


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
    maximum_area, photos_at_once = _fit_memory(
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
    key = os.environ.get("API_KEY", "").strip()
    from_file = not key
    try:
        key = key or file.read_text("utf-8").strip()
    except FileNotFoundError:
        sys.exit(
            f"There is no API key: set API_KEY, or put one into {file}. {MAKE_KEY}"
        )
    except (OSError, ValueError) as error:
        sys.exit(f"{file} can't be read ({error}): mend that, or set API_KEY.")
    if key in ("", EXAMPLE_KEY):
        sys.exit(f"The API key (API_KEY or {file}) is empty or an example. {MAKE_KEY}")
    if from_file and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("Others on this machine can read %s: chmod 600 it.", file)
    return key


def _fit_memory(face_model, maximum_area, photos_at_once):
    """Return both numbers, those that are None as large as memory allows."""
    room = _free_memory() - BYTES_AT_REST
    pixel = bytes_per_pixel(face_model)
    if not maximum_area:
        held = (room // (photos_at_once or 1) - BYTES_OF_A_SET) // pixel
        maximum_area = max(min(LARGEST_AREA, held), 1)
    if not photos_at_once:
        held = room // (maximum_area * pixel + BYTES_OF_A_SET)
        photos_at_once = max(min(CORES, held), 1)
    return maximum_area, photos_at_once


def _free_memory():
    """Return the bytes that are free, or a control group's limit where that is less."""
    limits = [
        1024 * int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    ]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # versions 2 and 1
            group = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
            # Its parents limit it, too; and a container may see itself as their root.
            for folder in (group, *group.parents):
                for name in ("memory.max", "memory.limit_in_bytes"):
                    with suppress(OSError, ValueError):  # no such limit
                        limits.append(int((folder / name).read_text()))
    return min(limits)


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

# Whether this is the dlib with vendor/dlib.patch.
FAST_DLIB = getattr(dlib, "DLIB_SCIPY_OPENBLAS", False)

LARGEST_AREA = 3840 * 2160
BYTES_AT_REST = 300 << 20  # of memory, with no photo in work
BYTES_OF_A_SET = 40 << 20  # of models, for each photo at once


def bytes_per_pixel(face_model):
    """Return what an analysis takes at its peak, as ``make memory`` finds, and some."""
    if FAST_DLIB or face_model == 3:
        return {1: 215, 2: 215, 3: 105, 4: 290}[face_model]
    return 1050


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
    return ModelSet(
        cnn=detector and dlib.cnn_face_detection_model_v1(detector),
        hog=dlib.get_frontal_face_detector() if face_model in (3, 4) else None,
        landmarks=_load_landmarks(landmarks),
        descriptor=dlib.face_recognition_model_v1(descriptor),
    )


@functools.cache
def _load_landmarks(file):
    return dlib.shape_predictor(file)  # using it does not change it, unlike a network


def _model_file(face_model, name):
    return str(HERE / "vendor" / "models" / str(face_model) / name)


def detect_faces(models, pixels, alone=True):
    """Find the faces in an RGB image.

    ``pixels`` is a uint8 array of shape (height, width, 3).  Returns a list of pairs, a
    ``dlib.rectangle`` in pixels and a confidence, in the detector's order.

    Model 4 has HOG judge the faces of the CNN: beside it if ``alone`` says that no
    other photo wants the cores, and else after it, only if there is a face to judge.
    """
    if min(pixels.shape[:2]) < SMALLEST_SIDE:
        return []
    if not models.cnn:
        return [(box, HOG_CONFIDENCE) for box in models.hog(pixels, 1)]
    if not models.hog:
        return [(face.rect, face.confidence) for face in models.cnn(pixels, 0)]
    with ThreadPoolExecutor(1) as beside:
        hog = beside.submit(models.hog, pixels, 1) if alone else None
        faces = models.cnn(pixels, 0)
    boxes = []
    if faces:
        boxes = hog.result() if hog else models.hog(pixels, 1)
    factors = [1 if _seen(face.rect, boxes) else UNSEEN_FACTOR for face in faces]
    return [(face.rect, face.confidence * x) for face, x in zip(faces, factors)]


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


def open_photo(file, maximum_area):
    """Read an image file's header; return a ``PIL.Image`` that is not decoded yet.

    Aborts with 415 if the file is none of ``FORMATS``, with 400 if it is one that is
    broken, and with 412 if the image has more than ``maximum_area`` pixels.
    """
    with _refusals(maximum_area):
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            file.seek(0)
            start = file.read(32)
            if start and not any(Image.OPEN[name][1](start) for name in FORMATS):
                abort(415, f"This is no image read here: send {', '.join(FORMATS)}.")
            raise
        # To a photo the black around it is nothing: no JPEG, whose sides end at 65500,
        # grows by a quarter.  But a strip one pixel wide becomes 23 times as large.
        bordered = (image.width + 2 * BORDER) * (image.height + 2 * BORDER)
        if bordered > 1.25 * maximum_area:
            raise Image.DecompressionBombError
    return image


def decode(image, maximum_area):
    """Return an image's pixels in RGB, as a uint8 array of shape (height, width, 3).

    They are the file's, whatever its EXIF orientation.  Transparent ones are blended
    onto black as dlib does it (``assign`` of an ``rgb_alpha_pixel`` in its pixel.h);
    greys of more than 8 bits are scaled down to 8.  Aborts with 400 if it is broken.
    """
    with _refusals(maximum_area):
        if image.mode.startswith("I;16"):
            return _grey(np.asarray(image) >> 8)
        if image.mode in ("I", "F"):  # their lightest pixel is taken for white
            values = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
            values -= values.min()
            return _grey(values * (255 / max(values.max(), 1e-9)))
        if image.has_transparency_data:
            rgba = np.asarray(image.convert("RGBA"))
            alpha = rgba[..., 3:].astype(np.uint16)
            return (rgba[..., :3] * (alpha + (alpha == 255)) >> 8).astype(np.uint8)
        return np.asarray(image.convert("RGB"))


def _grey(values):
    return np.repeat(values.astype(np.uint8)[..., np.newaxis], 3, axis=2)


@contextmanager
def _refusals(maximum_area):
    """Turn what Pillow raises, of a broken image anything, into the client's error."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        abort(412, f"The image has more than {maximum_area} pixels: scale it down.")
    except (HTTPException, MemoryError):
        raise
    except Exception as error:
        if getattr(error, "errno", None):  # the disk's fault, not the image's
            raise
        abort(400, "The image is broken or cut short: send the whole file.")


# ----------------------------------------------------------------------------- service

service = Blueprint("service", __name__)


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
    faces = analyse(upload, detect_faces)
    return {
        "filename": os.path.basename(upload.filename),
        "faces-count": len(faces),
        "faces": faces,
    }


@service.post("/compute")
def compute():
    """Describe the face of the photo in ``file`` whose box is in ``face``, as JSON."""
    upload = _posted_file()
    face, box = _posted_face()
    (described,) = analyse(upload, lambda models, pixels, alone: [(box, None)])
    face |= {name: described[name] for name in ("landmarks", "descriptor")}
    return {"filename": os.path.basename(upload.filename), "face": face}


def analyse(upload, find):
    """Describe the faces that ``find(models, pixels, alone)`` finds in an upload.

    The photo waits as a file until a model set is free, then is decoded.
    Returns a list of dicts, as the answer to ``/detect`` has them.
    """
    maximum_area = _settings().maximum_area
    image = open_photo(upload.stream, maximum_area)
    asked = time.monotonic()
    with _free_model_set() as (models, alone):
        started = time.monotonic()
        if _client_is_gone():
            abort(400, "The client hung up while it waited.")
        pixels = decode(image, maximum_area)
        found = find(models, pixels, alone)
        described = describe_faces(models, pixels, [box for box, _ in found])
    log.info(
        "%s: %d faces in %d x %d pixels, %.0f ms after %.0f ms of waiting",
        request.path,
        len(found),
        *image.size,
        1000 * (time.monotonic() - started),
        1000 * (started - asked),
    )
    return [
        {
            "detection_confidence": confidence,
            "left": box.left(),
            "top": box.top(),
            "right": box.right(),
            "bottom": box.bottom(),
            "landmarks": [{"x": point.x, "y": point.y} for point in landmarks],
            "descriptor": descriptor,
        }
        for (box, confidence), (landmarks, descriptor) in zip(found, described)
    ]


@contextmanager
def _free_model_set():
    """Wait for a model set, and lend it with whether all others are free.

    One that failed is replaced: an interrupted network crashes on the next photo.
    """
    model_sets = current_app.config["MODEL_SETS"]
    models = model_sets.get()
    try:
        yield models, model_sets.qsize() == _settings().photos_at_once - 1
    except HTTPException:
        raise
    except Exception:
        models = load_model_set(_settings().face_model)
        raise
    finally:
        model_sets.put(models)


def _settings():
    return current_app.config["SETTINGS"]


def _posted_file():
    if "file" not in request.files:
        abort(400, "There is no photo: send it as a file, in the form's field file.")
    return request.files["file"]


def _posted_face():
    """Return the field ``face`` as a dict, and as the ``dlib.rectangle`` that it is."""
    try:
        face = json.loads(request.form["face"])
        json.dumps(face, allow_nan=False)
        sides = [face[side] for side in ("left", "top", "right", "bottom")]
        if not all(type(x) in (int, float) and abs(x) < 1 << 20 for x in sides):
            raise ValueError
        box = dlib.rectangle(*map(round, sides))
        if box.is_empty():
            raise ValueError
    except (KeyError, TypeError, ValueError, RecursionError):
        abort(
            400,
            "There is no face: send it as a JSON object in the form's field face, with "
            "left, top, right and bottom in pixels, left <= right and top <= bottom.",
        )
    return face, box


def _client_is_gone():
    """Tell whether the client has closed the connection that waits for its answer."""
    environ = request.environ
    client = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    try:
        return client and not client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


@service.app_errorhandler(HTTPException)
def refuse(error):
    """Answer what is wrong with a request as JSON, once its body is read.

    A connection that is closed before that loses its answer.
    """
    with suppress(HTTPException):  # it is more than twice the limit, or ends too early
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
    if isinstance(error, MemoryError):
        what = f"There is too little memory: {LESS_MEMORY}"
    elif isinstance(error, OSError):
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
    import scipy_openblas32

    kernel = scipy_openblas32.get_openblas_config().split()[-2]
    speed = f"OpenBLAS for {kernel}, {os.environ['DLIB_NUM_THREADS']} threads"
    return f"{dlib.__version__} patched, {speed}, {cuda}"


def create_app(settings=None):
    """Load the models, and return the Flask application that answers for them."""
    settings = settings or read_settings()
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = settings.maximum_area
    app = Flask(__name__, static_folder=None)
    app.json.sort_keys = False
    model_sets = queue.LifoQueue()  # the last one used still has its memory
    for _ in range(settings.photos_at_once):
        model_sets.put(load_model_set(settings.face_model))
    app.config.update(
        SETTINGS=settings,
        MODEL_SETS=model_sets,
        MAX_CONTENT_LENGTH=settings.maximum_body,
    )
    app.register_blueprint(service)
    log.info(
        "Version %s, model %d; dlib %s; %d photos at once, of up to %d pixels",
        __version__,
        settings.face_model,
        about_dlib(),
        settings.photos_at_once,
        settings.maximum_area,
    )
    return app


def serve():
    """Serve with gunicorn until SIGTERM, then finish what is in work.

    There is one process, so that the models are in memory once, and a thread for each
    request: they wait for the models rather than be refused.
    """
    from gunicorn.app.base import BaseApplication
    from gunicorn.workers.gthread import ThreadWorker

    settings = read_settings()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host

    class Worker(ThreadWorker):
        def set_accept_enabled(self, enabled):
            """Told to stop, take what waits, then refuse: what is left would break."""
            super().set_accept_enabled(enabled)
            for listener in self.sockets if not self.alive else ():
                accepted = -1
                while accepted != self.nr_conns:
                    accepted = self.nr_conns
                    self.accept(listener)
                listener.close()

    class Server(BaseApplication):
        def load_config(self):
            options = {
                "bind": f"{host}:{settings.port}",
                "worker_class": Worker,
                "threads": 512,
                "worker_connections": 1024,
                "timeout": 0,  # no photo is too slow
                "graceful_timeout": 3600,
                "keepalive": 0,  # one kept for the next photo may break under it
                "control_socket_disable": True,
                "post_fork": _tell_of_replacement,
            }
            for name, value in options.items():
                self.cfg.set(name, value)

        def load(self):
            return create_app(settings)

    Server().run()


def _tell_of_replacement(server, worker):
    if worker.age > 1:
        log.error(
            "The server process died, and is replaced; photos it had in work are lost."
            "  If memory ran out (SIGKILL): %s",
            LESS_MEMORY,
        )


def __getattr__(name):
    """Make ``app``, for WSGI servers that look for it, only when it is asked for."""
    if name == "app":
        return create_app()
    raise AttributeError(name)


if __name__ == "__main__":
    serve()
