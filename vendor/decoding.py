"""Decodes photos, each in a process of its own that may only compute.

A bug in libjpeg, libpng or libwebp can let a photo run code of its own.  In such a process
that code reaches no key, no file, no network and no other process, and the service
believes what it answers only as far as that can do no harm.

The service uses ``Decoder``, which runs this file as a program.  That is a fork server: it
imports Pillow once, and keeps some decoders waiting, forked processes that take one photo
each.  They all read from its standard input, a socket.  That brings what ``Decoder.decode``
is told, as a JSON list, with three descriptors: of the photo's file, and of two sockets.
On the first the decoder answers

    200, width, height   and the RGB bytes of the region's part that lies in the image
    status, length, 0    and so many bytes of why the photo is refused: 400, 412 or 415

On the second the fork server tells in a byte which signal has killed the decoder; 0 if
none has.
"""

import ctypes
import errno
import gc
import json
import logging
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path
from threading import Lock

if __name__ == "__main__":  # each side imports only what it needs
    from PIL import Image, ImageFile, ImageMath, JpegImagePlugin
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.GifImagePlugin import GifImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.WebPImagePlugin import WebPImageFile
else:
    import numpy as np

ANSWER = struct.Struct("!HII")
LONGEST_REASON = 1000  # bytes
# Of processor time.  A photo of 8.3 megapixels takes half a second and a PNG of 108 takes
# five: ten times as much, for slow machines.
SECONDS = 5  # also for what comes before the size is known
SECONDS_PER_MEGAPIXEL = 0.5
SECONDS_TO_ANSWER = 300  # until what neither answers nor ends is killed
# Seconds before each try.  That a decoder is killed need not be for its photo: when memory
# runs out because of another program, the system takes the decoders first.
PAUSES = (0, 0.1, 0.2, 0.4, 0.8, 1.6, 2, 2, 2, 2)
SCALE = "scale it down, or lower PHOTOS_AT_ONCE"
TOO_MUCH = f"The photo takes more {{}} to decode than one may here: {SCALE}."
TOO_LARGE = f"{{}} pixels take more memory than a photo may here: {SCALE}."
CRASH = "The image makes its decoder crash: {}."
# The signals that code can bring on its own process; others come from outside.
CRASHES = {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
CRASHES |= {signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP}
libc = ctypes.CDLL(None, use_errno=True)
libc.__errno_location.restype = ctypes.POINTER(ctypes.c_int)
log = logging.getLogger("facerecognition")


class Refusal(Exception):
    """Why a photo is refused: its arguments are the HTTP status and the reason."""


def within(region, width, height):
    """Return a region's part that lies in the image, a pixel at least; None is all."""
    left, top, right, bottom = region or (0, 0, width, height)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    right, bottom = max(min(right, width), left + 1), max(min(bottom, height), top + 1)
    return left, top, right, bottom


def exceeds(region, pixels, border):
    """Return whether a region, with a border on each side, has more pixels than that."""
    left, top, right, bottom = region
    return (right - left + 2 * border) * (bottom - top + 2 * border) > pixels


# ------------------------------------------------------------------------- the service


class Decoder:
    """Decodes so many photos at once, and keeps the fork server running for that.

    Its end is that of the thread that has started it, so those that decode must live on.
    """

    def __init__(self, count, pauses=PAUSES):
        self.count, self.pauses, self.lock = count, pauses, Lock()
        self._start()

    def decode(self, file, region, memory, pixels, border):
        """Return a region of an image file, where it begins, and the image's size.

        Its pixels are RGB, a uint8 array of shape (height, width, 3).  ``region`` is left,
        top, right and bottom, or None for all.  ``memory`` is how many bytes decoding may
        take, ``pixels`` how many the region may have with a ``border`` of so many on each
        side.  Raises ``Refusal`` with 400, 412 or 415 if the image can't be decoded so, and
        ``OSError`` if no decoder can be had.
        """
        request = json.dumps([region, memory, pixels, border]).encode()
        hung = False
        for pause in self.pauses:
            time.sleep(pause)
            try:
                return self._decode(file, request, region, pixels, border)
            except TimeoutError as error:
                self.server.kill()  # and with it the decoders
                if hung:
                    raise Refusal(412, TOO_MUCH.format("time")) from None
                hung, failure = True, error  # the machine can have been frozen
            except OSError as error:  # it was killed, or none can be started now
                failure = error
            log.warning("%s: the photo is tried again", failure)
        if isinstance(failure, ConnectionAbortedError):
            raise Refusal(412, TOO_MUCH.format("memory"))
        raise failure

    def close(self):
        """End the fork server, and with it the decoders."""
        self.control.close()
        self.server.kill()
        self.server.wait()

    def _decode(self, file, request, *limits):
        (answer, decoders), (ending, servers) = socket.socketpair(), socket.socketpair()
        with answer, ending:
            with decoders, servers:
                files = [file.fileno(), decoders.fileno(), servers.fileno()]
                self._send(request, files)
            until = time.monotonic() + SECONDS_TO_ANSWER
            try:
                return read_answer(answer, until, *limits)
            except EOFError:
                raise reason_of(ending, until) from None

    def _send(self, request, files):
        """Send this to the fork server, started again if it was killed."""
        with self.lock:
            if self.server.poll() is not None:
                self.close()
                self._start()
            socket.send_fds(self.control, [request], files)

    def _start(self):
        self.control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:
            self.server = subprocess.Popen(
                [sys.executable, "-I", "-Wignore", __file__, str(self.count)],
                env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},  # not the key
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C does not reach it
            )


def read_answer(answer, until, region, pixels, border):
    """Return what a decoder answers, raise its ``Refusal``, or ``EOFError`` if it ends.

    What no working decoder answers is taken for a crash.
    """
    head = receive(answer, bytearray(ANSWER.size), until)
    status, width, height = ANSWER.unpack(head)
    if status == 200 and width and height:
        left, top, right, bottom = part = within(region, width, height)
        if not exceeds(part, pixels, border):
            decoded = np.empty((bottom - top, right - left, 3), np.uint8)
            receive(answer, decoded.reshape(-1), until)
            return decoded, (left, top), (width, height)
    if status in (400, 412, 415) and width <= LONGEST_REASON:
        reason = receive(answer, bytearray(width), until).decode("ascii", "replace")
        raise Refusal(status, ascii(reason)[1:-1])  # it can quote the file
    raise Refusal(400, CRASH.format("it gives no valid answer"))


def receive(connection, buffer, until):
    """Fill a buffer from a socket until that time, and return it."""
    rest = memoryview(buffer)
    while rest:
        wait_until(until, connection)
        received = connection.recv_into(rest)
        if not received:
            raise EOFError
        rest = rest[received:]
    return buffer


def reason_of(ending, until):
    """Return the exception that tells why a decoder has ended without an answer."""
    wait_until(until, ending)
    signalled = ending.recv(1)
    if not signalled:
        return ConnectionResetError("The decoders' fork server has ended")
    if signalled[0] in CRASHES:
        return Refusal(400, CRASH.format(signal.strsignal(signalled[0])))
    if signalled[0] in (0, signal.SIGXCPU):  # 0 as it could not even refuse the photo
        return Refusal(412, TOO_MUCH.format("time" if signalled[0] else "memory"))
    return ConnectionAbortedError("A decoder was killed")


def wait_until(until, connection):
    """Have a socket wait until that time, or raise ``TimeoutError`` if it has passed."""
    if (left := until - time.monotonic()) <= 0:
        raise TimeoutError("timed out")
    connection.settimeout(left)


# --------------------------------------------------------------------- the fork server


def main(count):
    """Keep so many decoders, and tell the service which signal has killed one."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # when the service ends
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    control, decoders = socket.socket(fileno=0), {}
    for reader in READERS:
        decode_example(reader.format)
    gc.collect()
    gc.freeze()
    while True:
        while len(decoders) < count:
            ours, theirs = socket.socketpair()
            process = os.fork()
            if process == 0:
                try:
                    for other in (ours, *decoders.values()):
                        other.close()
                    wait_for_photo(control, theirs)
                except BrokenPipeError:
                    pass  # the fork server was killed
                except (MemoryError, OSError, ValueError) as error:
                    print(f"A decoder can't start: {error!r}", file=sys.stderr)
                finally:
                    os._exit(0)
            theirs.close()
            decoders[process] = ours
        process, status = os.wait()
        with decoders.pop(process) as taken:
            _, endings, _, _ = socket.recv_fds(taken, 1, 1)
        for ending in endings:
            with socket.socket(fileno=ending) as ending, suppress(OSError):
                ending.send(bytes([os.WTERMSIG(status)]))
        if not endings and os.WTERMSIG(status) in (0, *CRASHES):
            return  # as the next one would not start, either


def decode_example(format):
    """Have Pillow import and take what it does with the first image.

    After ``shut_in`` it can't, and it would count for a photo's memory and time.
    """
    example = mmap.mmap(-1, 4096)
    Image.new("RGB", (8, 8)).save(example, format)
    example.seek(0)
    to_rgb(open_image(example), blended=True).tobytes()


# ------------------------------------------------------------------------- the decoder

ROWS = 64  # that are converted at a time


def wait_for_photo(control, server):
    """Take a photo from one socket, tell so on the other one, and decode it."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # when the fork server ends
    libc.capset(CAPABILITIES, bytes(24))  # none, also as root
    decode_example("JPEG")  # touches the memory that this takes
    gc.disable()
    limit(resource.RLIMIT_CORE, 0)  # a photo could be in it
    wall = filter_of_calls()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    request, files, _, _ = socket.recv_fds(control, 1024, 3)
    if not request:  # the service has ended
        return
    photo, answer, ending = files
    socket.send_fds(server, [b"."], [ending])
    os.dup2(1, 2)  # from here on, only the service writes to the log
    os.close(ending)
    control.close()
    server.close()
    with suppress(OSError), open("/proc/self/oom_score_adj", "wb", 0) as file:
        file.write(b"1000")  # the system takes it rather than the service
    region, memory, pixels, border = json.loads(request)
    with socket.socket(fileno=answer) as answer:
        decode(photo, answer, wall, region, size + memory, pixels, border)


def decode(photo, answer, wall, region, memory, pixels, border):
    """Answer with a photo's pixels, or with why it is refused."""
    try:
        file = mmap.mmap(photo, 0, access=mmap.ACCESS_COPY)
        limit(resource.RLIMIT_AS, memory)
        limit(resource.RLIMIT_CPU, SECONDS)
        shut_in(wall)
        libc.__errno_location()[0] = 0
        image = open_image(file)
        width, height = image.size
        left, top, right, bottom = part = within(region, width, height)
        if exceeds(part, pixels, border):
            raise Refusal(412, TOO_LARGE.format((right - left) * (bottom - top)))
        of_service = 3 * (right - left) * (bottom - top)
        limit(resource.RLIMIT_AS, memory - of_service)
        megapixels = width * height / 1e6
        limit(resource.RLIMIT_CPU, int(SECONDS + SECONDS_PER_MEGAPIXEL * megapixels))
        strips = rgb_strips(image, *part)
        first = next(strips)
    except Exception as error:
        status, reason = refusal(error)
        reason = reason.encode("ascii", "backslashreplace")[:LONGEST_REASON]
        answer.sendall(ANSWER.pack(status, len(reason), 0) + reason)
        raise  # ends the process
    answer.sendall(ANSWER.pack(200, width, height))
    answer.sendall(first)
    for strip in strips:
        answer.sendall(strip)


def limit(kind, most):
    """Limit what this process may take, to less if the host says so."""
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    # Of time, more is allowed once the size is known.
    resource.setrlimit(kind, (most, hard if kind == resource.RLIMIT_CPU else most))


def refusal(error):
    """Return the status and the reason of a photo whose decoding has raised this."""
    if isinstance(error, Refusal):
        return error.args
    if memory_ran_out(error):
        return 412, TOO_MUCH.format("memory")
    return 400, f"The image can't be decoded: {error}."


def memory_ran_out(error):
    """Return whether memory was refused: a library that gets none can say that the image is
    broken, but errno stays as the C library has left it."""
    return isinstance(error, MemoryError) or libc.__errno_location()[0] == errno.ENOMEM


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


def rgb_strips(image, left, top, right, bottom):
    """Yield a region's RGB bytes, some rows at a time."""
    # dlib heeds what is transparent only in palettes and colours of PNG.
    colours = image.format == "PNG" and image.mode in ("P", "RGB", "RGBA")
    blended = colours and (image.mode == "RGBA" or "transparency" in image.info)
    for row in range(top, bottom, ROWS):
        strip = image.crop((left, row, right, min(row + ROWS, bottom)))
        yield to_rgb(strip, blended).tobytes()


def to_rgb(image, blended):
    """Convert as dlib does: 16-bit grey to 8-bit, and what is transparent onto black.

    See assign_pixel of an rgb_alpha_pixel in dlib's pixel.h.
    """
    if image.mode.startswith("I;16"):
        return Image.frombytes("L", image.size, image.tobytes()[1::2]).convert("RGB")
    if not blended:
        return image if image.mode == "RGB" else image.convert("RGB")
    *colours, alpha = image.convert("RGBA").split()

    def blend(of):
        return of["colour"] * (of["alpha"] + (of["alpha"] == 255)) >> 8

    blended = [ImageMath.lambda_eval(blend, colour=c, alpha=alpha) for c in colours]
    return Image.merge("RGB", [band.convert("L") for band in blended])


# ---------------------------------------------------------------------------- the wall

# The numbers of linux/audit.h, capability.h, prctl.h, filter.h, seccomp.h and, for each
# architecture, asm/unistd.h: prlimit64; sendto, mmap, munmap, mremap, madvise, brk, futex
# and exit_group.
CALLS = {
    "x86_64": (0xC000003E, 302, (44, 9, 11, 25, 28, 12, 202, 231)),
    "aarch64": (0xC00000B7, 261, (206, 222, 215, 216, 233, 214, 98, 94)),
}
MACHINE = os.uname().machine
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
CAPABILITIES = struct.pack("II", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
LOAD, EQUAL, RETURN, ALLOW, REFUSE = 0x20, 0x15, 0x06, 0x7FFF0000, 0x50000 | errno.EPERM


def can_shut_in():
    """Return whether the system has what ``shut_in`` needs."""
    # This only asks, as there is no filter: EFAULT is a yes.
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None)
    return MACHINE in CALLS and ctypes.get_errno() == errno.EFAULT


def filter_of_calls():
    """Return a seccomp filter that refuses, with EPERM, all but to compute and to answer.

    It is the code that prctl(2) takes, or None where the system has no filters.
    """
    if not can_shut_in():
        return None
    machine, prlimit64, calls = CALLS[MACHINE]
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, machine), (RETURN, 0, 0, REFUSE)]
    steps += [(LOAD, 0, 0, 0)]
    for call in calls:
        steps += [(EQUAL, 0, 1, call), (RETURN, 0, 0, ALLOW)]
    steps += [(EQUAL, 0, 3, prlimit64), (LOAD, 0, 0, 16), (EQUAL, 0, 1, 0)]  # its own
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    return ctypes.create_string_buffer(code, len(code))


def shut_in(code):
    """Have the system refuse calls of this process as the filter says, for good.

    That needs no privilege.  Without a filter, decoding goes on as it is.
    """
    if code:
        program = struct.pack("HP", len(code) // 8, ctypes.addressof(code))
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program):
            raise OSError(ctypes.get_errno(), "No seccomp filter can be set")


if __name__ == "__main__":
    # What dlib.load_rgb_image reads.
    READERS = (BmpImageFile, GifImageFile, JpegImageFile, PngImageFile, WebPImageFile)
    Image.MAX_IMAGE_PIXELS = None
    # Pillow refuses damaged segments on which no pixel depends.  What libjpeg needs of the
    # application's, it reads itself.
    for marker in (*range(0xFFE0, 0xFFF0), 0xFFFE):  # APP0 to APP15, COM
        JpegImagePlugin.MARKER[marker] = ("", "", JpegImagePlugin.Skip)
    try:
        main(int(sys.argv[1]))
    except OSError as error:
        sys.exit(f"The decoders' fork server can't go on: {error}")
