"""Finds and describes the faces in photos, for Nextcloud's app Face Recognition.

The app's model 5 posts photos, and gets each face's box, landmarks and descriptor as
JSON.  Settings come from the environment (defaults in parentheses):

    API_KEY         the key shared with Nextcloud        (the content of ./api.key)
    FACE_MODEL      the app's number of the model, 1 to 4                       (1)
    HOST, PORT      the address to listen on              (all, IPv4 and IPv6; 5000)
    MAXIMUM_AREA    what /open tells the app     (3840 x 2160, or what memory holds)
    PHOTOS_AT_ONCE  how many are analysed in parallel  (cores, or what memory holds)
"""

import hashlib
import hmac
import json
import logging
import os
import re
import resource
import signal
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import dlib
import numpy as np
from flask import Blueprint, Flask, Response, abort, current_app, jsonify, request
from PIL import Image, PngImagePlugin
from werkzeug.exceptions import HTTPException

__version__ = "1.0.0"
HERE = Path(__file__).resolve().parent
MODELS = json.loads((HERE / "vendor" / "models.json").read_text())
DLIB = f"{dlib.__version__}, {getattr(dlib, 'DLIB_FAST_FACES', 'stock and slow')}"
log = logging.getLogger("facerecognition")


# ---------------------------------------------------------------------------- settings

# Bytes, as "make memory" measures them.  A photo in flight has a model set.
MEMORY_AT_REST = 160 << 20
MEMORY_PER_PHOTO = 104 << 20
MEMORY_PER_PIXEL = 64 if hasattr(dlib, "DLIB_FAST_FACES") else 1050
REFERENCE_AREA = 3840 * 2160  # pixels; the reference service's maximum_area
SMALLEST_AREA = 640 * 480  # pixels; the least that the app can be set to
EXAMPLE_KEY = "put-the-output-of-openssl-rand-base64-32-here"  # as in api.key.example


def read_settings():
    """Return Flask's configuration, or exit with one line that names what is wrong."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s")
    face_model = _whole_number("FACE_MODEL", 1, largest=4)
    # From all the memory there is, not from what is free: the app's jobs stop if the
    # area is smaller after a restart than what its admin has set.
    memory = _memory() - MEMORY_AT_REST
    per_pixel = MEMORY_PER_PIXEL * 11 // 10  # with the CNN's border
    fitting = (memory - MEMORY_PER_PHOTO) // per_pixel // 100_000 * 100_000
    area = _whole_number("MAXIMUM_AREA", min(REFERENCE_AREA, fitting))
    largest = MEMORY_PER_PHOTO + per_pixel * area
    at_once = min(len(os.sched_getaffinity(0)), memory // largest)
    at_once = _whole_number("PHOTOS_AT_ONCE", max(at_once, 1))
    if area < SMALLEST_AREA:
        sys.exit(f"MAXIMUM_AREA, or memory, is too small for {SMALLEST_AREA} pixels.")
    if at_once * largest > memory:
        photos = f"{at_once} photos (PHOTOS_AT_ONCE) of {area} pixels (MAXIMUM_AREA)"
        sys.exit(f"Memory is too small for {photos}: lower these, or add memory.")
    return {
        "API_KEY": _read_api_key(),
        "FACE_MODEL": face_model,
        "MODEL_FILES": check_model_files(face_model),
        "MAXIMUM_AREA": area,
        "PHOTOS_AT_ONCE": at_once,
        "PHOTO_MEMORY": memory // at_once,
    }


def _whole_number(name, default, largest=10**9):
    text = os.environ.get(name, "").strip()
    if text and not (re.fullmatch("[0-9]{1,10}", text) and 0 < int(text) <= largest):
        sys.exit(f"{name} is {text!r}: give a whole number from 1 to {largest}.")
    return int(text or default)


def _read_api_key():
    key, file = os.environ.get("API_KEY", "").strip(), HERE / "api.key"
    with suppress(OSError, ValueError):
        key = key or file.read_text("utf-8-sig").strip()
    if len(key.split()) != 1 or key == EXAMPLE_KEY:
        sys.exit(f"No key can be read from API_KEY or {file}: openssl rand -base64 32.")
    return key


def _memory():
    """Return how many bytes of memory the machine, or our cgroup (v1 or v2), has."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        group = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
        for folder in (group, *group.parents):  # a container can see its own as the top
            for name in ("memory.max", "memory.limit_in_bytes"):
                with suppress(OSError, ValueError):  # no such limit
                    memory = min(memory, int((folder / name).read_text()))
    return memory


# ------------------------------------------------------------------------------ models

SAME_FACE = 0.35  # overlap, from which on a box of HOG is of the same face
UNSEEN_FACTOR = 0.8  # for the confidence of a face that HOG does not find
load_landmarks = cache(dlib.shape_predictor)  # unlike a network, it can be shared


def check_model_files(model):
    """Return a model's files, or exit with one line unless all are there and whole."""
    folder = HERE / "vendor" / "models" / str(model)
    files = [folder / name for name in MODELS["models"][str(model)]]
    for file in files:
        known = MODELS["files"][file.name]
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""
        if digest == known.get("later"):
            log.warning("%s is a later training: boxes differ by some pixels.", file)
        elif digest != known["sha256"]:
            sys.exit(f"{file} is missing or damaged: make FACE_MODEL={model} setup")
    return [str(file) for file in files]


def load_model_set(settings):
    """Load a model's parts from dlib, for one photo at a time: running changes them."""
    model = settings["FACE_MODEL"]
    *cnn, landmarks, describer = settings["MODEL_FILES"]
    try:
        return SimpleNamespace(
            cnn=dlib.cnn_face_detection_model_v1(*cnn) if cnn else None,
            hog=dlib.get_frontal_face_detector() if model in (3, 4) else None,
            landmarks=load_landmarks(landmarks),
            descriptor=dlib.face_recognition_model_v1(describer),
        )
    except RuntimeError as error:  # dlib's; the files were checked, so memory ran out
        raise MemoryError(str(error)) from error


def own_models(own, settings):
    """Return the model set of the calling thread, from its local data; load it first."""
    own.models = getattr(own, "models", None) or load_model_set(settings)
    return own.models


def detect_faces(models, pixels):
    """Find the faces in an RGB image.

    ``pixels`` is a uint8 array of shape (height, width, 3).  Returns a list of pairs, a
    ``dlib.rectangle`` in pixels and a confidence, in the detector's order.
    """
    if min(pixels.shape[:2]) < 10:  # dlib's CNN crashes on narrower images
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
    if not boxes:
        return []
    shapes = [models.landmarks(pixels, box) for box in boxes]
    # One at a time: if cut out together, others change a descriptor by up to 0.03.
    chips = [dlib.get_face_chip(pixels, shape, 150, 0.25) for shape in shapes]
    descriptors = models.descriptor.compute_face_descriptor(chips)
    return [(shape.parts(), list(d)) for shape, d in zip(shapes, descriptors)]


# ------------------------------------------------------------------------------ images

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")  # what dlib.load_rgb_image reads
SIGNATURES = re.compile(rb"BM|GIF8|\xff\xd8\xff|\x89PNG|RIFF....WEBP", re.DOTALL)
BROKEN = "The image is broken: send the whole file."


def open_photo(file):
    """Read an image file's header; return a ``PIL.Image`` that is not decoded yet.

    Aborts with 415 if the file is none of ``FORMATS``, and with 400 if it is broken.
    """
    start = file.read(12)
    if start and not SIGNATURES.match(start):
        abort(415, f"This is no image that is read here: send {', '.join(FORMATS)}.")
    if start.startswith(b"\xff\xd8"):
        # What is cut short is decoded as far as it goes, if libjpeg finds ends enough.
        file.seek(0, os.SEEK_END)
        file.write(b"\xff\xd9" * 512)
    file.seek(0)
    with _refusals(BROKEN):
        return Image.open(file, formats=FORMATS)


def decode(image, region):
    """Return a region's pixels in RGB, as a uint8 array of shape (height, width, 3).

    ``region`` is left, top, right and bottom, the last two exclusive.  EXIF orientation
    is not applied.  16-bit grey becomes 8-bit.  Transparent pixels are blended onto
    black, as by dlib (``assign_pixel`` of an ``rgb_alpha_pixel``, in its pixel.h).
    """
    with _refusals(BROKEN):
        cut = image.crop(region)
    image.close()
    if cut.mode.startswith("I;16"):
        cut = Image.fromarray((np.asarray(cut) >> 8).astype(np.uint8))
    if "A" not in cut.getbands() and "transparency" not in cut.info:
        return np.asarray(cut.convert("RGB"))
    rgba = np.asarray(cut.convert("RGBA"))
    alpha = rgba[..., 3:].astype(np.uint16)
    return (rgba[..., :3] * (alpha + (alpha == 255)) >> 8).astype(np.uint8)


@contextmanager
def _refusals(what):
    """Turn any error but the system's, such as a full disk, into a 400."""
    try:
        yield
    except Exception as error:
        system = isinstance(error, MemoryError) or getattr(error, "errno", 0)
        if system or getattr(error, "code", 400) != 400:  # of HTTP
            raise
        abort(400, what)


# ----------------------------------------------------------------------------- service

service = Blueprint("service", __name__)
MOST_BYTES = {"/detect": 64 << 20, "/compute": 512 << 20}  # of a request
NO_FACE = "Send the face's left, top, right and bottom as JSON in the field face."


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
    request.max_form_parts = 8  # small ones stay in memory until all have come


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
    name, image = _posted_photo()
    pixels = (image.width + 22) * (image.height + 22)  # the CNN adds 11 on each side
    faces = run(MEMORY_PER_PIXEL * pixels, image, (0, 0, *image.size))
    return {"filename": name, "faces-count": len(faces), "faces": faces}


@service.post("/compute")
def compute():
    """Describe the face of the photo in ``file`` whose box is in ``face``, as JSON.

    The photo can be a large original: only what the face depends on is analysed, its
    box extended by its size.  dlib's landmarks and face chip reach 0.7 of that far.
    """
    name, image = _posted_photo()
    with _refusals(NO_FACE):
        face = json.loads(request.form.get("face", ""), parse_constant=int)  # not NaN
        sides = [round(face[side]) for side in ("left", "top", "right", "bottom")]
        box = dlib.rectangle(*sides)
        if box.is_empty() or max(map(abs, sides)) > 1 << 20:
            raise ValueError
    margin = max(box.width(), box.height())
    left = min(max(box.left() - margin, 0), image.width - 1)
    top = min(max(box.top() - margin, 0), image.height - 1)
    right = max(min(box.right() + margin + 1, image.width), left + 1)
    bottom = max(min(box.bottom() + margin + 1, image.height), top + 1)
    # GIF, WebP and progressive JPEG take four times the memory while they are decoded.
    buffered = image.format in ("GIF", "WEBP") or "progressive" in image.info
    whole = (16 if buffered else 4) * image.width * image.height
    part = (right - left) * (bottom - top)
    converting = (14 if image.mode in ("L", "RGB") else 26) * part
    needed, region = max(whole + 4 * part, converting), (left, top, right, bottom)
    (described,) = run(needed, image, region, box)
    face |= {key: described[key] for key in ("landmarks", "descriptor")}
    with _refusals(NO_FACE):  # which can nest too deep to be written
        return jsonify(filename=name, face=face)


def _posted_photo():
    """Return the name and the ``PIL.Image`` of the file in the form's field ``file``."""
    with _refusals("The request is malformed or broke off: send it again, whole."):
        upload = request.files.get("file")
    if upload is None:
        abort(400, "There is no photo, or it broke off: send it as the form's file.")
    return os.path.basename(upload.filename or ""), open_photo(upload.stream)


def run(needed, image, region, box=None):
    """Analyse a region of an image that takes so many bytes, or abort with 412."""
    needed, most = needed + MEMORY_PER_PHOTO, current_app.config["PHOTO_MEMORY"]
    if needed > most:
        memory = f"{needed >> 20} MB of memory, of {most >> 20} that there are for one"
        abort(412, f"The photo takes {memory}: scale it down, or lower PHOTOS_AT_ONCE.")
    return current_app.config["SUBMIT"](image, region, box, time.monotonic()).result()


def analyse(own, settings, image, region, box, queued):
    """Describe the face in ``box``, or all faces of a region, as ``/detect`` answers."""
    began = time.monotonic()
    pixels = decode(image, region)
    x, y, _, _ = region
    models = own_models(own, settings)
    own.models = None  # until all is well: a network that was interrupted can crash
    if box:
        found = [(dlib.translate_rect(box, dlib.point(-x, -y)), None)]
    else:
        found = detect_faces(models, pixels)
    described = describe_faces(models, pixels, [box for box, _ in found])
    own.models = models
    message = "%d faces in %d x %d pixels; waited %.3f s, took %.3f s"
    log.info(message, len(found), *image.size, began - queued, time.monotonic() - began)
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


@service.app_errorhandler(Exception)
def refuse(error):
    """Answer an error with its reason, as JSON, and log it: the app shows the status."""
    if isinstance(error, HTTPException):
        answer, reason = error.get_response(), error.description
    elif isinstance(error, (MemoryError, OSError)):
        answer, reason = Response(status=507), getattr(error, "strerror", error)
        reason = f"Add memory, disk or open files: {reason or 'none left'}"
    else:
        answer, reason = Response(status=500), "The service failed: its log says why."
        log.exception("Internal error")
    with suppress(Exception):  # a client that still sends would not get the answer
        while not error.__context__ and request.stream.read(1 << 16):
            pass
    size, status = request.content_length or 0, answer.status_code
    log.warning("%r of %d bytes: %d, %s", request.path, size, status, reason)
    answer.data, answer.mimetype = json.dumps({"error": reason}), "application/json"
    return answer


def create_app(settings=None):
    """Load the models, and return the Flask application."""
    settings = settings or read_settings()
    Image.MAX_IMAGE_PIXELS = None  # what a photo may take in memory is the limit
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # and large profiles
    pool, own = ThreadPoolExecutor(settings["PHOTOS_AT_ONCE"]), threading.local()
    pool.submit(own_models, own, settings).result()  # others load when needed
    app = Flask(__name__, static_folder=None)
    app.json.sort_keys = False
    app.config.update(settings, SUBMIT=partial(pool.submit, analyse, own, settings))
    app.config["MAX_CONTENT_LENGTH"] = max(MOST_BYTES.values())
    app.register_blueprint(service)
    log.info("Version %s, dlib %s, model %d", __version__, DLIB, settings["FACE_MODEL"])
    return app


# ------------------------------------------------------------------------------ server

SILENCE = struct.pack("ll", 60, 0)  # seconds after which a silent client is dropped


def serve():
    """Serve with gunicorn until SIGTERM, then finish the photos in flight.

    A single process has the models, and a thread for each connection: clients wait.
    """
    from gunicorn.app.base import BaseApplication

    settings = read_settings()
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    options = {
        "bind": _listen(),
        "workers": 1,
        "worker_tmp_dir": "/dev/shm" if os.access("/dev/shm", os.W_OK) else None,
        "threads": 1000,  # its worker class is gthread then
        "timeout": 0,  # a photo may take any time
        "graceful_timeout": 300,
        "keepalive": 0,  # a reused connection can close just as a photo is sent
        "limit_request_fields": 50,
        "limit_request_field_size": 2048,
        "forwarded_allow_ips": "",  # nobody's SCRIPT_NAME or X-Forwarded-Proto counts
        "control_socket_disable": True,
        "post_worker_init": _init_worker,
        "post_request": _hang_up,
        "when_ready": lambda _: signal.signal(  # SIGHUP: the terminal was closed
            signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM)
        ),
    }

    class Server(BaseApplication):
        def load_config(self):
            for name, value in options.items():
                self.cfg.set(name, value)

        load = staticmethod(partial(create_app, settings))

    logging.getLogger("gunicorn.error").addFilter(_in_one_line)
    Server().run()


def _listen():
    """Return what gunicorn binds to; exit if nothing can listen there."""
    host, port = os.environ.get("HOST", ""), _whole_number("PORT", 5000, largest=65535)
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        return []  # gunicorn takes systemd's sockets
    both = host in ("", "::") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        server = socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except OSError as error:
        sys.exit(f"Can't listen on HOST {host!r}, PORT {port}: {error}.")
    server.listen(2048)
    return f"fd://{server.detach()}"


def _init_worker(worker):
    for listener in worker.sockets:  # connections inherit this
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, SILENCE)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SILENCE)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the main process gets it, too


def _hang_up(worker, request, environ, answer):
    """Read no more: else gunicorn's main thread waits 2 s for the client to close."""
    with suppress(KeyError, OSError):
        environ["gunicorn.socket"].shutdown(socket.SHUT_RD)


def _in_one_line(record):
    """Have gunicorn log a client's errors in one line, without what it sent."""
    record.msg, record.args = record.getMessage(), ()
    if record.exc_info and isinstance(record.exc_info[1], OSError):
        record.msg += f" {record.exc_info[1]}"
        record.exc_info = None
    if record.msg.startswith("Invalid request"):
        record.msg = record.msg.split(": ")[0]  # it can quote the key
    return True


if __name__ == "__main__":
    serve()
