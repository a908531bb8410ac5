"""Memory, disk and files: what there is not fails its own photo, and no other's."""

import io
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import shared
from PIL import Image
from shared import SMALL, App, encoded, face_in, memory, module, picture, refused
from test_images import pixels, png_of

LARGE = shared.resized(1, format="PNG")  # goes to the disk, not to memory


@pytest.fixture
def configured(monkeypatch):
    """configured(megabytes, SETTING=value) returns the settings in so much memory."""

    def read(megabytes, fast=True, **settings):
        for name, value in ({"API_KEY": shared.KEY} | settings).items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(module, "all_memory", lambda: megabytes << 20)
        monkeypatch.setattr(module, "MEMORY_PER_PIXEL", 64 if fast else 1050)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
        return module.checked_settings.__wrapped__()

    return read


@pytest.mark.parametrize(
    "megabytes, fast, area, at_once",
    [
        *((520, True, 3_500_000, 1), (953, True, 8294400, 1), (1024, True, 8294400, 1)),
        *((2048, True, 8294400, 2), (24576, True, 8294400, 4)),
        *((953, False, 600_000, 1), (1024, False, 600_000, 1)),
        *((4096, False, 3_400_000, 1), (24576, False, 8294400, 2)),
    ],
)
def test_the_area_is_what_memory_holds(configured, megabytes, fast, area, at_once):
    """The reference's, or less, with our dlib and with a stock one."""
    for total in (megabytes, megabytes - 1):  # the same after a kernel's update
        settings = configured(total, fast)
        assert (settings["MAXIMUM_AREA"], settings["PHOTOS_AT_ONCE"]) == (area, at_once)
        left = (total << 20) - module.MEMORY_AT_REST
        assert settings["PHOTO_MEMORY"] == left // at_once


@pytest.mark.parametrize(
    "megabytes, settings",
    [
        *((250, {}), (512, {"MAXIMUM_AREA": 3840 * 2160})),
        *((1024, {"PHOTOS_AT_ONCE": 2}), (4096, {"PHOTOS_AT_ONCE": 8})),
        *((4096, {"MAXIMUM_AREA": 640 * 480 - 1}), (8192, {"MAXIMUM_AREA": 5 * 10**8})),
    ],
)
def test_what_memory_is_not_enough_for_is_one_line(configured, megabytes, settings):
    with pytest.raises(SystemExit) as stopped:
        configured(megabytes, **settings)
    said = stopped.value.code
    assert "MAXIMUM_AREA" in said and "\n" not in said
    assert ("Memory is too small" in said) == (settings != {"MAXIMUM_AREA": 307_199})
    fewer = configured(megabytes * 4, **settings | {"MAXIMUM_AREA": 640 * 480})
    assert fewer["MAXIMUM_AREA"] == 640 * 480


def test_412_tells_the_pixels_before_anything_is_decoded(monkeypatch):
    """A white PNG of a billion pixels is 100 KB, and would be gigabytes."""
    monkeypatch.setattr(module, "all_memory", lambda: 1 << 30)
    app, face, bomb = App(3), face_in((100, 100, 300, 300)), png_of(32_000)
    refused(app.detect(bomb), 412, "1024000000 pixels take more memory")
    refused(app.compute(bomb, face), 412, "more memory to decode")
    # What fits, but not with the border that the CNN adds.
    refused(app.detect(encoded(Image.new("1", (110_000, 100)), "PNG")), 412, "11000000")


def test_a_photo_larger_than_the_area_is_analysed_if_memory_holds_it():
    """The app's hidden max_image_area, and its option -M, exceed it unchecked."""
    app = App(1, MAXIMUM_AREA="307200")
    status, answer = app.detect(shared.photo("obama.jpg"))
    assert (status, answer["faces-count"]) == (200, 1)
    assert app.request("/open")[1]["maximum_area"] == 307200


def original(megapixels, **options):
    """A photo with faces, large, small and in a corner; the first box is all of it."""
    image = Image.new("RGB", (4000, 3000), "grey")
    head = picture().crop((255, 30, 735, 510))
    boxes = [(0, 0, 3999, 2999)]
    for side, x, y in (1500, 1200, 700), (60, 500, 2000), (480, 3650, 2650):
        image.paste(head.resize((side, side)), (x, y))
        left, top = x + side // 4, y + side // 4
        boxes.append((left, top, left + side // 2, top + side // 2))
    boxes = [[round(s * (megapixels / 12) ** 0.5) for s in box] for box in boxes]
    return encoded(shared.scaled(image, megapixels), **options), boxes


@pytest.mark.parametrize(
    "options", [{"format": "PNG"}, {"progressive": True}, {"format": "WEBP"}], ids=str
)
def test_compute_describes_a_face_of_an_original_as_in_the_whole(app, options):
    content, boxes = original(4, **options)
    rectangles = [module.dlib.rectangle(*box) for box in boxes]
    models = module.load_model_set(app.app.config)
    whole = module.describe_faces(models, pixels(content), rectangles)
    for box, (landmarks, descriptor) in zip(boxes, whole):
        status, answer = app.compute(content, face_in(box))
        points = [{"x": point.x, "y": point.y} for point in landmarks]
        assert status == 200 and answer["face"]["landmarks"] == points
        assert shared.distance(answer["face"], {"descriptor": descriptor}) < 1e-6


@pytest.mark.parametrize("model", [1, 3])  # and 4 runs one after the other
def test_any_photo_of_the_largest_area_in_1_gb(start, model):
    service = start(megabytes=1000, FACE_MODEL=model)
    assert service.request("/open")[1]["maximum_area"] == 3840 * 2160
    largest = Image.new("RGB", (3840, 2160), "grey")
    largest.paste(picture().resize((1728, 2160)), (1000, 0))
    with ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(service.detect, [encoded(largest), SMALL]))
    assert [(status, a["faces-count"]) for status, a in answers] == [(200, 1)] * 2
    assert service.log().count("Booting worker") == 1


def test_originals_of_108_megapixels_in_1_gb(start):
    service, (content, boxes) = start(megabytes=1000), original(108)
    with ThreadPoolExecutor(8) as clients:
        sent = [
            clients.submit(service.compute, content, face_in(b)) for b in boxes[1:3]
        ]
        sent += [clients.submit(service.detect, SMALL) for _ in range(4)]
        assert [answer.result()[0] for answer in sent] == [200] * 6
    content, boxes = original(125)
    refused(service.compute(content, face_in(boxes[0])), 412)  # all of it is the face
    assert service.log().count("Booting worker") == 1


@pytest.mark.parametrize("model", [1, 3])
def test_the_widest_photos_and_the_highest(start, model):
    """In their memory, and under glibc's malloc checks: stock dlib writes past rows."""
    settings = {"FACE_MODEL": model, "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    if preload := next(Path("/lib").glob("*/libc_malloc_debug.so.0"), None):
        settings["LD_PRELOAD"] = preload
    service = start(**settings)
    worker = service.worker()
    rest = memory(worker)
    wide = Image.effect_noise((65_500, 126), 80)
    wide.paste(picture().resize((126, 126)), (9000, 0))
    for image in (wide, wide.rotate(90, expand=True)):
        assert service.detect(encoded(image))[0] == 200
    assert service.worker() == worker
    assert shared.peak_memory(worker) - rest < 104 + 64 * 65_522 * 148 / 2**20


# One in 500 requests for much memory fails, while the file FAILING is there.
FAILING_MEMORY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static int fails(size_t size)
{
    static unsigned long x = 88172645463325252UL;
    if (size < 30000 || access(getenv("FAILING"), F_OK) != 0)
        return 0;
    x ^= x << 13; x ^= x >> 7; x ^= x << 17;
    return x % 500 == 0;
}

void* malloc(size_t size)
{
    void* (*real)(size_t) = dlsym(RTLD_NEXT, "malloc");
    return fails(size) ? (errno = ENOMEM, NULL) : real(size);
}

int posix_memalign(void** memory, size_t alignment, size_t size)
{
    int (*real)(void**, size_t, size_t) = dlsym(RTLD_NEXT, "posix_memalign");
    return fails(size) ? ENOMEM : real(memory, alignment, size);
}
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler is installed")
@pytest.mark.parametrize("model", [1, 3])
def test_memory_refused_at_random_places(start, tmp_path, model):
    """Of two photos at once, each gets its own answer or 507, and the next is right."""
    (tmp_path / "fail.c").write_text(FAILING_MEMORY)
    library, failing = tmp_path / "fail.so", tmp_path / "failing"
    compiler = ["cc", "-shared", "-fPIC", "-O1", tmp_path / "fail.c", "-o", library]
    subprocess.run([*compiler, "-ldl"], check=True)
    refusing = {"LD_PRELOAD": library, "FAILING": failing}
    service = start(FACE_MODEL=model, PHOTOS_AT_ONCE=2, **refusing)
    photos = [encoded(shared.scaled(shared.group(), 0.1)), SMALL]
    alone = [service.detect(content)[1] for content in photos]
    worker, seen = service.worker(), []
    failing.touch()
    end = time.monotonic() + 300

    def send(i):
        while min(seen.count(507), seen.count(200)) < 6 and time.monotonic() < end:
            status, answer = service.detect(photos[i])
            seen.append(status)
            assert status != 200 or shared.same(alone[i], answer)

    with ThreadPoolExecutor(2) as clients:
        list(clients.map(send, (0, 1)))
    failing.unlink()
    assert set(seen) == {200, 507} and seen.count(507) > 5
    assert [service.detect(content)[1] for content in photos] == alone
    assert service.worker() == worker


def test_many_parts_of_a_form_do_not_stay_in_memory(service):
    form = {f"file{i}": (io.BytesIO(bytes(480_000)), "a") for i in range(300)}
    worker = service.worker()
    service.detect(SMALL)
    shared.forget_peak(worker)
    before = memory(worker)
    refused(service.request("/compute", form), 413)
    assert shared.peak_memory(worker) - before < 30


def open_files(pid):
    """The files, sockets and pipes that a process has open."""
    links = (os.path.realpath(fd) for fd in Path(f"/proc/{pid}/fd").iterdir())
    return [link for link in links if "wgunicorn" not in link]


def test_an_upload_has_no_name_on_disk_and_nothing_is_left_of_it(start):
    """After success or error, nor after kill -9 with most of a photo sent."""
    service = start()
    service.detect(SMALL)
    before = len(open_files(service.worker()))
    for content in (LARGE, LARGE[:600_000], b"x" * 600_000):
        for key in (shared.KEY, "wrong"):
            service.detect(content, key=key)
    assert list(service.tmp.iterdir()) == []
    shared.wait_for(lambda: len(open_files(service.worker())) <= before)
    with service.connect() as client:
        client.sendall(shared.upload(LARGE)[:-1000])
        held = str(service.tmp)
        shared.wait_for(lambda: held in " ".join(open_files(service.worker())))
        assert list(service.tmp.iterdir()) == []
        os.killpg(service.process.pid, signal.SIGKILL)
        service.process.wait()
    assert list(service.tmp.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small folder")
def test_disk_refused_as_it_is_full_or_read_only(start, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(*arguments):
        subprocess.run(["mount", *arguments, folder], check=True)

    mount("-t", "tmpfs", "-o", "size=700k", "none")
    try:
        service = start(TMPDIR=folder)
        for options, reason in (("rw", "No space left"), ("ro", "Read-only")):
            mount("-o", f"remount,{options}")
            refused(service.detect(LARGE), 507, reason)
            assert str(folder) not in service.log().splitlines()[-1]
            assert service.detect(SMALL)[0] == (200 if options == "rw" else 507)
        mount("-o", "remount,rw,size=50m")
        assert service.detect(LARGE)[0] == 200
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_more_connections_than_files_may_be_open(start):
    """They wait, or are dropped; photos are answered meanwhile and afterwards."""
    service = start(prefix=["prlimit", "--nofile=256"])
    worker = service.worker()
    with ExitStack() as stack, ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(service.detect, LARGE) for _ in range(6)]
        for _ in range(400):
            stack.enter_context(service.connect()).sendall(b"GET /he")
        stack.close()
        assert [answer.result()[0] for answer in answers] == [200] * 6
    assert service.detect(SMALL)[0] == 200 and service.worker() == worker


def test_too_few_processes_are_one_line(start):
    with pytest.raises(AssertionError) as stopped:
        start(processes=10, FACE_MODEL=3)
    (line,) = str(stopped.value).splitlines()
    assert "There can be 10 processes" in line and "--pids-limit" in line
