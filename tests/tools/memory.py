"""make memory: the peak memory of one analysis, in bytes a pixel, for each model.

From it come the numbers of bytes_per_pixel and BYTES_AT_REST in the module.
"""

import io
import subprocess
import sys

from shared import (
    encoded,
    forget_peak,
    group,
    memory,
    module,
    peak_memory,
    scaled,
)

SIZES = (1, 4, 8.29)  # megapixels


def measure(model, megapixels):
    """Print a line of the table.  Each measurement needs a fresh process."""
    models = module.load_model_set(model)
    rest = memory("self", "VmRSS")
    photo = io.BytesIO(encoded(scaled(group(), megapixels)))
    forget_peak("self")
    for _ in range(2):  # the second finds the network's memory in place
        image = module.open_photo(photo)
        pixels = module.decode(image, (0, 0, *image.size))
        image.close()
        found = module.detect_faces(models, pixels)
        module.describe_faces(models, pixels, [box for box, _ in found])
        photo.seek(0)
    peak = peak_memory("self")
    print(
        f"{model} | {megapixels} | {rest:.0f} MB | {peak:.0f} MB | {(peak - rest) * (1 << 20) / megapixels / 1e6:.0f}"
    )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(int(sys.argv[1]), float(sys.argv[2]))
    else:
        print(
            "Model | megapixels | at rest | peak | bytes a pixel\n---|---|---|---|---",
            flush=True,
        )
        for model in (1, 2, 3, 4):
            for size in SIZES:
                subprocess.run(
                    [sys.executable, __file__, str(model), str(size)], check=True
                )
