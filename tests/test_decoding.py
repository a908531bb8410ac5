"""What an image has taken over, and what is killed meanwhile, costs no other photo."""

import errno
import os
import random
import signal
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import shared
from shared import SMALL, App, children, encoded, module, refused, wait_for
from test_images import LONG, chunk, pixels, png_of, segment, tiny

from vendor import decoding

# Is added to the program, which then does what stands at the end of a photo.
TAKEN_OVER = r"""
def take_over(file):
    act, ours = file[-9:], range(3, 30)
    def answer(status, width, height, more=b""):
        for fd in ours:
            libc.send(fd, ANSWER.pack(status, width, height) + more, 10 + len(more), 0)
    def refuses(call, *arguments):
        return libc.syscall(call, *arguments) == -1 and ctypes.get_errno() == errno.EPERM
    if act == b"act:calls":
        _, prlimit64, allowed = CALLS[MACHINE]
        calls = [abi | call for abi in (0, 1 << 30) for call in range(600)]
        calls = set(calls) - {335, 336}  # only for probes, and exempt: they crash it
        reached = [call for call in calls if call not in (prlimit64, *allowed)
                   and not refuses(call, *[-1] * 6)]
        reached += [] if refuses(prlimit64, 1, 7, None, None) else ["prlimit64"]
        raise ValueError(f"reached {reached}")
    if act == b"act:crash":
        ctypes.string_at(0)
    while act == b"act:spins":
        pass
    if act == b"act:hangs":
        lock = Lock()
        lock.acquire()
        lock.acquire()
    if act == b"act:moved":
        answer(302, 20, 0, b"https://evil.example")
    if act == b"act:large":
        answer(200, 1 << 31, 1 << 31)
    if act == b"act:empty":
        answer(200, 0, 7)
    if act == b"act:talks":
        answer(400, 1 << 31, 0, bytes(1 << 18))
    if act == b"act:lines":
        answer(400, 20, 0, b"a\n\r\xff\x1b[2J" + b"x" * 12)
    if act == b"act:short":
        answer(200, 1000, 1000, bytes(1000))
    if act.startswith(b"act:"):
        os._exit(0)


"""


@pytest.fixture
def app(tmp_path, monkeypatch):
    """An application whose decoders can be taken over; they have a second of time."""
    program = (shared.ROOT / "vendor/decoding.py").read_text()
    for text, changed in {
        "\nSECONDS = 5 ": "\nSECONDS = 1 ",
        "    image = reader(file)\n": "    take_over(file)\n    image = reader(file)\n",
        "def open_image(file):\n": f"{TAKEN_OVER}def open_image(file):\n",
    }.items():
        assert program.count(text) == 1, text
        program = program.replace(text, changed)
    (tmp_path / "decoding.py").write_text(program)
    monkeypatch.setattr(decoding, "__file__", str(tmp_path / "decoding.py"))
    monkeypatch.setattr(decoding, "SECONDS_TO_ANSWER", 30)
    app = App(1, PHOTOS_AT_ONCE="2")
    app.decoder = app.app.config["ANALYSER"].decoder
    app.decoder.pauses = [0.05] * 3
    yield app
    app.decoder.close()


def kill(pids, by=signal.SIGKILL):
    for pid in pids:
        with suppress(ProcessLookupError):  # the photo before has ended it
            os.kill(pid, by)


@pytest.mark.skipif(not decoding.can_shut_in(), reason="there is no seccomp here")
def test_a_decoder_can_only_compute(app):
    """It tries every call of the system but those that it needs."""
    refused(app.detect(SMALL + b"act:calls"), 400, "reached []")


def scans():
    """A progressive JPEG that repeats its last scan, of 14 bytes, for hours."""
    whole = encoded(shared.scaled(shared.picture(), 0.5), progressive=True)
    last = whole.rindex(b"\xff\xda")
    scan = whole[last : last + 2 + whole[last + 3]] + bytes(4)
    return whole[:-2] + scan * 100_000


@pytest.mark.parametrize(
    "content, status, words",
    [
        (SMALL + b"act:crash", 400, "crash: Segmentation fault"),
        (SMALL + b"act:spins", 412, "more time"),
        (scans(), 412, "more time"),
        *((SMALL + b"act:" + act, 400, "crash") for act in (b"moved", b"large")),
        *((SMALL + b"act:" + act, 400, "crash") for act in (b"empty", b"talks")),
        (SMALL + b"act:lines", 400, r"a\n\r"),
        *((SMALL + b"act:" + act, 412, "more memory") for act in (b"short", b"quits")),
    ],
    ids=lambda value: repr(value[-9:]) if isinstance(value, bytes) else "",
)
def test_whatever_a_decoder_does_it_refuses_only_its_photo(app, content, status, words):
    seen = []

    def send(stopped):
        while not stopped.is_set():
            seen.append(app.detect(SMALL)[0])

    with shared.threads(send):
        answer = app.detect(content)
        wait_for(lambda: len(seen) > 2)
    refused(answer, status, words)
    assert answer[1]["error"].isprintable() and answer[1]["error"].isascii()
    assert set(seen) == {200}


def test_what_does_not_end_is_killed(app, monkeypatch, caplog):
    """The second time, as a machine can be frozen."""
    monkeypatch.setattr(decoding, "SECONDS_TO_ANSWER", 1)
    refused(app.detect(SMALL + b"act:hangs"), 412, "more time")
    assert caplog.text.count("timed out: the photo is tried again") == 1
    monkeypatch.undo()
    assert [app.detect(SMALL)[0] for _ in range(3)] == [200] * 3


def test_what_trickles_ends_in_time():
    ours, decoders = socket.socketpair()
    with ours, decoders, pytest.raises(TimeoutError):
        decoders.send(b"there always is more")
        decoding.receive(ours, bytearray(4), time.monotonic())


def test_a_machine_can_be_frozen(app, monkeypatch):
    """Or its fork server alone, which then does not tell how a decoder has ended."""
    monkeypatch.setattr(decoding, "SECONDS_TO_ANSWER", 1)
    server = app.decoder.server.pid

    def all_wait():
        decoders = children(server)
        return len(decoders) == 2 and all(map(leaves_no_core, decoders))

    wait_for(all_wait)
    frozen = [server, *children(server)]
    kill(frozen, signal.SIGSTOP)
    assert app.detect(SMALL)[0] == 200
    wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in frozen))
    kill([app.decoder.server.pid], signal.SIGSTOP)
    refused(app.detect(SMALL + b"act:short"), 412, "more memory")


def test_what_a_decoder_has_and_that_it_is_tried_again_when_killed(app, caplog):
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(app.detect, SMALL + b"act:hangs")
        for by in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            (decoder,) = wait_for(lambda: busy(app))
            of = Path("/proc", str(decoder))
            wait_for(lambda of=of: kinds_of_files(of) == FILES)
            assert shared.KEY not in (of / "environ").read_text()
            assert "\nCapEff:\t0000000000000000\n" in (of / "status").read_text()
            assert leaves_no_core(decoder)
            kill([decoder], by)
            wait_for(lambda gone=decoder: gone not in busy(app))
        refused(answer.result(), 412, "more memory")
    assert caplog.text.count("tried again") == len(app.decoder.pauses)
    assert app.detect(SMALL)[0] == 200


def test_no_photo_is_lost_while_decoders_are_killed():
    """Those that wait, those that work, and their fork server, for seconds."""
    app, chance, seen = App(3, PHOTOS_AT_ONCE="2"), random.Random(1), []
    decoder = app.app.config["ANALYSER"].decoder

    def send(stopped):
        while not stopped.is_set():
            seen.append(app.detect(SMALL)[0])

    with shared.threads(send, 3):
        for i in range(60):
            server = decoder.server.pid
            kill([server] if i % 3 == 0 else children(server))
            time.sleep(chance.random() / 5)
        before = len(seen)
        wait_for(lambda: len(seen) > before + 5)
    assert set(seen) == {200}
    decoder.close()


def test_a_fork_server_that_cannot_be_started_is_tried_again(app, monkeypatch):
    failures = [BlockingIOError(errno.EAGAIN, "no process"), OSError("no memory")]

    def start(*command, **options):
        if failures:
            raise failures.pop()
        return started(*command, **options)

    started = decoding.subprocess.Popen
    monkeypatch.setattr(decoding.subprocess, "Popen", start)
    kill([app.decoder.server.pid])
    app.decoder.server.wait()
    assert app.detect(SMALL)[0] == 200 and not failures


def leaves_no_core(decoder):
    """Then it has come so far that it ends with its fork server."""
    limits = Path("/proc", str(decoder), "limits").read_text()
    return "core file size 0 0" in " ".join(limits.split())


def busy(app):
    """The decoders that have a photo: the system would take these first for memory."""
    decoders = children(app.decoder.server.pid)
    scores = {pid: Path(f"/proc/{pid}/oom_score_adj") for pid in decoders}
    with suppress(OSError):
        return [pid for pid, score in scores.items() if score.read_text() == "1000\n"]
    return []


# Its photo's, which has no name, twice, as it is mapped; standard output and error, which
# lead nowhere; and the socket to answer on.
FILES = ["(deleted)", "(deleted)", "/dev/null", "/dev/null", "socket"]


def kinds_of_files(process):
    links = [os.readlink(file) for file in (process / "fd").iterdir()]
    return sorted(link.split(":")[0].split()[-1] for link in links)


@pytest.mark.parametrize(
    "options",
    [
        *({"format": format} for format in ("PNG", "GIF", "BMP", "WEBP")),
        *({"format": "WEBP", "lossless": True}, {"progressive": True}),
    ],
    ids=str,
)
def test_412_for_want_of_memory_whatever_a_library_says(options):
    """Libraries that get none call the image broken."""
    content, refusals = encoded(shared.scaled(shared.picture(), 2), **options), []
    for megabytes in range(1, 100, 5):
        try:
            pixels(content, memory=megabytes << 20)
        except decoding.Refusal as refusal:
            refusals.append(refusal.args)
    assert 1 < len(refusals) < 20
    assert {status for status, _ in refusals} == {412}, refusals


def crafted():
    """Small files that take gigabytes or hours, or that kill their decoder."""
    gif = b"GIF89a\n\0\n\0\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;"
    scans = encoded(tiny(), progressive=True)
    text = chunk(b"zTXt", b"a\0\0" + LONG)
    png = encoded(tiny(), "PNG")
    wide = scans.replace(scans[scans.index(b"\xff\xc2") + 5 :][:4], b"\xff\xdc" * 2)
    return {
        "frame.gif": (gif, 412),
        "size.jpg": (wide, 412),
        "texts.png": (png[:33] + text * 20 + png[33:], 200),
        "segments.jpg": (scans[:2] + segment(0xE5, b"") * 10**6 + scans[2:], 200),
        "bomb.png": (png_of(40_000), 412),
    }


def test_crafted_images_harm_nobody(start):
    """In 1 GB, beside a client of ordinary photos; the decoder has so many seconds."""
    service = start(megabytes=1000, PHOTOS_AT_ONCE=2, MAXIMUM_AREA=640 * 480)
    worker, face, seen = service.worker(), shared.face_in((50, 50, 90, 90)), []

    def send(stopped):
        while not stopped.is_set():
            seen.append(service.detect(SMALL)[0])

    with shared.threads(send):
        for name, (content, status) in crafted().items():
            answer = service.compute(content, face)
            assert answer[0] == status, (name, answer)
    assert set(seen) == {200} and service.worker() == worker


@pytest.mark.parametrize(
    "limits", [["prlimit", "--as=4000000000"], ["prlimit", "--cpu=40"]], ids=str
)
def test_limits_that_the_host_has_set(start, limits):
    """The service can't raise them, and decodes within them."""
    if os.geteuid() == 0:
        limits = ["setpriv", "--bounding-set=-sys_resource", *limits]
    assert start(prefix=limits, FACE_MODEL=3).detect(SMALL)[0] == 200


def test_start_tells_what_would_fail_every_photo(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setattr(tempfile, "tempdir", None)  # found anew
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(SystemExit, match="TMPDIR.* No such file .*/missing'$"):
        module.check_decoding()
    monkeypatch.delenv("TMPDIR")
    program = Path(decoding.__file__).read_text()
    monkeypatch.setattr(decoding, "__file__", str(tmp_path / "decoding.py"))
    for where, fault, said in (
        ("main(count)", "raise OSError('not here')", "go on: not here"),
        ("wait_for_photo(control, server)", "raise OSError('no')", "can't start"),
        ("wait_for_photo(control, server)", "os.kill(os.getpid(), signal.SIGSYS)", ""),
    ):
        assert f"def {where}:\n" in program
        broken = program.replace(f"def {where}:\n", f"def {where}:\n    {fault}\n")
        (tmp_path / "decoding.py").write_text(broken)
        with pytest.raises(SystemExit, match="^No photo can be .* server has ended$"):
            module.check_decoding()
        assert said in capfd.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(module, "can_shut_in", lambda: False)
    module.check_decoding()
    assert "no seccomp filters" in caplog.messages[-1]
