"""What Nextcloud's app sends: sizes, originals, and requests during restarts."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from PIL import Image
from shared import (
    KEY,
    ROOT,
    App,
    Service,
    distance,
    encoded,
    free_port,
    memory_limit,
    module,
    peak_memory,
    photo,
    picture,
    scaled,
    started,
    upload,
)

SIZES = [
    *((4032, 3024), (4000, 3000), (3264, 2448), (4608, 3456), (8000, 6000)),
    *((9248, 6936), (12000, 9000), (16320, 12240), (6000, 4000), (5184, 3456)),
    *((5472, 3648), (4928, 3264), (3888, 2592), (2592, 1944), (1600, 1200)),
    *((4000, 2250), (4624, 2084), (1920, 1080), (2560, 1440), (3840, 2160)),
    *((1366, 768), (2556, 1179), (2340, 1080), (2796, 1290), (2048, 1536)),
    *((3024, 3024), (1080, 1080), (7680, 4320), (16384, 2400), (13000, 512)),
]
AREAS = [640 * 480, 1_000_000, 2_000_000, 4_320_000, 3840 * 2160]


def as_the_app_scales(width, height, area):
    """Return the sides that the app gives a photo, as its ImageProcessingTask does."""
    factor = (area / (width * height)) ** 0.5
    return round(width * factor), round(height * factor)


def header(size):
    """The start of a JPEG of this size.  It gets 400, as the rest is missing, unless refused before."""
    return encoded(Image.new("L", size), quality=1)[:700]


@pytest.mark.parametrize("area", AREAS)
def test_sizes_after_rounding_are_accepted(area):
    app = App(1, MAXIMUM_AREA=str(area))
    for width, height in SIZES:
        for sides in ((width, height), (height, width)):
            scaled_to = as_the_app_scales(*sides, area)
            assert app.detect(header(scaled_to))[0] == 400, scaled_to
            wider = (scaled_to[0] + 2, scaled_to[1] + 1)
            assert app.detect(header(wider))[0] == 412, wider


@pytest.mark.parametrize(
    "size",
    [(3840, 2160), (2160, 3840), (2880, 2880), (16384, 506), (126, 65500)],
)
def test_the_largest_photos_of_any_shape_are_accepted(app, size):
    assert app.detect(header(size))[0] == 400


def test_a_photo_of_a_phone_at_the_largest_area(app):
    size = as_the_app_scales(4032, 3024, 3840 * 2160)
    assert size == (3326, 2494)
    status, answer = app.detect(encoded(picture("obama.jpg").resize(size)))
    assert (status, answer["faces-count"]) == (200, 1)


# ------------------------------------------------------------------- the largest area


@pytest.mark.parametrize("model", [1, 3, 4])
def test_the_area_depends_on_total_memory_not_on_free_memory(monkeypatch, model):
    areas = {}
    for total in (512, 1000, 1024, 1536, 2048, 4096, 65536):
        for available in (total, total // 2, 100):
            memory = (total << 20, available << 20)
            monkeypatch.setattr(module, "_memory", lambda memory=memory: memory)
            area, at_once, *_ = module._fit_memory(model, None, None)
            assert areas.setdefault(total, area) == area and at_once >= 1
    assert min(areas[1000], areas[1024]) >= 4_320_000
    assert areas[2048] == areas[65536] == 3840 * 2160
    assert list(areas.values()) == sorted(areas.values())


def test_too_little_memory_for_the_smallest_area(monkeypatch):
    monkeypatch.setattr(module, "_memory", lambda: (240 << 20, 240 << 20))
    with pytest.raises(SystemExit, match="of memory are needed, but there are 240"):
        module._fit_memory(1, None, None)


@pytest.mark.parametrize("model", [1, 3, 4])
def test_all_in_ones_area_in_1_gb(tmp_path, model):
    with memory_limit(1000) as command:
        command += [sys.executable, "facerecognition-external-model.py"]
        with started(tmp_path, command, FACE_MODEL=model) as service:
            area = service.request("/open")[1]["maximum_area"]
            assert area >= 4_320_000
            assert ("its jobs stop" in service.log()) == (area < 3840 * 2160)


# ------------------------------------------------------------------------- migration


def original(megapixels, format, **options):
    """A photo with faces in its middle, large and small, at an edge and in a corner."""
    image = Image.new("RGB", (4000, 3000), "grey")
    face = picture("obama.jpg").crop((255, 30, 735, 510))
    boxes = []
    for side, x, y in (
        *((1500, 1200, 700), (480, 3000, 300), (60, 500, 2000)),
        *((480, -130, 1000), (480, 3650, 2650), (480, 1000, -150)),
    ):
        image.paste(face.resize((side, side)), (x, y))
        left, top = x + side // 4, y + side // 4
        boxes.append((left, top, left + side // 2, top + side // 2))
    boxes.append((0, 0, 3999, 2999))
    factor = (megapixels * 1e6 / 12e6) ** 0.5
    image = image.resize((round(4000 * factor), round(3000 * factor)))
    boxes = [[round(side * factor) for side in box] for box in boxes]
    return encoded(image, format, **options), boxes


def described(content, boxes):
    """Landmarks and descriptors as of the whole image."""
    image = module.open_photo(io.BytesIO(content))
    pixels = module.decode(image, (0, 0, *image.size))
    boxes = [module.dlib.rectangle(*box) for box in boxes]
    return module.describe_faces(module.load_model_set(1), pixels, boxes)


@pytest.mark.parametrize(
    "megapixels, format, options",
    [
        (12, "PNG", {"compress_level": 1}),
        (24, "JPEG", {"progressive": True}),
        (108, "JPEG", {}),
    ],
)
def test_originals_are_accepted_for_migration(tmp_path, megapixels, format, options):
    content, boxes = original(megapixels, format, **options)
    whole = described(content, boxes)
    with started(tmp_path) as service:
        service.compute(
            photo("obama.jpg"), {"left": 9, "top": 9, "right": 99, "bottom": 99}
        )
        for box, (landmarks, descriptor) in zip(boxes, whole):
            face = dict(zip(("left", "top", "right", "bottom"), box))
            status, answer = service.compute(content, face)
            assert status == 200
            points = [(point.x, point.y) for point in landmarks]
            answered = answer["face"]["landmarks"]
            assert [(point["x"], point["y"]) for point in answered] == points
            assert distance(answer["face"], {"descriptor": descriptor}) < 1e-6
        assert peak_memory(service.worker()) < 400 + 10 * megapixels


def test_originals_in_1_gb(tmp_path):
    """108 megapixels from four clients, and photos for /detect beside them."""
    content, boxes = original(108, "JPEG")
    small = encoded(scaled(picture("obama.jpg"), 1))
    face = dict(zip(("left", "top", "right", "bottom"), boxes[0]))
    with memory_limit(1000) as command:
        command += [sys.executable, "facerecognition-external-model.py"]
        with started(tmp_path, command) as service:
            with ThreadPoolExecutor(8) as clients:
                answers = [
                    *(clients.submit(service.compute, content, face) for _ in range(4)),
                    *(clients.submit(service.detect, small) for _ in range(4)),
                ]
            assert [answer.result()[0] for answer in answers] == [200] * 8
            assert service.log().count("Booting worker") == 1


def test_originals_too_large_for_migration(service):
    face = {"left": 1, "top": 1, "right": 99, "bottom": 99}
    huge = encoded(Image.new("L", (15000, 15000)), "PNG")
    status, answer = service.compute(huge, face)
    assert status == 412 and "scale it down" in answer["error"]
    assert service.compute(bytes(70 << 20), face)[0] == 415  # /detect: 413


# ------------------------------------------------------------- restarts, and outages


@contextmanager
def held_address():
    """A listening socket that another process holds, as systemd does: (command, port)."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        os.set_inheritable(listener.fileno(), True)
        command = [
            *("bash", "-c"),
            f'exec 3<&{listener.fileno()} env LISTEN_FDS=1 LISTEN_PID=$$ "$@"',
            *("bash", sys.executable, "facerecognition-external-model.py"),
        ]
        yield command, listener.getsockname()[1]


class Clients:
    """Clients that send one photo after the other, like jobs, without retrying."""

    def __init__(self, service, count=4):
        self.content = encoded(scaled(picture("obama.jpg"), 0.1))
        self.seen, self.stopped = [], threading.Event()
        self.threads = [
            threading.Thread(target=self.send, args=(service,)) for _ in range(count)
        ]

    def send(self, service):
        while not self.stopped.is_set():
            try:
                self.seen.append(service.detect(self.content)[0])
            except OSError as error:
                self.seen.append(repr(error))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for thread in self.threads:
            thread.join()


def test_restarts_with_a_held_address_lose_nothing(tmp_path):
    """Three restarts under load, with a socket held by another process, as by systemd."""
    with held_address() as (command, port):
        with started(tmp_path, command, port, inherit=True) as service:
            clients = Clients(service)
            clients.__enter__()
            time.sleep(1)
        for _ in range(2):
            time.sleep(0.5)
            with started(tmp_path, command, port, inherit=True):
                time.sleep(1)
        with started(tmp_path, command, port, inherit=True):
            clients.__exit__()
    assert set(clients.seen) == {200} and len(clients.seen) > 30


@pytest.mark.skipif(
    not shutil.which("systemd-socket-activate"),
    reason="systemd-socket-activate is not installed (apt install systemd)",
)
def test_systemd_starts_it(tmp_path):
    """At the first connection, which waits until it is answered."""
    port = free_port()
    command = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}"]
    for name in ("API_KEY", "FACE_MODEL", "PATH", "TMPDIR"):
        command += ["-E", name]
    command += [sys.executable, "facerecognition-external-model.py"]
    with started(tmp_path, command, port, FACE_MODEL=3) as service:
        assert service.request("/welcome")[1]["model"] == 3
        assert service.detect(photo("obama.jpg"))[1]["faces-count"] == 1
        with Clients(service) as clients:
            time.sleep(1)
            service.process.send_signal(signal.SIGHUP)
            time.sleep(2)
        assert set(clients.seen) == {200}


@pytest.mark.skipif(
    not shutil.which("systemd-analyze"),
    reason="systemd-analyze is not installed (apt install systemd)",
)
def test_the_units_are_right(tmp_path):
    made = subprocess.run(
        ["make", f"UNITS={tmp_path}", "units"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    units = [tmp_path / f"facerecognition.{kind}" for kind in ("socket", "service")]
    done = subprocess.run(
        ["systemd-analyze", "verify", *units],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert f"WorkingDirectory={ROOT}" in units[1].read_text()


def test_sighup_takes_a_new_key_and_loses_nothing(tmp_path):
    """A reload under load; then one with an invalid key file, which changes nothing."""
    place = tmp_path / "copy"
    shutil.copytree(
        ROOT,
        place,
        symlinks=True,
        ignore=shutil.ignore_patterns(".git", ".venv", "tests", "build", "api.key"),
    )
    key = place / "api.key"
    key.write_text(KEY)
    key.chmod(0o600)
    command = [sys.executable, str(place / "facerecognition-external-model.py")]

    def reload(service):
        booted = service.log().count("Version")
        os.killpg(service.process.pid, signal.SIGHUP)  # as if its terminal closed, too
        while service.log().count("Version") == booted:
            time.sleep(0.05)

    with started(tmp_path, command, API_KEY="") as service:
        with Clients(service) as clients:
            time.sleep(1)
            reload(service)
            time.sleep(1)
        assert set(clients.seen) == {200}
        key.write_text("another")
        source = place / "facerecognition-external-model.py"
        source.write_text(source.read_text().replace('"1.0.0"', '"1.0.0-new"'))
        reload(service)
        time.sleep(1)
        status, answer = service.request("/welcome", key="another")
        assert (status, answer["version"]) == (200, "1.0.0-new")
        key.write_text("two\nkeys")
        reload(service)
        time.sleep(1)
        assert service.request("/welcome", key="another")[0] == 200
        assert "leave only the key" in service.log()
        assert "Traceback" not in service.log() and "lost" not in service.log()


@pytest.mark.parametrize("delay", [0.05, 0.15, 0.25])
def test_sighup_while_the_first_models_load(tmp_path, delay):
    """Clients wait already.  The worker process that is replaced answers what it accepted."""
    log = tmp_path / "log"
    log.touch()

    def reload():
        while not (
            booting := re.search(r"\[(\d+)\] \[INFO\] Using worker", log.read_text())
        ):
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(int(booting[1]), signal.SIGHUP)

    with (
        held_address() as (command, port),
        ThreadPoolExecutor(1) as background,
        Clients(Service(None, port), 8) as clients,
    ):
        reloaded = background.submit(reload)
        with started(tmp_path, command, port, inherit=True) as service:
            reloaded.result()
            time.sleep(2)
            clients.__exit__()
    assert set(clients.seen) == {200}
    assert "ERROR" not in service.log()


def test_sigterm_as_soon_as_it_listens(tmp_path):
    for delay in (0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6):
        folder = tmp_path / str(delay)
        folder.mkdir()
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "facerecognition-external-model.py"],
                cwd=ROOT,
                env={**os.environ, "API_KEY": KEY, "PORT": str(free_port())},
                stdout=log,
                stderr=log,
            )
        while "Listening" not in (folder / "log").read_text():
            time.sleep(0.005)
        time.sleep(delay)
        process.terminate()
        assert process.wait(30) == 0
        assert "Error" not in (folder / "log").read_text()


def test_a_client_that_waits_is_answered_late_and_not_lost(tmp_path):
    """It connects before the service runs, and is answered once it does."""
    with held_address() as (command, port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            sent = encoded(scaled(picture("obama.jpg"), 0.1))
            client.sendall(upload(sent))
            time.sleep(1)
            with started(tmp_path, command, port, inherit=True):
                answer = client.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 200")
        assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["faces-count"] == 1
