"""The image, run as the README runs it, and with fewer privileges: make docker-test.

Where the engine has no bridge network, containers use the host's.
"""

import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from shared import KEY, Service, encoded, free_port, photo, picture, scaled

IMAGE = os.environ.get("IMAGE")
if not IMAGE:
    pytest.skip("run by make docker-test", allow_module_level=True)

BRIDGE = not subprocess.run(
    ["docker", "network", "inspect", "bridge"], check=False, capture_output=True
).returncode
RESTRICTED = [
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--tmpfs",
    "/tmp:size=64m",
]


def docker(*arguments, check=True):
    done = subprocess.run(
        ["docker", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).strip()


def network(port):
    return (
        ["-p", f"{port}:5000"]
        if BRIDGE
        else ["--network", "host", "-e", f"PORT={port}"]
    )


@contextmanager
def container(*options, key=KEY, command=()):
    port = free_port()
    name = f"facerecognition-test-{port}"
    options = [*network(port), *(["-e", f"API_KEY={key}"] if key else []), *options]
    docker("run", "-d", "--name", name, *options, IMAGE, *command)
    service = Service(None, port)
    service.name = name
    try:
        for _ in range(1200):
            try:
                assert service.request("/health", key=None) == (200, "ok")
                break
            except OSError:
                assert docker("inspect", "-f", "{{.State.Running}}", name) == "true", (
                    docker("logs", name)
                )
                time.sleep(0.1)
        yield service
    finally:
        docker("rm", "-f", name)


@pytest.mark.parametrize("model", [1, 2, 3, 4])
def test_photos_in_and_faces_out(model):
    with container("-e", f"FACE_MODEL={model}") as service:
        assert service.request("/welcome")[1]["model"] == model
        assert service.detect(photo("obama.jpg"))[1]["faces-count"] == 1
        assert service.detect(photo("obama.jpg"), key="wrong")[0] == 401


def test_without_a_key_it_stops_and_says_so():
    for options in ([], ["-e", "API_KEY="]):
        done = subprocess.run(
            ["docker", "run", "--rm", *options, IMAGE],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1 and "API_KEY" in done.stderr + done.stdout


def test_the_key_in_a_file(tmp_path):
    (tmp_path / "api.key").write_text(KEY + "\n")
    with container("-v", f"{tmp_path}/api.key:/app/api.key", key=None) as service:
        assert service.request("/welcome", key=KEY)[0] == 200


def test_as_all_in_one_starts_it():
    """With a time zone, and a setting of another image, which is not needed."""
    options = ["-e", "FACE_MODEL=3", "-e", "TZ=Asia/Tokyo", "-e", "GUNICORN_WORKERS=2"]
    with container(*options) as service:
        assert service.request("/open")[1]["maximum_area"] >= 4_320_000
        assert service.detect(photo("obama.jpg"))[1]["faces-count"] == 1
        assert docker("exec", service.name, "date", "+%z") == "+0900"
        log = docker("logs", service.name)
        assert "GUNICORN_WORKERS is not needed" in log
        assert "Listening at: http://[::]:" in log


def test_labels():
    labels = json.loads(docker("inspect", "-f", "{{json .Config.Labels}}", IMAGE))
    assert "Nextcloud" in labels["org.opencontainers.image.description"]


def test_restricted_and_with_2_gb():
    with container(*RESTRICTED, "--memory=2g") as service:
        area = service.request("/open")[1]["maximum_area"]
        largest = encoded(picture("obama.jpg").resize((2 * area // 3000, 1500)))
        with ThreadPoolExecutor(4) as clients:
            assert [
                status for status, _ in clients.map(service.detect, [largest] * 4)
            ] == [200] * 4
        state = json.loads(docker("inspect", service.name))[0]["State"]
        assert state["Running"] and not state["OOMKilled"]
        assert docker("exec", service.name, "id", "-u") != "0"
        assert docker("logs", service.name).count("Booting worker") == 1


def test_health_under_load_and_sigterm():
    large = encoded(scaled(picture("obama.jpg"), 8))
    with container("--health-interval=1s") as service, ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(service.detect, large) for _ in range(4)]
        time.sleep(3)
        health = docker("inspect", "-f", "{{.State.Health.Status}}", service.name)
        assert health == "healthy"
        docker("stop", "-t", "300", service.name)
        assert [answer.result()[0] for answer in answers] == [200] * 4
        assert docker("inspect", "-f", "{{.State.ExitCode}}", service.name) == "0"


def test_there_is_a_dlib_for_each_x86_64_level():
    if os.uname().machine != "x86_64":
        pytest.skip("only for x86_64")
    command = (
        "md5sum .venv/lib/python3*/site-packages/dlib.libs/{.,glibc-hwcaps/*}/*.so"
    )
    listed = docker("run", "--rm", "--entrypoint", "bash", IMAGE, "-c", command)
    assert len({line.split()[0] for line in listed.splitlines()}) == 3


@pytest.mark.skipif(
    not shutil.which("qemu-x86_64-static") or os.uname().machine != "x86_64",
    reason="needs qemu-user-static, on x86_64",
)
def test_an_old_cpu():
    """Without AVX, as a NAS's Celeron is: slow here, as the CPU is emulated."""
    qemu = shutil.which("qemu-x86_64-static")
    command = [
        "/qemu",
        "-cpu",
        "Nehalem",
        "/app/.venv/bin/python",
        "facerecognition-external-model.py",
    ]
    with container("-v", f"{qemu}:/qemu", command=command) as service:
        assert "patched" in service.request("/welcome")[1]["dlib"]
        status, answer = service.detect(encoded(scaled(picture("obama.jpg"), 0.2)))
        assert (status, answer["faces-count"]) == (200, 1)


def test_no_secret_is_in_the_image():
    history = docker("history", "--no-trunc", IMAGE)
    assert "API_KEY=" not in history
    listed = docker(
        "run",
        "--rm",
        "--entrypoint",
        "ls",
        IMAGE,
        "-A",
        "/app",
        "/app/vendor",
    )
    assert "api.key" not in listed and ".git" not in listed
