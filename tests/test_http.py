"""Every call, status and error of the contract, and what the log says of them."""

import io
import json
import logging
import random
import socket
import subprocess
import sys

import pytest
import shared
from shared import KEY, SMALL, App, encoded, module, picture, refused, upload, wait_for
from test_images import damaged, tiny
from werkzeug.formparser import FormDataParser

FACE = shared.face_in((375, 154, 611, 390))


def test_welcome_tells_what_runs_and_whether_a_key_is_right(each_app):
    status, answer = each_app.request("/welcome", key=None)
    assert (status, answer["facerecognition-external-model"]) == (200, "welcome")
    assert answer["version"] == module.__version__
    assert answer["model"] == each_app.model
    assert each_app.request("/welcome")[0] == 200
    refused(each_app.request("/welcome", key="wrong"), 401)
    refused(each_app.request("/welcome", key=""), 401)


def test_open_and_health(each_app):
    expected = {"preferred_mimetype": "image/jpeg", "maximum_area": 3840 * 2160}
    assert each_app.request("/open") == (200, expected)
    for key in (None, "wrong", KEY):
        assert each_app.request("/health", key=key) == (200, "ok")


@pytest.mark.parametrize("sent", ["a.jpg", "Größe 1", "", "../../passwd", "/tmp/php1"])
def test_the_base_name_is_answered(service, sent):
    answer = service.detect(SMALL, filename=sent)[1]
    assert answer["filename"] == sent.split("/")[-1]


@pytest.mark.parametrize("expect", ["Expect: 100-continue", "Expect:"])
@pytest.mark.parametrize("key, status", [(KEY, "200"), ("wrong", "401")])
def test_curl_with_a_large_body(service, tmp_path, key, expect, status):
    """As libcurl does it: megabytes, and a file name without an extension."""
    (tmp_path / "phpXyZ").write_bytes(encoded(picture("biden.jpg"), "BMP"))
    done = subprocess.run(
        ["curl", "-sS", "-w", "\n%{http_code}", "-H", f"x-api-key: {key}", "-H", expect]
        + ["-F", f"file=@{tmp_path}/phpXyZ", service.url + "/detect"],
        check=True,
        capture_output=True,
        text=True,
    )
    answer, code = done.stdout.rsplit("\n", 1)
    assert (code, done.stderr) == (status, "")
    answer = json.loads(answer)
    assert "error" in answer if code == "401" else answer["filename"] == "phpXyZ"


def test_a_client_that_reads_only_after_it_has_sent_all_gets_its_error(service):
    for key, path, status in (("wrong", b"/detect", 401), (KEY, b"/detekt", 404)):
        sent = upload(bytes(30 << 20), key=key).replace(b"/detect", path)
        assert answer_to(service, sent) == status


def chunked(body):
    head = upload(b"").split(b"\r\n\r\n")[0].replace(b"Content-Length:", b"x:")
    return head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + body


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
    too_long = b"".join(b"%x\r\n%b\r\n" % (1 << 20, bytes(1 << 20)) for _ in range(65))
    assert answer_to(service, chunked(too_long)) in (413, None)


@pytest.mark.parametrize("key", [None, "", "wrong", KEY[:-1], KEY + "x", "schlüssel"])
@pytest.mark.parametrize("path", ["/open", "/detect", "/compute"])
def test_401(app, path, key):
    form = None if path == "/open" else {"file": (io.BytesIO(SMALL), "a"), "face": "{}"}
    refused(app.request(path, form, key=key), 401, "x-api-key")


def test_a_key_that_is_not_ascii():
    """curl sends its bytes; WSGI has them decoded as Latin-1."""
    app = App(3, API_KEY="schlüssel")
    sent = "schlüssel".encode().decode("latin-1")
    assert app.request("/open", key=sent)[0] == 200


def test_the_key_is_compared_in_constant_time_before_the_form_is_read(app, monkeypatch):
    compared = []
    monkeypatch.setattr(FormDataParser, "parse", None)
    monkeypatch.setattr(
        module.hmac, "compare_digest", lambda *keys: compared.append(keys)
    )
    refused(app.detect(SMALL), 401)
    assert compared == [(KEY.encode(), KEY.encode())]


@pytest.mark.parametrize(
    "status, path, form",
    [
        *((404, "/nothing", None), (404, "/static/x", None)),
        *((405, "/detect", None), (405, "/compute", None), (405, "/open", {"a": "x"})),
        *((400, "/detect", {"other": "x"}), (400, "/detect", {})),
        (400, "/detect", {"file": "not sent as a file"}),
        (400, "/compute", {"face": json.dumps(FACE)}),
        (413, "/detect", {f"field{i}": "x" for i in range(900)}),
        (413, "/compute", {"face": "x" * 1_000_000}),
    ],
)
def test_other_refusals(app, status, path, form):
    refused(app.request(path, form), status)


def test_413_for_what_is_longer_than_a_photo(app):
    refused(app.detect(bytes(65 << 20)), 413, "smaller")
    refused(app.compute(bytes(65 << 20), FACE), 415)


def with_left(left):
    return json.dumps(FACE).replace("375", left)


def nested(depth):
    more = '{"a":' * (depth - 1) + "1" + "}" * (depth - 1)
    return json.dumps(FACE)[:-1] + f', "more": {more}}}'


@pytest.mark.parametrize(
    "face",
    [
        *(
            "",
            "{",
            "[]",
            "null",
            "7",
            '"face"',
            "{}",
            "[" * 100_000,
            '{"left":' * 10_000,
        ),
        *map(with_left, ('"1"', "null", "[1]", "NaN", "-Infinity", "1e999", "-1e300")),
        *map(with_left, ("99999999999999999999", "800")),
        *(with_left('1, "more": 1e999'), with_left('1, "more": NaN'), nested(5000)),
        '{"left": 1, "top": 1, "right": 9}',
    ],
    ids=lambda face: face[:60] + str(len(face)),
)
def test_400_for_an_invalid_face(app, face):
    refused(app.compute(SMALL, face), 400, "face")


def test_a_face_keeps_what_is_nested_in_it_or_is_400(service):
    """The limit is the service's own, the same with every version of Python."""
    status, answer = service.compute(SMALL, nested(500))
    assert status == 200
    assert answer["face"]["more"] == json.loads(nested(500))["more"]
    for depth in (501, 1000, 5000, 50_000):
        refused(service.compute(SMALL, nested(depth)), 400, "500 objects")


def test_headers_of_a_proxy_do_not_count(service):
    """Not even from 127.0.0.1, where gunicorn heeds some by default."""
    sent = "GET /health HTTP/1.1\r\nHost: x\r\nSCRIPT_NAME: /x\r\n"
    sent += "X-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off\r\n\r\n"
    assert answer_to(service, sent.encode()) == 200


def test_broken_requests_are_the_clients_errors(service):
    chance, statuses = random.Random(6), set()
    head, form = upload(encoded(tiny())).split(b"\r\n\r\n", 1)
    chunks = chunked(b"64\r\n%b\r\n0\r\n\r\n" % form[:100]).split(b"\r\n\r\n", 1)
    for _ in range(200):
        start, body = chance.choice(((head, form), chunks))
        body = damaged(body, chance) if chance.random() < 0.5 else body
        sent = damaged(start, chance) + b"\r\n\r\n" + body
        statuses.add(answer_to(service, sent))
    assert 400 in statuses and not {500, 502, 507} & statuses, statuses
    assert service.detect(SMALL)[0] == 200


def test_a_refused_request_is_one_line_in_the_log(app, caplog):
    """It tells the path, the size, the status and why, but no key and no file name."""
    sent = {"photo": b"x" * 1000, "filename": "secret-name.jpg"}
    refused(app.detect(**sent), 415)
    refused(app.detect(**sent, key="secret-key"), 401)
    refused(app.detect(SMALL[:50], filename="secret-name.jpg"), 400)
    refused(app.request("/no\nthing%0Aat%20all%s"), 404)
    refused(app.compute(SMALL, "{}"), 400)
    refused(app.request("/detect", {f"field{i}": "x" for i in range(900)}), 413)
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    for line, status in zip(lines, (415, 401, 400, 404, 400, 413), strict=True):
        assert f" {status}, " in line and len(line) > 60 and "\n" not in line
        assert "secret" not in line and KEY not in line
    assert lines[0].startswith("'/detect' of 1")


@pytest.mark.parametrize("status, error", [(500, ValueError), (507, MemoryError)])
def test_an_error_with_a_percent_sign(app, monkeypatch, caplog, status, error):
    def fail(models, pixels):
        raise error("100 %s of %d%%, 5 % left")

    monkeypatch.setattr(module, "detect_faces", fail)
    refused(app.detect(SMALL), status)
    (line,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert f" {status}, " in line.getMessage()
    assert ("Traceback" in caplog.text) == (status == 500)
    monkeypatch.undo()
    assert app.detect(SMALL)[0] == 200


def test_a_model_set_is_lent_again_unless_its_run_has_failed(app, monkeypatch):
    lent, detect = [], module.detect_faces

    def fail(models, pixels):
        raise MemoryError

    for run in (detect, fail, detect, detect):
        monkeypatch.setattr(
            module,
            "detect_faces",
            lambda models, pixels, run=run: lent.append(models) or run(models, pixels),
        )
        app.detect(SMALL)
    assert lent[0] is lent[1] is not lent[2] is lent[3]


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
        f"GET /open HTTP/1.1\r\nHost: x\r\nx-api-key: {KEY * 200}\r\n\r\n",
        "GET /open HTTP/1.1\r\nHost: x\r\n" + f"x: {KEY}\r\n" * 60 + "\r\n",
        *(chunked(body) for body in (b"zz\r\nx\r\n", b"5\r\nabcdefgh\r\n", b"-1\r\n")),
        *(chunked(body) for body in (b"5", b"f" * 14 + b"\r\n")),
    ],
)
def test_a_malformed_request_is_one_line_without_the_key(service, sent):
    lines = len(service.log().splitlines())
    sent = sent if isinstance(sent, bytes) else sent.encode()
    assert answer_to(service, sent) in (400, 414, 431)
    wait_for(lambda: len(service.log().splitlines()) > lines)
    (line,) = service.log().splitlines()[lines:]
    assert "%" not in line and KEY not in line


@pytest.mark.parametrize(
    "command",
    [
        "flask --app facerecognition-external-model.py run -h 127.0.0.1 -p {}",
        "gunicorn -b 127.0.0.1:{} facerecognition-external-model:create_app()",
    ],
    ids=lambda command: command.split()[0],
)
def test_other_servers(start, command):
    """``flask run``, as the reference documents it, and gunicorn."""
    command, port = [sys.executable, "-m", *command.split()], shared.free_port()
    command = [word.format(port) for word in command]
    service = start(command=command, port=port, FACE_MODEL=3)
    assert service.request("/welcome")[1]["model"] == 3
    assert service.detect(SMALL)[1]["faces-count"] == 1
