"""Shared by tests and tools: starting a service, a client of it, and photos."""

import functools
import importlib
import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
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
CONFIGURATION = ".deploy/gunicorn.conf.py"
SERVE = (sys.executable, "-m", "gunicorn", "-c", CONFIGURATION)

sys.path.insert(0, str(ROOT))
module = importlib.import_module("facerecognition-external-model")


class Service:
    """A running service, and a client of it; its answers are (status, content)."""

    def __init__(self, process, port):
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def request(self, path, form=None, key=KEY):
        """Send a request; a tuple (file, filename) in the form is sent as a file."""
        headers, body = {"x-api-key": key} if key is not None else {}, None
        if form is not None:
            for name, value in form.items():
                form[name] = FileStorage(*value) if type(value) is tuple else value
            boundary, body = encode_multipart(form)
            headers["Content-Type"] = f"multipart/form-data; boundary={boundary}"
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            # Without it, that of the first request would be kept for all (Python 3.12).
            https = self.url.startswith("https")
            context = ssl.create_default_context() if https else None
            answer = urllib.request.urlopen(request, timeout=600, context=context)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            content = answer.read().decode()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(content) if is_json else content

    def detect(self, photo, filename="photo.jpg", **options):
        form = {"file": (io.BytesIO(photo), filename)}
        return self.request("/detect", form, **options)

    def compute(self, photo, face, **options):
        face = face if isinstance(face, str) else json.dumps(face)
        form = {"file": (io.BytesIO(photo), "photo.jpg"), "face": face}
        return self.request("/compute", form, **options)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def worker(self):
        """Return the id of the one process that answers."""
        (child,) = children(self.process.pid)
        return child

    def log(self):
        return (self.folder / "log").read_text()

    def stop(self):
        """End it if it still runs, and return its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


class App(Service):
    """The same client for an application in this process, without server and network."""

    def __init__(self, model, **settings):
        self.model = model
        environ = {"API_KEY": KEY, "FACE_MODEL": str(model)} | settings
        with mock.patch.dict(os.environ, environ):
            self.app = module.create_app(module.checked_settings.__wrapped__())

    def request(self, path, form=None, key=KEY):
        options = {"headers": {"x-api-key": key}} if key is not None else {}
        if form is not None:
            options |= {"data": form, "content_type": "multipart/form-data"}
        client, method = self.app.test_client(), "GET" if form is None else "POST"
        answer = client.open(path, method=method, **options)
        return answer.status_code, answer.json if answer.is_json else answer.text


HELD = []  # sockets of free ports
app_with = functools.cache(App)  # a model's, the same for all tests


def free_port():
    """Return a port that nothing else gets: a socket holds it, and never listens."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    HELD.append(holder)
    return holder.getsockname()[1]


@contextmanager
def started(
    folder, command=SERVE, port=None, url=None, prefix=(), inherit=False, **settings
):
    """Run a service with these settings; its log and temporary files are in a folder.

    With ``inherit``, it gets the files that are open here and inheritable.
    """
    service = Service(None, port or free_port())
    service.url = url or service.url
    service.folder, service.tmp = folder, folder / "tmp"
    service.tmp.mkdir(parents=True, exist_ok=True)
    defaults = {"API_KEY": KEY, "HOST": "127.0.0.1", "TMPDIR": service.tmp}
    settings = defaults | {"PORT": service.port} | settings
    with open(folder / "log", "a") as log:
        service.process = subprocess.Popen(
            [*prefix, *command],
            cwd=ROOT,
            env=os.environ | {name: str(value) for name, value in settings.items()},
            stdout=log,
            stderr=log,
            start_new_session=True,
            close_fds=not inherit,
        )
    try:
        wait_for(lambda: answers(service))
        yield service
    finally:
        service.stop()


def children(pid):
    """Return the ids of a process's children."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def answers(service):
    assert service.process.poll() is None, service.log()
    try:
        return service.request("/health") == (200, "ok")
    except OSError as error:
        answers.failed = error


def wait_for(condition, seconds=60):
    """Return what ``condition()`` returns, once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        why = getattr(answers, "failed", "")
        assert time.monotonic() < end, f"waited in vain; the last error was {why}"
        time.sleep(0.01)
    return found


def is_not_delayed(service):
    """Whether none of nine small photos, each of a client of its own, waits for others."""
    for _ in range(9):
        began = time.monotonic()
        assert service.detect(SMALL)[0] == 200
        if time.monotonic() - began > 2:  # seconds; silent clients stay for longer
            return False
    return True


@contextmanager
def threads(work, count=1):
    """Have so many threads call ``work(stopped)``, until that event is set."""
    stopped = threading.Event()
    with ThreadPoolExecutor(count) as pool:
        done = [pool.submit(work, stopped) for _ in range(count)]
        try:
            yield
        finally:
            stopped.set()
    for thread in done:
        thread.result()


def refused(answer, status, words=""):
    """Check that the answer is that error, as JSON that says what is wrong."""
    assert answer[0] == status, answer
    assert list(answer[1]) == ["error"] and len(answer[1]["error"]) > 20
    assert words in answer[1]["error"]


def upload(content, key=KEY):
    """The bytes of a /detect request, for a raw socket."""
    field = b'Content-Disposition: form-data; name="file"; filename="secret-name.jpg"'
    form = b"--b\r\n%b\r\n\r\n%b\r\n--b--\r\n" % (field, content)
    head = f"POST /detect HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\nContent-Length:"
    head += f" {len(form)}\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n"
    return head.encode() + form


def photo(name):
    return (PHOTOS / name).read_bytes()


def picture(name="obama.jpg"):
    return Image.open(PHOTOS / name).convert("RGB")


def encoded(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def scaled(image, megapixels):
    factor = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
    return image.resize((round(image.width * factor), round(image.height * factor)))


def resized(megapixels, name="obama.jpg", format="JPEG"):
    return encoded(scaled(picture(name), megapixels), format)


SMALL = resized(0.1)


def group():
    """Three people side by side: two presidents and an astronaut."""
    heads = {"obama.jpg": (255, 30, 735, 510), "biden.jpg": (335, 160, 815, 640)}
    heads["astronaut.png"] = (100, 0, 340, 240)
    together = Image.new("RGB", (1440, 480))
    for i, (name, head) in enumerate(heads.items()):
        together.paste(picture(name).crop(head).resize((480, 480)), (480 * i, 0))
    return together


def face_in(box):
    return dict(zip(("left", "top", "right", "bottom"), box))


def box(face):
    return tuple(face[side] for side in ("left", "top", "right", "bottom"))


def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a["descriptor"], b["descriptor"])) ** 0.5


def same(one, other):
    """Whether two answers tell the same faces."""
    pairs = list(zip(one["faces"], other["faces"]))
    return len(pairs) == one["faces-count"] == other["faces-count"] and all(
        box(a) == box(b) and a["landmarks"] == b["landmarks"] and distance(a, b) < 1e-5
        for a, b in pairs
    )


def overlap(a, b):
    """Intersection over union of two boxes (left, top, right, bottom)."""
    common = [*map(max, a[:2], b[:2]), *map(min, a[2:], b[2:])]
    areas = [max(x - left, 0) * max(y - top, 0) for left, top, x, y in (a, b, common)]
    return areas[2] / (areas[0] + areas[1] - areas[2])


@contextmanager
def control_group(controller, limit):
    """Yield a command prefix that runs a command with so many bytes or processes.

    ``controller`` is "memory" or "pids".
    """
    v1 = Path("/sys/fs/cgroup", controller).exists()
    group = Path("/sys/fs/cgroup", controller if v1 else "", f"faces-{os.getpid()}")
    file = (
        "memory.limit_in_bytes"
        if v1 and controller == "memory"
        else f"{controller}.max"
    )
    try:
        group.mkdir()
        (group / file).write_text(str(limit))
    except OSError:
        pytest.skip(f"no control group for {controller} can be made here")
    join = f'echo $$ > {group}/cgroup.procs && exec "$@"'
    try:
        yield ["sh", "-c", join, "sh"]
    finally:
        group.rmdir()


def memory(pid, kind="VmRSS"):
    """Return the megabytes of a process: resident now (VmRSS) or at most (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) / 1024


def peak_memory(pid):
    return memory(pid, "VmHWM")


def forget_peak(pid):
    Path(f"/proc/{pid}/clear_refs").write_text("5")
