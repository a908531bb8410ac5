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

pytestmark = pytest.mark.skipif(
    not hasattr(dlib, "DLIB_FAST_FACES"), reason="stock dlib"
)


def faces(*emulator, level=""):
    """Return the level of CPU and the faces that another process finds."""
    done = subprocess.run(
        [*emulator, sys.executable, "-c", FACES],
        # What numpy may be told of this CPU is not true of an emulated one.
        env=os.environ | {"FACES_CPU": level, "OPENBLAS_CORETYPE": ""},
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
