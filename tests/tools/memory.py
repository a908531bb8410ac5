"""make memory: the peak memory of a photo, for each model, over the process at rest.

It may be 64 MB and 64 bytes a pixel, in a fresh process and after 100 photos of mixed
sizes.  The module counts on that: MEMORY_PER_PHOTO (with a model set) and MEMORY_PER_PIXEL.
"""

import io
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shared import encoded, forget_peak, group, memory, module, peak_memory, scaled

SIZES = ["8.29", "4.32", "1", "0.31"]  # megapixels
MIXED = [f"{0.04 * 200 ** (i * 37 % 100 / 100):.3f}" for i in range(100)]


def measure(model, folder, sizes, others):
    """Print a line of the table for each of the sizes, which come after others."""
    files = module.check_model_files(model)
    settings = {"FACE_MODEL": model, "MODEL_FILES": files}
    pool, own = ThreadPoolExecutor(1), threading.local()
    pool.submit(module.own_models, own, settings).result()

    def analyse(size):
        image = module.open_photo(io.BytesIO((folder / size).read_bytes()))
        region = (0, 0, *image.size)
        pool.submit(module.analyse, own, settings, image, region, None, 0).result()

    rest = memory("self", "VmRSS")
    for size in others:
        analyse(size)
    for size in sizes:
        forget_peak("self")
        analyse(size)
        peak = peak_memory("self") - rest
        limit = 64 + 64 * float(size) * 1e6 / (1 << 20)
        figures = f"{rest:.0f} | {peak:.0f} | {limit:.0f}"
        held = "yes" if peak <= limit else "NO"
        print(f"{model} | {size} | {len(others)} | {figures} | {held}", flush=True)


def main():
    print("Model | megapixels | after | at rest, MB | peak over it | limit | held")
    print("---|---|---|---|---|---|---", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES + MIXED:
            Path(folder, size).write_bytes(encoded(scaled(group(), float(size))))
        for model in "1234":
            for sizes in (*zip(SIZES), SIZES):
                command = [sys.executable, __file__, folder, model, *sizes]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        folder, model, *sizes = sys.argv[1:]
        others = MIXED if len(sizes) > 1 else []
        measure(int(model), Path(folder), sizes, others)
