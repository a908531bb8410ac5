"""What the benchmark compares with: the simplest service with the same answers, for stock dlib.

One set of models, one photo at a time, one face at a time; and for model 4 the descriptors of
HOG's faces too, as the reference service computes them.  For tests/tools/bench.py.
"""

import os
import threading
from pathlib import Path

import dlib
import numpy as np
from flask import Flask, request
from PIL import Image

MODEL = int(os.environ["FACE_MODEL"])
FOLDER = Path(__file__).resolve().parents[2] / "vendor" / "models" / str(MODEL)

app = Flask(__name__)
one_at_a_time = threading.Lock()
hog = dlib.get_frontal_face_detector()
cnn = None
if MODEL != 3:
    cnn = dlib.cnn_face_detection_model_v1(str(FOLDER / "mmod_human_face_detector.dat"))
landmarks = dlib.shape_predictor(
    str(FOLDER / f"shape_predictor_{68 if MODEL == 2 else 5}_face_landmarks.dat")
)
descriptor = dlib.face_recognition_model_v1(
    str(FOLDER / "dlib_face_recognition_resnet_model_v1.dat")
)


def describe(image, box):
    shape = landmarks(image, box)
    return {
        "left": box.left(),
        "top": box.top(),
        "right": box.right(),
        "bottom": box.bottom(),
        "landmarks": [{"x": point.x, "y": point.y} for point in shape.parts()],
        "descriptor": list(descriptor.compute_face_descriptor(image, shape)),
    }


@app.get("/health")
def health():
    return "ok", {"Content-Type": "text/plain"}


@app.post("/detect")
def detect():
    with one_at_a_time:
        image = np.array(Image.open(request.files["file"].stream).convert("RGB"))
        boxes = [face.rect for face in cnn(image, 0)] if cnn else hog(image, 1)
        faces = [describe(image, box) for box in boxes]
        if MODEL == 4 and faces:
            for box in hog(image, 1):
                describe(image, box)
    return {"faces-count": len(faces), "faces": faces}


app.run(os.environ["HOST"], int(os.environ["PORT"]))
