"""Load, starts, stops and outages: no photo is lost."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import pytest
import shared
from PIL import Image
from shared import KEY, SERVE, SMALL, App, children, encoded, upload, wait_for
from test_limits import open_files

LARGE = shared.resized(1)


@pytest.fixture
def silence(tmp_path):
    """silence(seconds) is the command of a service that waits so long for a client."""

    def command(seconds):
        ours = (shared.ROOT / shared.CONFIGURATION).read_text()
        assert "SILENCE = 60 " in ours
        changed = tmp_path / "gunicorn.conf.py"
        changed.write_text(ours.replace("SILENCE = 60 ", f"SILENCE = {seconds} "))
        return [*SERVE[:-1], changed]

    return command


def analysed(service):
    return service.log().count(" pixels; waited ")


@contextmanager
def jobs(service):
    """Four clients that send photo after photo, and never again; yields the statuses."""
    seen = []

    def send(stopped):
        while not stopped.is_set():
            try:
                seen.append(service.detect(SMALL)[0])
            except OSError as error:
                seen.append(repr(error))

    with shared.threads(send, 4):
        yield seen


def wait_for_more(seen, count=5):
    enough = len(seen) + count
    wait_for(lambda: len(seen) > enough)


def test_load(start):
    """Of many clients: the answers are those without load, and nothing grows."""
    chance = random.Random(4)
    photos = [shared.resized(size) for size in (0.02, 0.05, 0.1, 0.2, 0.4)]
    photos += [encoded(shared.scaled(shared.group(), 0.2))]
    service = start()
    alone = [service.detect(content)[1] for content in photos]

    def send(i):
        status, answer = service.detect(photos[i])
        assert status == 200 and shared.same(answer, alone[i])

    def run(count):
        """Return the megabytes, files and threads after so many photos."""
        with ThreadPoolExecutor(16) as clients:
            list(clients.map(send, chance.choices(range(len(photos)), k=count)))
        pid = service.worker()
        threads = len(os.listdir(f"/proc/{pid}/task"))
        return shared.memory(pid), len(open_files(pid)), threads

    before, after = run(100), run(100)
    assert after[0] < before[0] + 40  # where a leak of 1 MB a photo would be 100
    assert after[1] <= before[1] + 1
    assert after[2] < before[2] + 16  # as many as clients met at a time
    assert list(service.tmp.iterdir()) == []


def test_first_come_first_served(monkeypatch):
    app, order, gate = App(3, PHOTOS_AT_ONCE="1"), [], threading.Event()
    pool = app.app.config["ANALYSER"].pool
    detect = shared.module.detect_faces
    monkeypatch.setattr(
        shared.module,
        "detect_faces",
        lambda models, image: order.append(image.shape[1]) or detect(models, image),
    )
    with ThreadPoolExecutor(20) as clients:
        pool.submit(gate.wait, 60)
        for width in range(20, 35):
            clients.submit(app.detect, encoded(Image.new("L", (width, 20))))
            wait_for(lambda sent=width - 19: pool._work_queue.qsize() == sent)
        gate.set()
    assert order == list(range(20, 35))


@pytest.mark.parametrize("closed_terminal", [False, True])
def test_sigterm_finishes_photos_in_flight_and_queued(start, closed_terminal):
    """So does a terminal that is closed, which sends SIGHUP to all its processes."""
    service = start()
    with ThreadPoolExecutor(6) as clients:
        sent = [clients.submit(service.detect, LARGE) for _ in range(6)]
        wait_for(lambda: analysed(service) > 0)
        if closed_terminal:
            os.killpg(service.process.pid, signal.SIGHUP)
        else:
            service.process.terminate()
        assert not all(answer.done() for answer in sent)
        assert [answer.result()[0] for answer in sent] == [200] * 6
    assert service.process.wait(60) == 0
    assert not re.search("Traceback|ERROR|can't", service.log())
    assert start(port=service.port).detect(SMALL)[0] == 200


def test_a_killed_worker_process_is_replaced(start):
    """So are the processes that decode: all that wait for a photo, and their parent."""
    service = start(PHOTOS_AT_ONCE=4)
    assert service.detect(SMALL)[0] == 200
    (server,) = children(service.worker())
    former = [server, *children(server)]
    os.kill(server, signal.SIGSTOP)  # it ends, too
    os.kill(service.worker(), signal.SIGKILL)
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in former))
    wait_for(lambda: service.log().count("Booting worker") == 2)
    wait_for(lambda: shared.answers(service))
    assert service.detect(SMALL)[0] == 200
    assert "SIGKILL" in service.log()
    (decoder,) = children(service.worker())
    for parent in ([], [decoder]):
        for pid in parent + children(decoder):
            with suppress(ProcessLookupError):  # the photo before has ended it
                os.kill(pid, signal.SIGKILL)
        assert service.detect(SMALL)[0] == 200
    assert children(service.worker()) != [decoder]


def test_what_gunicorn_is_told_whatever_the_environment_says():
    """Each photo has a thread, and time to be finished; no connection is used again."""
    environ = {"WEB_CONCURRENCY": "4", "API_KEY": KEY, "PORT": str(shared.free_port())}
    command, print_it = [*SERVE, "--print-config"], {"text": True, "cwd": shared.ROOT}
    said = subprocess.check_output(command, env=os.environ | environ, **print_it)
    told = dict(line.split(" = ", 1) for line in said.splitlines() if " = " in line)
    told = {name.strip(): value for name, value in told.items()}
    asked = {"workers": "1", "threads": "1000", "worker_connections": "1000"}
    asked |= {"timeout": "0", "graceful_timeout": "300", "keepalive": "0"}
    asked["worker_tmp_dir"] = "/dev/shm"  # not where a disk can be slow
    assert {name: told[name] for name in asked} == asked


@pytest.mark.parametrize(
    "prefix, host, port, words",
    [
        ([], "127.0.0.1", None, "in use"),
        ([], "192.0.2.1", 5000, "HOST '192.0.2.1'"),
        (["setpriv", "--bounding-set=-net_bind_service"], "127.0.0.1", 80, "PORT 80"),
    ],
)
def test_one_line_if_it_cannot_listen(start, service, prefix, host, port, words):
    if prefix and (os.geteuid() or not shutil.which(prefix[0])):
        pytest.skip("needs root and setpriv (apt install util-linux)")
    unreachable = {"url": "http://127.0.0.1:1", "HOST": host, "FACE_MODEL": 3}
    with pytest.raises(AssertionError) as stopped:
        start(prefix=prefix, port=port or service.port, **unreachable)
    (line,) = str(stopped.value).splitlines()
    assert words in line and "PORT" in line


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6 here")
def test_all_addresses_of_ipv4_and_ipv6(start):
    service = start(HOST="", FACE_MODEL=3)
    service.url = f"http://[::1]:{service.port}"
    assert service.request("/health") == (200, "ok")


@contextmanager
def held_address():
    """A listening socket that another process holds, as systemd does; its options."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        os.set_inheritable(listener.fileno(), True)
        run = f'exec 3<&{listener.fileno()} env LISTEN_FDS=1 LISTEN_PID=$$ "$@"'
        options = {"prefix": ["bash", "-c", run, "bash"], "inherit": True}
        yield options | {"port": listener.getsockname()[1]}


def test_restarts_with_a_held_address_lose_nothing(start):
    """Three restarts; a client that connects while nothing runs is answered, too."""
    with held_address() as options:
        service = start(**options)
        with jobs(service) as seen:
            for _ in range(3):
                wait_for_more(seen)
                assert service.stop() == 0
                with service.connect() as client:
                    client.sendall(upload(SMALL))
                    time.sleep(0.3)
                    service = start(**options)
                    assert b"HTTP/1.1 200" in client.makefile("rb").readline()
    assert set(seen) == {200} and len(seen) > 20


def test_systemd_starts_it(start):
    """At the first connection, which waits until it is answered."""
    if not shutil.which("systemd-socket-activate"):
        pytest.skip("apt install systemd")
    port = shared.free_port()
    command = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}"]
    for name in ("API_KEY", "FACE_MODEL", "PATH", "TMPDIR"):
        command += ["-E", name]
    service = start(command=command + list(SERVE), port=port, FACE_MODEL=3)
    assert service.request("/welcome")[1]["model"] == 3
    assert service.detect(SMALL)[1]["faces-count"] == 1


def test_600_silent_clients_delay_nobody_and_are_dropped(start, silence):
    """With nothing at all, half a head, or half a body, and whether they close or not.

    Each is at most a line in the log.
    """
    service, whole = start(command=silence(4)), upload(SMALL)
    lines = len(service.log().splitlines())
    with ExitStack() as stack:
        silent = [stack.enter_context(service.connect()) for _ in range(600)]
        for i, client in enumerate(silent):
            client.sendall(whole[: (0, 100, 1000)[i % 3]])
        assert shared.is_not_delayed(service)
        time.sleep(4)
        assert shared.is_not_delayed(service)
        for client in silent:
            with suppress(ConnectionResetError):
                while client.recv(4096):  # closed, or told that it broke off
                    pass
        assert shared.is_not_delayed(service)
    assert len(service.log().splitlines()) < lines + 600 + 20
    assert "Traceback" not in service.log() and KEY not in service.log()


def test_more_silent_clients_than_there_can_be_threads(start, silence):
    service = start(command=silence(1), processes=60)
    worker = service.worker()
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(service.connect()).sendall(b"GET /he")
        assert service.detect(SMALL)[0] == 200
    assert service.worker() == worker


def test_a_client_that_waits_for_its_answer_is_not_silent(start, silence):
    service = start(command=silence(1))
    (server,) = children(service.worker())
    with ThreadPoolExecutor(1) as clients:
        for pid in (server, *children(server)):
            os.kill(pid, signal.SIGSTOP)
        answer = clients.submit(service.detect, SMALL)
        time.sleep(2.5)
        for pid in (server, *children(server)):
            os.kill(pid, signal.SIGCONT)
        assert answer.result()[0] == 200


def test_sigterm_waits_for_a_silent_client_only_until_it_is_dropped(start, silence):
    service = start(command=silence(2), FACE_MODEL=3)
    with service.connect() as client:
        client.sendall(upload(SMALL)[:300])
        assert service.request("/health") == (200, "ok")  # so the client is accepted
        service.process.terminate()
        assert service.process.wait(15) == 0
