#!/usr/bin/env python3
"""Makes the virtual environment .venv, or runs its pip.

    vendor/environment.py                 makes it, unless it is whole
    vendor/environment.py install flask   as .venv/bin/pip install flask

When an installation is interrupted, pip takes the half for the whole.  So the file
.venv/whole is not there while one runs; an environment without it is made anew.
"""

import importlib.util
import itertools
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / ".venv"
PYTHON = VENV / "bin" / "python"
WHOLE = VENV / "whole"
LOG = VENV / "pip.log"
PACKAGES = (
    "import os, sysconfig; print(os.path.realpath(sysconfig.get_path('purelib')))"
)


def packages():
    """Return the folder of the environment's packages; it has Python's version in it."""
    command = [PYTHON, "-c", PACKAGES]
    return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True)


def is_whole():
    """Return whether all is there, and neither the folder nor Python has changed."""
    try:
        return WHOLE.read_text() == packages()
    except (OSError, subprocess.CalledProcessError):
        return False


def mark_as_whole():
    os.sync()  # a power cut must not leave this file alone
    WHOLE.write_text(packages())


def make():
    if sys.version_info < (3, 11):  # noqa: UP036, of the system's Python
        sys.exit(f"{sys.executable} is older than Python 3.11: make PYTHON=python3.13")
    if not importlib.util.find_spec("ensurepip"):
        sys.exit("Python's venv is missing: apt install python3-venv")
    if not os.access(VENV.parent, os.W_OK):  # venv itself tells no more than that
        raise PermissionError
    print("Making a virtual environment in .venv", flush=True)
    WHOLE.unlink(missing_ok=True)
    command = [sys.executable, "-m", "venv", "--clear", VENV]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:  # without a traceback of each process
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if status:
        sys.exit(status)
    mark_as_whole()


def pip(arguments):
    """Run pip, and exit with its last lines if it fails, or with the reason if known."""
    whole = arguments[0] in ("install", "uninstall") and WHOLE.exists()
    if whole:
        WHOLE.unlink()
    status = run(arguments)
    said = LOG.read_text(errors="replace")
    unreachable = "Retrying (" in said and "(from versions: none)" in said
    if whole and (status == 0 or unreachable):  # then it has not begun to install
        mark_as_whole()
    if status and "CERTIFICATE_VERIFY_FAILED" in said:
        print("PyPI's certificate is not trusted here.", file=sys.stderr)
        sys.exit("If a proxy has a CA of its own: export SSL_CERT_FILE=/path/of/ca.pem")
    if status and unreachable:
        sys.exit("PyPI can't be reached: is this machine offline?")
    if status:
        sys.exit("\n".join([*said.splitlines()[-30:], f"All that pip said: {LOG}"]))


def run(arguments):
    """Return pip's exit status; say every ten seconds that it runs, and what is built."""
    environ = {"PIP_CERT": os.environ.get("SSL_CERT_FILE", "")} | os.environ
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--retries=2"]
    command += ["--require-virtualenv", *arguments]
    with (
        LOG.open("w") as log,
        subprocess.Popen(command, env=environ, stdout=log, stderr=log) as process,
    ):
        for seconds in itertools.count(10, 10):
            try:
                return process.wait(10)
            except subprocess.TimeoutExpired:
                built = re.findall(r"\[\d+/\d+\]", LOG.read_text(errors="replace"))
                print(f"  {seconds} s", *built[-1:], flush=True)


if __name__ == "__main__":
    try:
        if sys.argv[1:]:
            pip(sys.argv[1:])
        elif not is_whole():
            make()
    except PermissionError:
        sys.exit(
            f"{VENV.parent} is another user's: sudo chown -R $(id -un) '{VENV.parent}'"
        )
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
