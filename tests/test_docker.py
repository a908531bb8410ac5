"""The image, run as README.md runs it, and with fewer privileges: make docker-test.

Where the engine has no bridge network, containers use the host's.
"""

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from shared import KEY, Service, encoded, free_port, photo, picture, scaled

IMAGE = os.environ.get("IMAGE")
if not IMAGE:
    pytest.skip("run by make docker-test", allow_module_level=True)

RESTRICTED = "--read-only --cap-drop=ALL --security-opt=no-new-privileges --tmpfs=/tmp"


def docker(*arguments, check=True):
    command = ["docker", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).strip()


@contextmanager
def container(*options, key=KEY):
    port = free_port()
    name = f"facerecognition-test-{port}"
    if "Error" in docker("network", "inspect", "bridge", check=False):
        options = ["--network=host", "-e", f"PORT={port}", *options]
    else:
        options = ["-p", f"{port}:5000", *options]
    key = ["-e", f"API_KEY={key}"] if key else []
    docker("run", "-d", "--name", name, *options, *key, IMAGE)
    service = Service(None, port)
    service.name = name
    try:
        while True:
            try:
                assert service.request("/health", key=None) == (200, "ok")
                break
            except OSError:
                running = docker("inspect", "-f", "{{.State.Running}}", name)
                assert running == "true", docker("logs", name)
                time.sleep(0.1)
        yield service
    finally:
        docker("rm", "-f", name)


def user(service):
    """The user and the capabilities of the service's process."""
    status = docker(
        "exec", service.name, "grep", "-E", "^(Uid|CapEff)", "/proc/1/status"
    )
    (_, uid, *_), (_, capabilities) = map(str.split, status.splitlines())
    return int(uid), int(capabilities, 16)


@pytest.mark.parametrize("model", [1, 2, 3, 4])
def test_photos_in_and_faces_out(model):
    if str(model) not in docker("run", "--rm", IMAGE, "ls", "vendor/models").split():
        options = ("-e", "API_KEY=x", "-e", f"FACE_MODEL={model}")
        said = docker("run", "--rm", *options, IMAGE, check=False)
        assert f"docker build --build-arg MODELS={model}" in said.splitlines()[-1]
        return
    with container("-e", f"FACE_MODEL={model}", "-e", "TZ=Asia/Tokyo") as service:
        assert service.request("/welcome")[1]["model"] == model
        assert "stock" not in service.request("/welcome")[1]["dlib"]
        assert service.detect(photo("obama.jpg"))[1]["faces-count"] == 1
        assert service.detect(photo("obama.jpg"), key="wrong")[0] == 401
        assert docker("exec", service.name, "date", "+%z") == "+0900"
        uid, capabilities = user(service)
        assert uid != 0 and capabilities == 0


def test_without_a_key_it_stops_and_says_so():
    assert "openssl rand" in docker("run", "--rm", IMAGE, check=False)


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_key_in_a_file(tmp_path, mode):
    (tmp_path / "api.key").write_text(KEY + "\n")
    (tmp_path / "api.key").chmod(mode)
    with container("-v", f"{tmp_path}/api.key:/app/api.key", key=None) as service:
        assert service.request("/open")[0] == 200 and user(service)[0] != 0


@pytest.mark.parametrize("options", ["", "--user=1234", "--user=facerecognition"])
def test_restricted_and_with_1_gb(options):
    with container(*RESTRICTED.split(), "--memory=1g", *options.split()) as service:
        assert service.request("/open")[1]["maximum_area"] == 8294400
        largest = encoded(picture("obama.jpg").resize((3840, 2160)))
        with ThreadPoolExecutor(4) as clients:
            answers = clients.map(service.detect, [largest] * 4)
            assert [status for status, _ in answers] == [200] * 4
        assert not json.loads(docker("inspect", service.name))[0]["State"]["OOMKilled"]
        assert user(service)[1] == 0


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


def test_nothing_secret_is_in_the_image():
    assert "API_KEY=" not in docker("history", "--no-trunc", IMAGE)
    assert "api.key" not in docker("run", "--rm", IMAGE, "ls", "-A", "/app")
