"""How gunicorn serves: gunicorn -c .deploy/gunicorn.conf.py, in the service's folder.

One worker process has the models, and a thread for each connection: clients wait.  SIGTERM
finishes the photos in flight.  Other settings: https://gunicorn.org/reference/settings/
"""

import importlib
import logging
import os
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress

from gunicorn.workers.gthread import ThreadWorker

SILENCE = 60  # seconds after which a silent client is dropped


class Worker(ThreadWorker):
    """gunicorn's gthread, which does not wait for clients to close."""

    def handle(self, conn):
        kept = super().handle(conn)
        if not kept:  # else gunicorn's main thread reads for 2 s, and accepts nobody
            with suppress(OSError):
                conn.sock.shutdown(socket.SHUT_RD)
        return kept


worker_class = Worker

wsgi_app = "facerecognition-external-model:create_app()"
workers = 1
timeout = 0  # a photo may take any time
graceful_timeout = 300
keepalive = 0  # a reused connection can close just as a photo is sent
limit_request_fields = 50
limit_request_field_size = 2048
forwarded_allow_ips = ""  # nobody's SCRIPT_NAME or X-Forwarded-Proto counts
control_socket_disable = True
logconfig_dict = {  # as the service's own lines
    "root": {"level": "INFO", "handlers": ["error_console"]},
    "loggers": {"gunicorn.error": {"level": "INFO", "propagate": True}},
    "formatters": {"generic": {"format": "%(asctime)s %(levelname)s %(message)s"}},
}
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def listen(host, port):
    """Return what to bind to, or exit with one line if nothing can listen there.

    gunicorn itself would try it five times, and tell of each.
    """
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        return []  # gunicorn takes systemd's sockets
    both = host in ("", "::") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        server = socket.create_server(
            (host, port), family=family, dualstack_ipv6=both, backlog=2048
        )
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        other = ".  For another port: make PORT=5001 serve"
        sys.exit(f"Can't listen on HOST {host!r}, PORT {port}: {reason}{other}")
    return f"fd://{server.detach()}"


def connections(at_once):
    """Return how many clients can be served, or exit with one line if none can.

    gunicorn ends its worker when it can't open a file or start a thread for one.
    """
    limits = {}
    for name in ("NOFILE", "NPROC"):
        kind = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (hard, hard))
        limits[name] = hard if hard != resource.RLIM_INFINITY else sys.maxsize
    processes = min([limits["NPROC"], *service.limits_of_cgroup("pids.max")])
    ours = 8 + 2 * at_once + os.cpu_count()  # decoders, and threads that analyse
    if processes <= ours:
        sys.exit(
            f"There can be {processes} processes and threads, but it takes {ours + 1}:"
            " raise --pids-limit or TasksMax, or ulimit -u."
        )
    return min(1000, limits["NOFILE"] // 10, processes - ours)  # a client's files


def when_ready(server):
    if address := os.environ.get("SHOWN_ADDRESS"):
        print(f"Its address for Nextcloud is {address}.  Ctrl-C stops it.", flush=True)
    # SIGHUP: the terminal was closed.
    signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


def post_worker_init(worker):
    for listener in worker.sockets:  # connections inherit this
        silence = struct.pack("ll", SILENCE, 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, silence)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the main process gets it, too


def in_one_line(record):
    """Have gunicorn log a client's errors in one line, without what it sent."""
    record.msg, record.args = record.getMessage(), ()
    if record.exc_info and isinstance(record.exc_info[1], OSError):
        record.msg += f" {record.exc_info[1]}"
        record.exc_info = None
    if record.msg.startswith("Invalid request"):
        record.msg = record.msg.split(": ")[0]  # it can quote the key
    return True


logging.getLogger("gunicorn.error").addFilter(in_one_line)
# A wrong setting ends the main process here, not one worker after another.
service = importlib.import_module("facerecognition-external-model")
at_once = service.checked_settings()["PHOTOS_AT_ONCE"]
threads = worker_connections = connections(at_once)
bind = listen(os.environ.get("HOST", ""), service.whole_number("PORT", 5000, 65535))
