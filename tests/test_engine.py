"""Our engine: one build for every CPU of an architecture, with the same faces on each."""

import os
import platform
import re
import shutil
import subprocess
import sys

import dlib
import pytest
import shared

MODULE = dlib.__file__
FACES = f"""
import sys
import numpy as np
from PIL import Image
sys.path.insert(0, {os.path.dirname(MODULE)!r})
import dlib
models = {str(shared.ROOT / "vendor/models/1")!r}
image = np.asarray(Image.open({str(shared.PHOTOS / "obama.jpg")!r}).reduce(2))
cnn = dlib.cnn_face_detection_model_v1(models + "/mmod_human_face_detector.dat")
hog = dlib.get_frontal_face_detector()
print(dlib.DLIB_FAST_FACES)
print([(face.rect, round(face.confidence, 4)) for face in cnn(image)], hog(image, 1))
"""
MANY_FACES = f"""{FACES}
file = models + "/dlib_face_recognition_resnet_model_v1.dat"
describer = dlib.face_recognition_model_v1(file)
chips = [np.ascontiguousarray(image[y:][:150, 125:275]) for y in range(0, 200, 10)]
together = [list(numbers) for numbers in describer.compute_face_descriptor(chips)]
alone = [list(describer.compute_face_descriptor([chip])[0]) for chip in chips]
print(together)
print(together == alone)
"""
MEMORY = f"""{FACES}
import mmap
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE >> 20
before = resident()
large = np.zeros((1500, 2000, 3), np.uint8)
cnn(large), hog(large, 1)
print(resident() - before)
"""

pytestmark = pytest.mark.skipif(
    not hasattr(dlib, "DLIB_FAST_FACES"), reason="stock dlib"
)


def faces(*emulator, level="", threads="", code=FACES):
    """Return the level of CPU and the faces that another process finds."""
    told = {"FACES_CPU": level, "DLIB_NUM_THREADS": threads}
    done = subprocess.run(
        [*emulator, sys.executable, "-c", code],
        # What numpy may be told of this CPU is not true of an emulated one.
        env=os.environ | told | {"OPENBLAS_CORETYPE": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.splitlines() or done.stderr.splitlines()[-1:]


def test_a_lower_level_finds_the_same_faces():
    best, expected = faces()
    levels = ["AVX-512", "AVX2", "SSE2"] if platform.machine() == "x86_64" else ["NEON"]
    for level in levels[levels.index(best) :]:
        assert faces(level=level) == [level, expected]


def test_any_number_of_threads_computes_the_same():
    """They share the parts of a photo, of a network's filters, or the faces."""
    one, three, seven = (faces(threads=n, code=MANY_FACES) for n in ("1", "3", "7"))
    assert one[-1] == "True" and one == three == seven


def test_a_large_photo_leaves_little_memory():
    assert int(faces(code=MEMORY)[-1]) < 40


def test_a_level_that_there_is_not():
    (said,) = faces(level="AVX9000")
    assert re.search(r"FACES_CPU is AVX9000: this CPU can take (.*, )?\w+\.$", said)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64")
def test_only_kernels_have_instructions_that_not_every_cpu_has():
    """They are in anonymous namespaces, so that the linker takes none of them for all."""
    objdump = ["objdump", "-dC", "--no-show-raw-insn", MODULE]
    listing = subprocess.run(objdump, capture_output=True, text=True, check=True).stdout
    function, found = "", set()
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1]
        elif re.search(r"^ +[0-9a-f]+:\s+v[a-z]", line):  # as all of AVX are called
            found.add(function)
    assert len(found) > 10
    assert all("(anonymous namespace)::" in function for function in found), found


@pytest.mark.skipif(
    not shutil.which("qemu-x86_64-static"), reason="no qemu-user-static"
)
def test_a_cpu_without_avx():
    assert faces("qemu-x86_64-static", "-cpu", "Nehalem") == ["SSE2", faces()[1]]
