"""Shared by tests and tools: starting a service, a client of it, and photos."""

import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image
from werkzeug.datastructures import FileStorage
from werkzeug.test import encode_multipart

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "tests" / "photos"
KEY = "a-key-for-tests"

sys.path.insert(0, str(ROOT))
module = importlib.import_module("facerecognition-external-model")


class Service:
    """A running service, and a client of it."""

    def __init__(self, process, port):
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def request(self, path, form=None, key=KEY, headers=None, body=None):
        """Return (status, answer): JSON decoded, anything else as text.

        A tuple (file, filename) in the form is sent as a file.
        """
        headers = dict(headers or {})
        if key is not None:
            headers["x-api-key"] = key
        if form is not None:
            form = {
                name: FileStorage(*value) if type(value) is tuple else value
                for name, value in form.items()
            }
            boundary, body = encode_multipart(form)
            headers["Content-Type"] = f"multipart/form-data; boundary={boundary}"
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, _content(answer)
        except urllib.error.HTTPError as error:
            return error.code, _content(error)

    def detect(self, photo, filename="photo.jpg", **options):
        return self.request(
            "/detect", {"file": (io.BytesIO(photo), filename)}, **options
        )

    def compute(self, photo, face, **options):
        face = face if isinstance(face, str) else json.dumps(face)
        return self.request(
            "/compute",
            {"file": (io.BytesIO(photo), "photo.jpg"), "face": face},
            **options,
        )

    def worker(self):
        """The process id of the one process that answers."""
        children = Path(
            f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        ).read_text()
        return int(children.split()[0])

    def log(self):
        return Path(self.process.log).read_text()


class App(Service):
    """The same client for an application in this process, without server and network."""

    def __init__(self, model, **settings):
        self.model = model
        settings |= {"API_KEY": KEY, "FACE_MODEL": str(model)}
        with mock.patch.dict(os.environ, settings):
            self.app = module.create_app()

    def request(self, path, form=None, key=KEY, headers=None, body=None):
        headers = dict(headers or {})
        if key is not None:
            headers["x-api-key"] = key
        if form is not None:
            headers["Content-Type"] = "multipart/form-data"
        sent = body if form is None else form
        answer = self.app.test_client().open(
            path, method="GET" if sent is None else "POST", data=sent, headers=headers
        )
        return answer.status_code, answer.json if answer.is_json else answer.text


def _content(answer):
    content = answer.read()
    if answer.headers.get_content_type() == "application/json":
        return json.loads(content)
    return content.decode()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def started(tmp, command=None, port=None, inherit=False, **settings):
    """Run a service with these settings; its temporary files and log are in ``tmp``."""
    port = port or free_port()
    temporary = tmp / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    environ = {
        **os.environ,
        "API_KEY": KEY,
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "TMPDIR": str(temporary),
        **{name: str(value) for name, value in settings.items()},
    }
    with open(tmp / "log", "a") as log:
        process = subprocess.Popen(
            command or [sys.executable, "facerecognition-external-model.py"],
            cwd=ROOT,
            env=environ,
            stdout=log,
            stderr=log,
            start_new_session=True,
            close_fds=not inherit,
        )
    process.log = tmp / "log"
    service = Service(process, port)
    try:
        wait_until_up(service)
        yield service
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise


def wait_until_up(service):
    for _ in range(600):
        try:
            assert service.request("/health", key=None) == (200, "ok")
            return
        except OSError:
            assert service.process.poll() is None, service.log()
            time.sleep(0.05)
    raise AssertionError("the service does not answer")


def photo(name):
    return (PHOTOS / name).read_bytes()


def picture(name):
    return Image.open(PHOTOS / name).convert("RGB")


def encoded(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def scaled(image, megapixels):
    factor = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
    return image.resize((round(image.width * factor), round(image.height * factor)))


def group():
    """Three people side by side: two presidents and an astronaut."""
    heads = {
        "obama.jpg": (255, 30, 735, 510),
        "biden.jpg": (335, 160, 815, 640),
        "astronaut.png": (100, 0, 340, 240),
    }
    together = Image.new("RGB", (1440, 480))
    for i, (name, head) in enumerate(heads.items()):
        together.paste(picture(name).crop(head).resize((480, 480)), (480 * i, 0))
    return together


def box(face):
    return tuple(face[side] for side in ("left", "top", "right", "bottom"))


def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a["descriptor"], b["descriptor"])) ** 0.5


def overlap(a, b):
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / (
        (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    )


def upload(content, key=KEY):
    """The bytes of a /detect request, for a raw socket."""
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="secret-name.jpg"\r\n\r\n%b\r\n--b--\r\n'
    form %= content
    return (
        b"POST /detect HTTP/1.1\r\nHost: x\r\nx-api-key: %b\r\nContent-Length: %d\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        % (key.encode(), len(form))
    ) + form


def connect(service):
    return socket.create_connection(("127.0.0.1", service.port), timeout=60)


@contextmanager
def memory_limit(megabytes):
    """Yield a command prefix that runs a command in a cgroup with a memory limit."""
    for root, limit in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ):
        group = Path(root, f"facerecognition-{os.getpid()}")
        try:
            group.mkdir()
            (group / limit).write_text(str(megabytes << 20))
        except OSError:
            continue
        try:
            yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        finally:
            group.rmdir()
        return
    pytest.skip("no control group for memory can be made here")


def memory(pid, kind):
    """Return the megabytes of a process: resident now (VmRSS) or at most (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) / 1024


def peak_memory(pid):
    return memory(pid, "VmHWM")


def forget_peak(pid):
    Path(f"/proc/{pid}/clear_refs").write_text("5")
