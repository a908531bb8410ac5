"""Hostile clients, and resources that run out: neither stops the service, or affects other requests."""

import hashlib
import io
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from PIL import Image
from shared import (
    KEY,
    connect,
    distance,
    encoded,
    forget_peak,
    group,
    memory,
    module,
    peak_memory,
    photo,
    picture,
    scaled,
    started,
    upload,
)

SOAK = os.environ.get("SOAK")
SMALL = encoded(scaled(picture("obama.jpg"), 0.1))


def with_constants(**constants):
    """The command of a service with some of the module's constants replaced."""
    code = "import importlib; m = importlib.import_module('facerecognition-external-model'); "
    code += "".join(f"m.{name} = {value!r}; " for name, value in constants.items())
    return [sys.executable, "-c", code + "m.serve()"]


def answered(client):
    """The status line of what comes back on a connection."""
    return client.makefile("rb").readline().decode().strip()


# ------------------------------------------------------------------ answers of others


@pytest.mark.parametrize("model", [1, 3, 4])
def test_the_widest_photos_and_the_highest(tmp_path, model):
    """Under glibc's malloc checks: stock dlib writes past the end of such rows."""
    settings = {"FACE_MODEL": model, "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    preload = next(Path("/lib").glob("*/libc_malloc_debug.so.0"), None)
    if preload:
        settings["LD_PRELOAD"] = preload
    with started(tmp_path, **settings) as service:
        worker = service.worker()
        for size in ((65500, 126), (62500, 130), (45000, 180))[: 3 if SOAK else 1]:
            wide = Image.effect_noise(size, 80)
            wide.paste(picture("obama.jpg").resize((size[1], size[1])), (9000, 0))
            for image in (wide, wide.rotate(90, expand=True)):
                assert service.detect(encoded(image))[0] == 200, image.size
        assert service.worker() == worker


FAILING_MEMORY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

/* One in so many requests for a large piece of memory fails, while the file FAILING is there. */
static int fails(size_t size)
{
    static unsigned long state = 88172645463325252UL;
    if (size < 30000 || access(getenv("FAILING"), F_OK) != 0)
        return 0;
    unsigned long x = __atomic_load_n(&state, __ATOMIC_RELAXED);
    x ^= x << 13; x ^= x >> 7; x ^= x << 17;
    __atomic_store_n(&state, x, __ATOMIC_RELAXED);
    return x % atoi(getenv("ONE_IN")) == 0;
}

void* malloc(size_t size)
{
    static void* (*real)(size_t);
    if (!real)
        real = dlsym(RTLD_NEXT, "malloc");
    if (fails(size)) { errno = ENOMEM; return NULL; }
    return real(size);
}

int posix_memalign(void** memory, size_t alignment, size_t size)
{
    static int (*real)(void**, size_t, size_t);
    if (!real)
        real = dlsym(RTLD_NEXT, "posix_memalign");
    return fails(size) ? ENOMEM : real(memory, alignment, size);
}
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler is installed")
@pytest.mark.parametrize("model", [1, 3, 4])
def test_memory_refused_at_random_places(tmp_path, model):
    """Of two photos at once, each gets its own answer, or an error: with SOAK=1 for 200 s."""
    (tmp_path / "fail.c").write_text(FAILING_MEMORY)
    library = tmp_path / "fail.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", tmp_path / "fail.c", "-o", library, "-ldl"],
        check=True,
    )
    failing = tmp_path / "failing"
    settings = {"LD_PRELOAD": library, "FAILING": failing, "ONE_IN": 1000}
    photos = [encoded(scaled(group(), 0.3)), encoded(scaled(picture("biden.jpg"), 0.4))]
    with (
        started(tmp_path, FACE_MODEL=model, PHOTOS_AT_ONCE=2, **settings) as service,
        ThreadPoolExecutor(2) as clients,
    ):
        alone = [service.detect(content)[1] for content in photos]
        worker, seen = service.worker(), []
        failing.touch()
        began = time.monotonic()

        def enough():
            several = seen.count(507) > 5 and seen.count(200) > 5
            return time.monotonic() - began > (200 if SOAK else 2 if several else 60)

        def send(i):
            while not enough():
                status, answer = service.detect(photos[i])
                seen.append(status)
                if status == 200:
                    assert len(answer["faces"]) == len(alone[i]["faces"])
                    for one, other in zip(alone[i]["faces"], answer["faces"]):
                        near = distance(one, other) < 1e-5
                        assert near and one["landmarks"] == other["landmarks"]

        for sender in [clients.submit(send, i) for i in (0, 1)]:
            sender.result()
        failing.unlink()
        print({status: seen.count(status) for status in set(seen)})
        assert set(seen) == {200, 507} and seen.count(507) > 5
        assert [service.detect(content)[1] for content in photos] == alone
        assert service.worker() == worker


# ---------------------------------------------------------------------- connections


def test_600_silent_clients_delay_nobody(tmp_path):
    """With half a header, or with headers and no body.  They are disconnected in the end."""
    one = encoded(scaled(picture("obama.jpg"), 1))

    def seconds(service):
        taken = []
        for _ in range(5):
            began = time.monotonic()
            assert service.detect(one)[0] == 200
            taken.append(time.monotonic() - began)
        return sorted(taken)[2]

    command = with_constants(SILENCE=60 if SOAK else 4)
    with started(tmp_path, command) as service, ExitStack() as stack:
        seconds(service)
        alone = seconds(service)
        began = time.monotonic()
        silent = [stack.enter_context(connect(service)) for _ in range(600)]
        for i, client in enumerate(silent):
            whole = upload(SMALL)
            client.sendall(whole[: 40 if i % 2 else whole.index(b"\r\n\r\n") + 9])
        assert seconds(service) < 2 * alone + 0.05
        for client in silent:
            client.settimeout(90)
            while client.recv(4096):  # closed, or told that it broke off
                pass
        assert time.monotonic() - began < (75 if SOAK else 20)
        assert seconds(service) < 2 * alone + 0.05


def test_sigterm_does_not_wait_for_a_silent_client(tmp_path):
    command = with_constants(SILENCE=3)
    with started(tmp_path, command) as service, connect(service) as client:
        client.sendall(upload(SMALL)[:200])
        service.process.terminate()
        assert service.process.wait(10) == 0


def test_sigterm_does_not_wait_for_a_trickling_client(tmp_path):
    """Nor does a reload.  Complete requests are answered."""
    command = with_constants(SILENCE=2)
    with (
        started(tmp_path, command) as service,
        connect(service) as one,
        connect(service) as other,
        ThreadPoolExecutor(4) as clients,
    ):
        one.sendall(b"GET /welcome HTTP/1.1\r\n")
        other.sendall(upload(SMALL)[:200])

        def trickle(client):
            with suppress(OSError):
                for _ in range(100):
                    client.sendall(b"x")
                    time.sleep(0.2)

        for client in (one, other):
            clients.submit(trickle, client)
        answers = [
            clients.submit(service.detect, encoded(scaled(picture("obama.jpg"), 8)))
            for _ in range(2)
        ]
        time.sleep(0.5)
        service.process.terminate()
        assert service.process.wait(12) == 0
        assert [answer.result()[0] for answer in answers] == [200] * 2


def test_a_client_waiting_for_its_answer_is_not_silent(tmp_path):
    large = encoded(scaled(picture("obama.jpg"), 4))
    command = with_constants(SILENCE=1)
    with started(tmp_path, command, PHOTOS_AT_ONCE=1, DLIB_NUM_THREADS=1) as service:
        with ThreadPoolExecutor(5) as clients:
            answers = list(clients.map(service.detect, [large] * 4))
        assert [status for status, _ in answers] == [200] * 4


def test_unclosed_connections_delay_nobody(service):
    with ExitStack() as stack:
        for _ in range(10):
            client = stack.enter_context(connect(service))
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answered(client) == "HTTP/1.1 200 OK"
        began = time.monotonic()
        assert service.request("/health")[0] == 200
        assert time.monotonic() - began < 0.5


def test_more_connections_than_files_may_be_open(tmp_path):
    command = ["bash", "-c", 'ulimit -n 256; exec "$@"', "bash"]
    command += [sys.executable, "facerecognition-external-model.py"]
    large = encoded(scaled(picture("obama.jpg"), 3), "PNG")
    with started(tmp_path, command) as service:
        worker = service.worker()
        with ThreadPoolExecutor(3) as clients:
            answers = [clients.submit(service.detect, large) for _ in range(6)]
            held = [connect(service) for _ in range(400)]
            for client in held:
                client.sendall(b"GET /he")
            time.sleep(1)
            for client in held:
                client.close()
            assert [answer.result()[0] for answer in answers] == [200] * 6
        assert service.detect(SMALL)[0] == 200
        assert service.worker() == worker


def test_a_limit_on_threads(tmp_path):
    """A cgroup's pids.max, which docker --pids-limit sets: requests wait."""
    for root in ("/sys/fs/cgroup/pids", "/sys/fs/cgroup"):
        limited = Path(root, f"facerecognition-{os.getpid()}")
        try:
            limited.mkdir()
            (limited / "pids.max").write_text("30")
            break
        except OSError:
            continue
    else:
        pytest.skip("no control group for processes can be made here")
    command = ["sh", "-c", f'echo $$ > {limited}/cgroup.procs && exec "$@"', "sh"]
    command += [sys.executable, "facerecognition-external-model.py"]
    try:
        with started(tmp_path, command) as service:
            worker = service.worker()
            with ThreadPoolExecutor(60) as clients:
                answers = list(clients.map(service.detect, [SMALL] * 120))
            assert {status for status, _ in answers} == {200}
            assert service.worker() == worker
    finally:
        limited.rmdir()


# --------------------------------------------------------------------- bad requests


def chunked(body, key=KEY):
    head = f"POST /detect HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\n"
    head += "Transfer-Encoding: chunked\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    "body",
    [b"zz\r\nx\r\n", b"5\r\nabcdefgh\r\n", b"-1\r\n", b"5", b"ffffffffffffff\r\n"],
)
@pytest.mark.parametrize("key, expected", [(KEY, "400"), ("wrong", "401")])
def test_malformed_chunks(service, body, key, expected):
    lines = len(service.log().splitlines())
    with connect(service) as client:
        client.sendall(chunked(body, key))
        client.shutdown(socket.SHUT_WR)
        status = answered(client)
    assert status.split()[1] == expected
    assert len(service.log().splitlines()) <= lines + 2


@pytest.mark.parametrize("depth", [100, 300, 900, 980, 990, 5000])
def test_a_face_that_is_nested_deeply(service, depth):
    nested = '{"a":' * depth + "1" + "}" * depth
    face = f'{{"left":375,"top":154,"right":611,"bottom":390,"more":{nested}}}'
    status, _ = service.compute(photo("obama.jpg"), face)
    assert status == (200 if depth < 400 else 400)


@pytest.mark.parametrize("megapixels", [0.05, 1])
def test_a_tiff_with_offsets_past_its_end(service, megapixels):
    whole = encoded(scaled(picture("obama.jpg"), megapixels), "TIFF")
    image = Image.open(io.BytesIO(whole))
    (offset,) = image.tag_v2[273][:1]
    for beyond in (len(whole) + 9, 2**31 - 1, 2**32 - 1):
        content = whole.replace(struct.pack("<L", offset), struct.pack("<L", beyond))
        assert content != whole
        assert service.detect(content)[0] == 400
    cut = bytearray(whole)
    cut[4:8] = struct.pack("<L", 2**32 - 2)  # where the first directory is
    assert service.detect(bytes(cut))[0] in (400, 415)


def costs(service, content):
    """Return the status, and the megabytes and seconds that it took at most."""
    worker = service.worker()
    forget_peak(worker)
    before, began = memory(worker, "VmRSS"), time.monotonic()
    status, _ = service.detect(content)
    return status, peak_memory(worker) - before, time.monotonic() - began


def tiff_of_one_tile(size, tile):
    """A TIFF of size x size pixels in one deflated tile that is larger than that."""
    import zlib

    data = zlib.compress(bytes(1000), 9)
    tags = {256: size, 257: size, 258: 8, 259: 8, 262: 1, 277: 1}
    tags |= {322: tile, 323: tile, 324: 8, 325: len(data)}
    directory = struct.pack("<H", len(tags))
    for tag, value in sorted(tags.items()):
        directory += struct.pack("<HHLL", tag, 4, 1, value)
    begin = 8 + len(data) + len(data) % 2
    return (
        struct.pack("<2sHL", b"II", 42, begin)
        + data.ljust(begin - 8, b"\0")
        + directory
        + bytes(4)
    )


def test_a_tile_larger_than_its_image(service):
    service.detect(SMALL)
    for size, tile in ((100, 46336), (100, 20000), (2000, 30000)):
        status, megabytes, _ = costs(service, tiff_of_one_tile(size, tile))
        assert status == 412 and megabytes < 20


def progressive_bomb(size, scans):
    """A progressive JPEG with so many scans, each of a few bytes."""
    content = encoded(Image.new("L", (size, size)), "JPEG", progressive=True)
    begin = content.rindex(b"\xff\xda")
    last = content[begin:-2]
    return content[:begin] + last * scans + content[-2:]


def test_a_jpeg_of_thousands_of_scans(service):
    content = progressive_bomb(2800, 3000)
    status, _, seconds = costs(service, content)
    assert status == 412 and seconds < 1
    assert service.detect(progressive_bomb(2800, 20))[0] == 200


def test_slow_decoding_holds_no_model_set(tmp_path):
    """Photos are decoded before they take a model set, so that others can use it."""
    slow = progressive_bomb(2800, 90)
    with (
        started(tmp_path, PHOTOS_AT_ONCE=1, FACE_MODEL=3) as service,
        ThreadPoolExecutor(3) as clients,
    ):
        waiting = [clients.submit(service.detect, slow) for _ in range(3)]
        assert service.detect(SMALL)[0] == 200
        assert [answer.result()[0] for answer in waiting] == [200] * 3
        lines = [line for line in service.log().splitlines() if "/detect: " in line]
        assert "pixels" in lines[0] and "2800" not in lines[0]


def test_an_avif_larger_than_its_header_says(service):
    """It says 100 x 100, but holds 4000 x 4000: it is decoded alone, within what is free."""
    content = encoded(Image.new("L", (4000, 4000)), "AVIF", speed=10)
    lie = content.replace(
        b"ispe\0\0\0\0" + struct.pack(">LL", 4000, 4000),
        b"ispe\0\0\0\0" + struct.pack(">LL", 100, 100),
    )
    assert lie != content
    status, megabytes, _ = costs(service, lie)
    assert status in (200, 400) and megabytes < 200


def test_a_client_that_has_finished_sending_is_answered(tmp_path):
    """It shuts down its sending side, at once or while it waits for others."""
    with (
        started(tmp_path, PHOTOS_AT_ONCE=1) as service,
        connect(service) as first,
        connect(service) as second,
    ):
        first.sendall(upload(encoded(scaled(picture("obama.jpg"), 4))))
        time.sleep(0.2)
        second.sendall(upload(photo("obama.jpg")))
        for client in (first, second):
            client.shutdown(socket.SHUT_WR)
        for client in (first, second):
            content = client.makefile("rb").read()
            assert b"HTTP/1.1 200 OK" in content and b'"faces-count":1' in content


def test_a_file_name_in_latin_1(service):
    content = upload(photo("obama.jpg")).replace(
        b"secret-name", "größ-nam-éx".encode("latin-1")
    )
    with connect(service) as client:
        client.sendall(content)
        assert answered(client) == "HTTP/1.1 200 OK"


def test_a_file_sent_as_a_plain_field(service):
    status, answer = service.request("/detect", {"file": "not as a file"})
    assert (
        status == 400 and "as a file" in answer["error"] and "text" in answer["error"]
    )


# ------------------------------------------------------------- settings, and the soak


@pytest.mark.parametrize(
    "content, key",
    [
        (b"\xef\xbb\xbfabc\r\n", "abc"),
        (b"# made on Monday\n\nabc\n", "abc"),
        (b"abc\n# for Nextcloud\n", "abc"),
        (b"abc\ndef\n", None),
        ("abc\n".encode("utf-16"), None),
        (b"\xff\xfe\xfd", None),
    ],
)
def test_variants_of_key_files(tmp_path, content, key):
    (tmp_path / "api.key").write_bytes(content)
    if key:
        assert module._key_in(tmp_path / "api.key") == key
    else:
        with pytest.raises(SystemExit, match=r"api\.key (has 2 lines|can't be read)"):
            module._key_in(tmp_path / "api.key")


@pytest.mark.parametrize(
    "files, cores",
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.cfs_quota_us": "250000\n", "cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
)
def test_a_cpu_quota_counts_as_cores(tmp_path, monkeypatch, files, cores):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(module, "_cgroups", lambda controller: [tmp_path])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    assert module._count_cores() == cores


def test_more_photos_at_once_than_memory_holds(monkeypatch, caplog):
    monkeypatch.setattr(module, "_memory", lambda: (4 << 30, 4 << 30))
    module._fit_memory(1, None, 2)
    assert not caplog.text
    module._fit_memory(1, None, 8)
    assert "Memory is enough for 3 photos" in caplog.text


def test_create_app_with_other_settings(monkeypatch):
    monkeypatch.delenv("DLIB_NUM_THREADS", raising=False)
    settings = module.Settings(
        KEY, 3, "", 0, "info", 8294400, 1 << 20, 1, 1 << 30, 1 << 30
    )
    client = module.create_app(settings).test_client()
    assert client.get("/welcome").json["model"] == 3
    file = {"file": (io.BytesIO(photo("obama.jpg")), "a.jpg")}
    answer = client.post("/detect", data=file, headers={"x-api-key": KEY})
    assert json.loads(answer.data)["faces-count"] == 1
    assert hashlib.sha256(KEY.encode()).hexdigest() not in str(answer.headers)


def test_trickling_clients_and_an_honest_one(service):
    stop = threading.Event()
    chance = random.Random(1)
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(service)) for _ in range(300)]

        def trickle():
            content = upload(SMALL)
            for i in range(200):
                for client in slow:
                    if chance.random() < 0.5 and not stop.is_set():
                        client.send(content[i : i + 1])
                stop.wait(0.5)

        thread = threading.Thread(target=trickle)
        thread.start()
        for _ in range(5):
            began = time.monotonic()
            assert service.detect(SMALL)[0] == 200
            assert time.monotonic() - began < 2
        stop.set()
        thread.join()
