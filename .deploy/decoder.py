"""Decodes photos, each in a process of its own, whose memory and time the system limits.

    decoder.py COUNT SECONDS

It keeps COUNT processes waiting, each with so many seconds of processor time, and sends
the service a socket of each over standard input, which is a socket, too.  A process takes
one photo: the descriptor of its file, with

    {"region": [left, top, right, bottom] or null for all, "memory": bytes to decode in,
     "pixels": how many the region may have, with a "border" of so many on each side}

It answers with a line, and the RGB bytes of the region's part that lies in the image:

    {"size": [width, height], "region": [left, top, right, bottom]}

or with {"status": 400, 412 or 415, "reason": why the photo is refused}.
"""

import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import sys
import zlib
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageFile, ImageMath, JpegImagePlugin
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

# What dlib.load_rgb_image reads.
READERS = (BmpImageFile, GifImageFile, JpegImageFile, PngImageFile, WebPImageFile)
ROWS = 64  # that are converted at a time
SCALE = "scale it down, or lower PHOTOS_AT_ONCE"
TOO_MUCH = f"The photo takes more {{}} to decode than one may here: {SCALE}."
TOO_LARGE = f"{{}} pixels take more memory than a photo may here: {SCALE}."
Image.MAX_IMAGE_PIXELS = None
# Pillow refuses damaged segments on which no pixel depends.  What libjpeg needs of the
# application's, it reads itself.
for marker in (*range(0xFFE0, 0xFFF0), 0xFFFE):  # APP0 to APP15, COM
    JpegImagePlugin.MARKER[marker] = ("", "", JpegImagePlugin.Skip)
c_errno = ctypes.CDLL(None).__errno_location
c_errno.restype = ctypes.POINTER(ctypes.c_int)


class Refusal(Exception):
    """Why a photo is refused: its arguments are the status and the reason."""


def hide_in_png(file):
    """Hide from Pillow the chunks on which no pixel depends, as libpng only warns of them.

    Raises ``ValueError``, as libpng does, if another is damaged or missing.
    """
    at, kind, needed = 8, b"", {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
    while kind != b"IEND":
        kind, end = file[at + 4 : at + 8], at + 8 + int.from_bytes(file[at : at + 4])
        if end + 4 > len(file):
            raise ValueError("it is cut short")
        if kind == b"IDAT":
            needed.discard(b"tRNS")  # too late
        stored = int.from_bytes(file[end : end + 4])
        with memoryview(file) as view:
            kept = kind in needed and zlib.crc32(view[at + 4 : end]) == stored
        if not kept:
            if not kind[0] & 32:
                name = kind.decode("latin-1")
                raise ValueError(f"its chunk {name} is damaged or unknown")
            file[at + 4 : at + 8] = b"hIDe"
        at = end + 4


def open_image(file):
    """Return the ``PIL.Image`` in a file that is mapped into memory, not decoded yet."""
    for reader in READERS:
        _, accept = Image.OPEN[reader.format]
        if accept(file[:16]):
            break
    else:
        formats = ", ".join(reader.format for reader in READERS)
        raise Refusal(415, f"This is no image that is read here: send {formats}.")
    if reader is PngImageFile:
        hide_in_png(file)
        ImageFile.LOAD_TRUNCATED_IMAGES = True  # heed no checksum of what is hidden
    image = reader(file)
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    if reader is JpegImageFile:
        # All at once, as libjpeg can't wait for more of an image with arithmetic coding;
        # with end markers, as it adds them itself where a file is cut short.
        image.load_read = lambda _: file.read() + b"\xff\xd9" * 512
    return image


def to_rgb(image):
    """Convert as dlib does: 16-bit grey to 8-bit, and what is transparent onto black.

    See assign_pixel of an rgb_alpha_pixel in dlib's pixel.h.
    """
    if image.mode.startswith("I;16"):
        return Image.frombytes("L", image.size, image.tobytes()[1::2]).convert("RGB")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    *colours, alpha = image.convert("RGBA").split()

    def blend(of):
        return of["colour"] * (of["alpha"] + (of["alpha"] == 255)) >> 8

    blended = [ImageMath.lambda_eval(blend, colour=c, alpha=alpha) for c in colours]
    return Image.merge("RGB", [band.convert("L") for band in blended])


def rgb_strips(image, left, top, right, bottom):
    """Yield a region's RGB bytes, some rows at a time."""
    for row in range(top, bottom, ROWS):
        strip = image.crop((left, row, right, min(row + ROWS, bottom)))
        yield to_rgb(strip).tobytes()


def within(region, width, height):
    """Return a region's part that lies in the image, a pixel at least; None is all."""
    left, top, right, bottom = region or (0, 0, width, height)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    right, bottom = max(min(right, width), left + 1), max(min(bottom, height), top + 1)
    return left, top, right, bottom


def decode(service):
    """Take a photo from this socket, and answer with its pixels."""
    at_start = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    service.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    request, files, *_ = socket.recv_fds(service, 1024, 1)
    if not request:  # the service has ended
        return
    request = json.loads(request)
    try:
        file = mmap.mmap(files[0], 0, access=mmap.ACCESS_COPY)
        limit_memory(at_start + request["memory"])
        image = open_image(file)
        left, top, right, bottom = region = within(request["region"], *image.size)
        width, height = right - left, bottom - top
        border = 2 * request["border"]
        if (width + border) * (height + border) > request["pixels"]:
            raise Refusal(412, TOO_LARGE.format(width * height))
        of_service = 3 * width * height
        limit_memory(at_start + request["memory"] - of_service)
        strips = rgb_strips(image, *region)
        first = next(strips)
    except Exception as error:
        service.sendall(line(refusal(error)))
        raise
    service.sendall(line({"size": image.size, "region": region}))
    service.sendall(first)
    for strip in strips:
        service.sendall(strip)


def limit_memory(size):
    resource.setrlimit(resource.RLIMIT_AS, (max(size, 0), max(size, 0)))


def line(answer):
    return json.dumps(answer).encode() + b"\n"


def refusal(error):
    """Return how to refuse a photo after this error, which its decoder has raised."""
    if isinstance(error, Refusal):
        status, reason = error.args
    # A library's refusal to go on without memory can look like a broken image.
    elif isinstance(error, MemoryError) or c_errno()[0] == errno.ENOMEM:
        status, reason = 412, TOO_MUCH.format("memory")
    else:
        said = ascii(str(error))[1:-1]  # it can quote the file
        status, reason = 400, f"The image can't be decoded: {said}."
    return {"status": status, "reason": reason}


def main(count, seconds):
    """Keep so many processes waiting, and say how one ended that the system has killed."""
    control, processes = socket.socket(fileno=0), {}
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather than the service
    example = mmap.mmap(-1, 4096)
    Image.new("RGB", (8, 8)).save(example, "JPEG")
    example.seek(0)
    open_image(example).load()  # what that takes counts for no photo
    while True:
        while len(processes) < count:
            ours, theirs = socket.socketpair()
            process = os.fork()
            if process == 0:
                for other in (control, theirs, *processes.values()):
                    other.close()
                for limit in ("CORE", "FSIZE"):
                    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (0, 0))
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
                try:
                    decode(ours)
                finally:
                    os._exit(0)
            processes[process] = ours
            socket.send_fds(control, [b"1"], [theirs.fileno()])
            theirs.close()
        process, status = os.wait()
        with processes.pop(process) as service, suppress(OSError):
            if os.WIFSIGNALED(status) and not unread(service):
                service.sendall(line(refusal_of_killed(os.WTERMSIG(status))))


def unread(service):
    """Return whether a process has left a photo unread: then another one can take it."""
    service.shutdown(socket.SHUT_RD)  # no other one comes
    return service.recv(1)


def refusal_of_killed(by):
    """Return how to refuse the photo of a process that this signal has killed."""
    if by == signal.SIGXCPU:
        return {"status": 412, "reason": TOO_MUCH.format("time")}
    if by == signal.SIGKILL:  # by the system, as memory has run out
        return {"status": 412, "reason": TOO_MUCH.format("memory")}
    reason = f"The image makes its decoder crash: {signal.strsignal(by)}."
    return {"status": 400, "reason": reason}


if __name__ == "__main__":
    with suppress(ConnectionError):  # the service has ended
        main(*map(int, sys.argv[1:]))
