"""make bench: compare this service with tests/tools/plain_service.py on stock dlib, in one run.

Both get the same photo in turn; figures are medians.  The first two arguments are the Pythons of
virtual environments: one with the stock dlib, and one with ONNX Runtime and OpenVINO, which compute
the bare convolutions of the CNN detector for comparison.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from shared import (
    ROOT,
    encoded,
    forget_peak,
    group,
    peak_memory,
    same,
    scaled,
    started,
)

# Megapixels, and how many photos each side gets of them.
SIZES = {0.31: (5, 15), 1: (3, 15), 4.32: (1, 5), 8.29: (1, 3)}
PAUSES = (0, 0.1, 1, 3)  # seconds

DETECTORS = """
import os, statistics, sys, time
import dlib, numpy as np
from PIL import Image

def median(work, times):
    work()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)

image = np.array(Image.open(sys.argv[1]))
folder = "vendor/models/1/"
cnn = dlib.cnn_face_detection_model_v1(folder + "mmod_human_face_detector.dat")
hog = dlib.get_frontal_face_detector()
shapes = [dlib.shape_predictor(folder + "shape_predictor_5_face_landmarks.dat")(image, face.rect) for face in cnn(image, 0)]
net = dlib.face_recognition_model_v1(folder + "dlib_face_recognition_resnet_model_v1.dat")
chips = [dlib.get_face_chip(image, shape) for shape in shapes]
print(
    median(lambda: cnn(image, 0), 5),
    median(lambda: hog(image, 1), 5),
    median(lambda: net.compute_face_descriptor(chips), 5) / len(chips),
)
"""


# The detector's seven convolutions, with random filters, on the tiled pyramid of 1000 x 1000 pixels.
CONVOLUTIONS = """
import os, statistics, sys, time
import numpy as np, onnx
from onnx import helper, numpy_helper

nodes, filters, channels = [], [], 3
for i, (count, size, stride) in enumerate([(16, 5, 2), (32, 5, 2), (32, 5, 2), (45, 5, 1), (45, 5, 1), (45, 5, 1), (1, 9, 1)]):
    values = np.random.rand(count, channels, size, size).astype(np.float32) - 0.5
    filters.append(numpy_helper.from_array(values / values.size, f"w{i}"))
    pad = [size // 2 if stride == 1 else 0] * 4
    nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"], strides=[stride] * 2, pads=pad))
    channels = count
value = lambda name, shape: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
graph = helper.make_graph(nodes, "detector", [value("x0", [1, 3, 3648, 1022])], [value("x7", None)], filters)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
threads = int(os.environ["DLIB_NUM_THREADS"])
if sys.argv[1] == "OpenVINO":
    import openvino
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    run = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
else:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    run = lambda pyramid: session.run(None, {"x0": pyramid})
pyramid = np.random.rand(1, 3, 3648, 1022).astype(np.float32)
taken = []
for _ in range(6):
    began = time.perf_counter()
    run([pyramid] if sys.argv[1] == "OpenVINO" else pyramid)
    taken.append(time.perf_counter() - began)
print(statistics.median(taken[1:]))
"""


def timed(service, content, clients=1, photos=1):
    """Return (seconds a photo, the answer) for so many photos from so many clients."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(service.detect, [content] * photos))
    assert all(status == 200 for status, _ in answers)
    return (time.perf_counter() - began) / photos, answers[0][1]


def bench_detectors(stock_python, onnx_python, photo):
    cores = sorted({1, len(os.sched_getaffinity(0))})
    runs = [("stock", stock_python, DETECTORS, 1)]
    runs += [("ours", sys.executable, DETECTORS, threads) for threads in cores]
    for name in ("ONNX Runtime", "OpenVINO"):
        runs += [(name, onnx_python, CONVOLUTIONS, threads) for threads in cores]
    results = {}
    for _ in range(3):  # in turn
        for name, python, code, threads in runs:
            environ = {**os.environ, "DLIB_NUM_THREADS": str(threads)}
            command = [python, "-c", code, name if code is CONVOLUTIONS else photo]
            said = subprocess.check_output(command, cwd=ROOT, env=environ, text=True)
            figures = [float(word) for word in said.split()]
            results.setdefault((name, threads), []).append(figures)
    print("\nAt 1 megapixel, 9 faces | threads | CNN, s | HOG, s | a descriptor, ms")
    print("---|---|---|---|---")
    for (name, threads), all in results.items():
        medians = [statistics.median(column) for column in zip(*all)]
        seconds = [f"{x * k:.3f}" for x, k in zip(medians, (1, 1, 1000))]
        print(" | ".join([name, str(threads), *seconds]), flush=True)
    print("(ONNX Runtime and OpenVINO: only the CNN's convolutions)")


def bench_services(stock_python, tmp, photos, models):
    print(
        "\nModel | megapixels | clients | stock, s a photo | ours, s a photo | photos a minute | faster | memory, GB | the same faces"
    )
    print("---|---|---|---|---|---|---|---|---", flush=True)
    for model in models:
        with ExitStack() as stack:
            plain = [stock_python, "tests/tools/plain_service.py"]
            stock = stack.enter_context(
                started(tmp / f"stock{model}", plain, FACE_MODEL=model)
            )
            ours = stack.enter_context(started(tmp / f"ours{model}", FACE_MODEL=model))
            timed(stock, photos[0.31])
            timed(ours, photos[0.31])
            for megapixels, (stock_times, our_times) in SIZES.items():
                pids = stock.process.pid, ours.worker()
                for pid in pids:
                    forget_peak(pid)
                stock_taken, our_taken = [], []
                for _ in range(stock_times):
                    seconds, expected = timed(stock, photos[megapixels])
                    stock_taken.append(seconds)
                    for _ in range(our_times // stock_times):
                        seconds, answer = timed(ours, photos[megapixels])
                        our_taken.append(seconds)
                memory = [peak_memory(pid) * (1 << 20) / 1e9 for pid in pids]
                rows = [
                    (1, statistics.median(stock_taken), statistics.median(our_taken))
                ]
                if megapixels <= 1:
                    rows.append(
                        (
                            4,
                            timed(stock, photos[megapixels], 4, 4)[0],
                            timed(ours, photos[megapixels], 4, 40)[0],
                        )
                    )
                for clients, before, after in rows:
                    print(
                        f"{model} | {megapixels} | {clients} | {before:.2f} | {after:.3f} | {60 / after:.0f}"
                        f" | {before / after:.1f}x | {memory[0]:.1f} -> {memory[1]:.1f}"
                        f" | {'yes' if same(expected, answer) else 'NO'}",
                        flush=True,
                    )


def bench_pauses(tmp, photos):
    """How long a photo takes that comes after a pause: in turn, the median of 15."""
    print("\nMegapixels | " + " | ".join(f"after {p} s" for p in PAUSES))
    print("---" + "|---" * len(PAUSES))
    with started(tmp / "pauses") as service:
        for megapixels in (0.31, 1):
            timed(service, photos[megapixels], photos=5)
            taken = {pause: [] for pause in PAUSES}
            for _ in range(15):
                for pause in PAUSES:
                    time.sleep(pause)
                    taken[pause].append(timed(service, photos[megapixels])[0])
            medians = [statistics.median(seconds) for seconds in taken.values()]
            figures = [f"{1e3 * m:.0f} ms ({m / medians[0]:.2f})" for m in medians]
            print(" | ".join([str(megapixels), *figures]), flush=True)


def bench_waiting(tmp, photo):
    """How long /welcome takes while all cores are busy and more photos wait."""
    with started(tmp / "busy") as service, ThreadPoolExecutor(4) as clients:
        photos = [clients.submit(service.detect, photo) for _ in range(12)]
        time.sleep(1)
        taken = []
        while not photos[-1].done():
            began = time.perf_counter()
            service.request("/welcome")
            taken.append(1e3 * (time.perf_counter() - began))
            time.sleep(0.01)
        assert all(answer.result()[0] == 200 for answer in photos)
    taken.sort()
    print(
        f"\n/welcome, while 4 clients send photos of 8.29 megapixels: {statistics.median(taken):.0f} ms,"
        f" 99th percentile {taken[len(taken) * 99 // 100]:.0f} ms, of {len(taken)}"
    )


def main():
    stock_python, onnx_python = sys.argv[1:3]
    models = [int(model) for model in sys.argv[3:]] or [1, 3, 4]
    picture = group()
    nine = picture.resize((picture.width, picture.height * 3))
    for row in range(3):
        nine.paste(picture, (0, row * picture.height))
    photos = {size: encoded(scaled(nine, size), quality=92) for size in SIZES}
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        (tmp / "photo.jpg").write_bytes(photos[1])
        bench_detectors(stock_python, onnx_python, tmp / "photo.jpg")
        bench_services(stock_python, tmp, photos, models)
        bench_pauses(tmp, photos)
        bench_waiting(tmp, photos[8.29])


if __name__ == "__main__":
    main()
