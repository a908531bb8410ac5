"""Every call, status and error of the contract, and what the log says of them."""

import io
import json
import logging
import random
import socket
import subprocess
import sys

import pytest
from shared import (
    KEY,
    SIDES,
    encoded,
    free_port,
    module,
    photo,
    picture,
    refused,
    scaled,
    upload,
    wait_for,
)
from test_images import damaged
from werkzeug.formparser import FormDataParser

FACE = dict(zip(SIDES, (375, 154, 611, 390)))
SMALL = encoded(scaled(picture("obama.jpg"), 0.1))


def a_file(content=SMALL):
    return io.BytesIO(content), "secret-name.jpg"


# ----------------------------------------------------------------------------- answers


def test_welcome_tells_what_runs_and_whether_a_key_is_right(each_app):
    status, answer = each_app.request("/welcome", key=None)
    assert (status, answer["facerecognition-external-model"]) == (200, "welcome")
    assert answer["version"] == module.__version__
    assert answer["model"] == each_app.model
    assert each_app.request("/welcome")[0] == 200
    refused(each_app.request("/welcome", key="wrong"), 401)
    refused(each_app.request("/welcome", key=""), 401)


@pytest.mark.parametrize("key", [None, "wrong", KEY])
def test_health_needs_no_key(app, key):
    assert app.request("/health", key=key) == (200, "ok")


def test_open(each_app):
    expected = {"preferred_mimetype": "image/jpeg", "maximum_area": 3840 * 2160}
    assert each_app.request("/open") == (200, expected)


@pytest.mark.parametrize(
    "sent, answered",
    [
        ("photo.jpg", "photo.jpg"),
        ("no-extension", "no-extension"),
        ("../../etc/passwd", "passwd"),
        ("/var/tmp/phpA1b2C3", "phpA1b2C3"),
        ("Größe 1.jpg", "Größe 1.jpg"),
    ],
)
def test_the_base_name_is_answered(app, sent, answered):
    assert app.detect(SMALL, filename=sent)[1]["filename"] == answered


@pytest.mark.parametrize("expect", ["Expect: 100-continue", "Expect:"])
@pytest.mark.parametrize("key, status", [(KEY, "200"), ("wrong", "401")])
def test_curl_with_a_large_body(service, tmp_path, key, expect, status):
    """As libcurl does it: megabytes, and a file name without an extension."""
    noisy = picture("obama.jpg").resize((2000, 2500))
    (tmp_path / "phpXyZ").write_bytes(encoded(noisy, quality=100, subsampling=0))
    assert (tmp_path / "phpXyZ").stat().st_size > 2e6
    done = subprocess.run(
        ["curl", "-sS", "-w", "\n%{http_code}", "-H", f"x-api-key: {key}", "-H", expect]
        + ["-F", f"file=@{tmp_path}/phpXyZ", service.url + "/detect"],
        check=False,
        capture_output=True,
        text=True,
    )
    answer, code = done.stdout.rsplit("\n", 1)
    assert (code, done.stderr) == (status, "")
    answer = json.loads(answer)
    assert "error" in answer if code == "401" else answer["filename"] == "phpXyZ"


def chunked(body):
    head = (
        f"POST /detect HTTP/1.1\r\nHost: x\r\nx-api-key: {KEY}\r\nTransfer-Encoding: "
        "chunked\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n"
    )
    return head.encode() + body


def answer_to(service, sent):
    """Return the status of the answer to these bytes; None if there is none."""
    with service.connect() as client:
        try:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            return int(client.makefile("rb").read().split()[1])
        except (ConnectionError, IndexError):
            return None


def test_an_upload_without_a_length(service):
    """Chunked, as some proxies send it on."""
    form = upload(SMALL).split(b"\r\n\r\n", 1)[1]
    sent = chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(form), form))
    assert answer_to(service, sent) == 200


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("key", [None, "", "wrong", KEY[:-1], KEY + "x", "schlüssel"])
@pytest.mark.parametrize("path", ["/open", "/detect", "/compute"])
def test_401(app, path, key):
    form = None if path == "/open" else {"file": a_file(), "face": "{}"}
    refused(app.request(path, form, key=key), 401, "x-api-key")


def test_the_key_is_compared_in_constant_time(app, monkeypatch):
    compared = []
    monkeypatch.setattr(
        module.hmac, "compare_digest", lambda *keys: compared.append(keys)
    )
    refused(app.request("/open"), 401)
    assert compared == [(KEY.encode(), KEY.encode())]


def test_the_key_is_checked_before_the_form_is_read(app, monkeypatch):
    monkeypatch.setattr(FormDataParser, "parse", None)
    refused(app.detect(SMALL, key="wrong"), 401)


@pytest.mark.parametrize(
    "status, path, form",
    [
        (404, "/nothing", None),
        (404, "/static/x", None),
        (405, "/detect", None),
        (405, "/compute", None),
        (405, "/welcome", {"file": "x"}),
        (405, "/open", {"file": "x"}),
        (400, "/detect", {"other": "x"}),
        (400, "/detect", {"file": "not sent as a file"}),
        (400, "/detect", {}),
        (400, "/compute", {"face": json.dumps(FACE)}),
        (413, "/detect", {f"field{i}": "x" for i in range(900)}),
        (413, "/compute", {"face": "x" * 1_000_000}),
    ],
)
def test_other_refusals(app, status, path, form):
    refused(app.request(path, form), status)


def test_400_without_a_face(app):
    refused(app.request("/compute", {"file": a_file()}), 400, "face as JSON")


def nested(depth):
    inner = '{"a":' * depth + "1" + "}" * depth
    return json.dumps(FACE)[:-1] + f', "more": {inner}}}'


@pytest.mark.parametrize(
    "face",
    [
        *("", "{", "[]", "null", "7", '"face"', "{}"),
        '{"left": 1, "top": 1, "right": 9}',
        *(
            json.dumps(FACE | {"left": None}).replace("null", left)
            for left in ('"1"', "null", "[1]", "NaN", "-Infinity", "1e999", "-1e300")
        ),
        json.dumps(FACE | {"right": 99999999999999999999}),
        json.dumps(FACE | {"right": 1}),
        json.dumps(FACE | {"bottom": 1}),
        json.dumps(FACE | {"more": float("nan")}),
        *("[" * 100_000, '{"left":' * 10_000),
        nested(5000),
    ],
    ids=lambda face: face[:60] + str(len(face)),
)
def test_400_for_an_invalid_face(app, face):
    refused(app.compute(photo("obama.jpg"), face), 400, "face as JSON")


@pytest.mark.parametrize("depth", [100, *range(880, 1000, 8)])
def test_a_face_keeps_what_is_nested_in_it_or_is_400(service, depth):
    status, answer = service.compute(SMALL, nested(depth))
    assert status == 400 if depth > 990 else status in (200, 400)
    if status == 200:
        assert answer["face"]["more"] == json.loads(nested(depth))["more"]
    assert status == 200 or depth > 400


def test_413_for_what_is_longer_than_a_photo(app):
    refused(app.detect(bytes(65 << 20)), 413, "smaller")
    refused(app.compute(bytes(65 << 20), FACE), 415)


@pytest.mark.parametrize(
    "body", [b"zz\r\nx\r\n", b"5\r\nabcdefgh\r\n", b"-1\r\n", b"5", b"f" * 14 + b"\r\n"]
)
def test_malformed_chunks(service, body):
    lines = len(service.log().splitlines())
    assert answer_to(service, chunked(body)) == 400
    assert len(service.log().splitlines()) <= lines + 1


def test_broken_requests_are_the_clients_errors(service):
    chance, whole = (
        random.Random(6),
        upload(encoded(scaled(picture("obama.jpg"), 0.01))),
    )
    head, form = whole.split(b"\r\n\r\n", 1)
    chunks = chunked(b"64\r\n%b\r\n0\r\n\r\n" % form[:100]).split(b"\r\n\r\n", 1)
    statuses = set()
    for _ in range(200):
        head_sent, body = chance.choice(((head, form), chunks))
        if chance.random() < 0.5:
            body = damaged(body, chance)
        sent = damaged(head_sent, chance) + b"\r\n\r\n" + body
        statuses.add(answer_to(service, sent))
    assert 400 in statuses and not {500, 502, 507} & statuses, statuses
    assert service.detect(SMALL)[0] == 200


@pytest.mark.parametrize(
    "header", ["x: " + "y" * 3000, "\r\n".join(f"x{i}: y" for i in range(60))]
)
def test_few_and_short_headers(service, header):
    sent = f"GET /health HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n"
    assert answer_to(service, sent.encode()) in (400, 431)


# --------------------------------------------------------------------------- the log


def test_a_refused_request_is_one_line_in_the_log(app, caplog):
    """It tells the path, the size, the status and why, but no key and no file name."""
    sent = b"x" * 1000
    refused(app.detect(sent, filename="secret-name.jpg"), 415)
    refused(app.detect(SMALL[:50], filename="secret-name.jpg"), 400)
    refused(app.detect(sent, filename="secret-name.jpg", key="secret-key"), 401)
    refused(app.request("/no\nthing%0Aat%20all%s"), 404)
    refused(app.compute(SMALL, "{}"), 400)
    refused(app.request("/detect", {f"field{i}": "x" for i in range(900)}), 413)
    statuses = (415, 400, 401, 404, 400, 413)
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    for record, status in zip(lines, statuses, strict=True):
        line = record.getMessage()
        assert f" {status}, " in line and len(line) > 60 and "\n" not in line
        assert "secret" not in line and KEY not in line
    assert lines[0].getMessage().startswith("'/detect' of 1")


@pytest.mark.parametrize("status, error", [(500, ValueError), (507, MemoryError)])
def test_an_error_with_a_percent_sign(app, monkeypatch, caplog, status, error):
    def fail(models, pixels):
        raise error("100 %s of %d%%, 5 % left")

    monkeypatch.setattr(module, "detect_faces", fail)
    refused(app.detect(SMALL), status)
    (line,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert f" {status}, " in line.getMessage() and "\n" not in line.getMessage()
    assert ("Traceback" in caplog.text) == (status == 500)
    monkeypatch.undo()
    assert app.detect(SMALL)[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        f"GET /open HTTP/1.1\r\nHost: x\r\nx-api-key {KEY}\r\n\r\n",
        f"GET /open HTTP/1.1\r\nHost: x\r\nx-api-key : {KEY}\r\n\r\n",
        f"GET /open HTTP/1.1\r\nHost: x\r\nx-api-key: a\r\n {KEY}\r\n\r\n",
        f"GET /open HTTP/1.1\r\nHost: x\r\nx-api-key: {KEY}\0\r\n\r\n",
        f"GET /op\0en?{KEY} HTTP/1.1\r\nHost: x\r\n\r\n",
        f"{KEY}\r\n\r\n",
        f"GET /{'x' * 5000} HTTP/1.1\r\nx-api-key: {KEY}\r\n\r\n",
    ],
)
def test_a_malformed_request_is_one_line_without_the_key(service, sent):
    lines = len(service.log().splitlines())
    assert answer_to(service, sent.encode()) in (400, 414, 431)
    wait_for(lambda: len(service.log().splitlines()) > lines)
    new = service.log().splitlines()[lines:]
    assert len(new) == 1 and "%" not in new[0]
    assert KEY not in service.log()


# ---------------------------------------------------------------- other ways to run it


@pytest.mark.parametrize(
    "arguments",
    [
        "flask --app facerecognition-external-model.py run -h 127.0.0.1 -p {}",
        "gunicorn -b 127.0.0.1:{} facerecognition-external-model:create_app()",
    ],
    ids=lambda arguments: arguments.split()[0],
)
def test_other_servers(start, arguments):
    """``flask run``, as the reference documents it, and gunicorn."""
    port = free_port()
    command = [sys.executable, "-m", *arguments.format(port).split()]
    service = start(command=command, port=port, FACE_MODEL=3)
    assert service.request("/welcome")[1]["model"] == 3
    assert service.detect(SMALL)[1]["faces-count"] == 1
