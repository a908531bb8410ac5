"""Every call, status and error of the contract, over HTTP."""

import io
import json
import socket
import subprocess
import sys

import pytest
from PIL import Image
from shared import KEY, encoded, free_port, module, photo, picture, scaled, started

FACE = {"left": 375, "top": 154, "right": 611, "bottom": 390}


def refused(answer, status):
    """The answer is that error, as JSON that says what is wrong and what to do."""
    assert answer[0] == status, answer
    assert list(answer[1]) == ["error"] and len(answer[1]["error"]) > 20


def test_welcome(each_app):
    status, answer = each_app.request("/welcome", key=None)
    assert status == 200
    assert answer["facerecognition-external-model"] == "welcome"
    assert answer["version"] == module.__version__
    assert answer["model"] == each_app.model
    assert "dlib" in answer


def test_welcome_tells_whether_the_key_is_right(app):
    assert app.request("/welcome")[0] == 200
    refused(app.request("/welcome", key="wrong"), 401)
    refused(app.request("/welcome", key=""), 401)


def test_health(app):
    assert app.request("/health", key=None) == (200, "ok")
    assert app.request("/health", key="wrong") == (200, "ok")


def test_open(each_app):
    assert each_app.request("/open") == (
        200,
        {"preferred_mimetype": "image/jpeg", "maximum_area": 3840 * 2160},
    )


@pytest.mark.parametrize("key", [None, "", "wrong", KEY[:-1], KEY + "x", "schlüssel"])
@pytest.mark.parametrize("path", ["/open", "/detect", "/compute"])
def test_401(app, path, key):
    headers = {"x-api-key": key.encode()} if key else {}
    form = (
        None
        if path == "/open"
        else {"file": (io.BytesIO(photo("obama.jpg")), "a.jpg"), "face": "{}"}
    )
    refused(app.request(path, form, key=None, headers=headers), 401)


def test_404_and_405(app):
    refused(app.request("/nothing"), 404)
    refused(app.request("/static/x", key=None), 404)
    refused(app.request("/detect"), 405)
    refused(app.request("/welcome", {"file": "x"}), 405)


def test_400_for_missing_fields(app):
    refused(app.request("/detect", {"other": "x"}), 400)
    refused(app.request("/detect", {"file": "not sent as a file"}), 400)
    refused(app.request("/detect", body=b"no form at all"), 400)
    refused(app.request("/compute", {"face": json.dumps(FACE)}), 400)
    refused(
        app.request("/compute", {"file": (io.BytesIO(photo("obama.jpg")), "a.jpg")}),
        400,
    )


@pytest.mark.parametrize(
    "face",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '"face"',
        "{}",
        '{"left": 1, "top": 1, "right": 9}',
        '{"left": "1", "top": 1, "right": 9, "bottom": 9}',
        '{"left": true, "top": 1, "right": 9, "bottom": 9}',
        '{"left": null, "top": 1, "right": 9, "bottom": 9}',
        '{"left": [1], "top": 1, "right": 9, "bottom": 9}',
        '{"left": NaN, "top": 1, "right": 9, "bottom": 9}',
        '{"left": -Infinity, "top": 1, "right": 9, "bottom": 9}',
        '{"left": 1e999, "top": 1, "right": 9, "bottom": 9}',
        '{"left": 1, "top": 1, "right": 1e300, "bottom": 9}',
        '{"left": 1, "top": 1, "right": 99999999999999999999, "bottom": 9}',
        '{"left": 9, "top": 1, "right": 1, "bottom": 9}',
        '{"left": 1, "top": 9, "right": 9, "bottom": 1}',
        '{"left": 1, "top": 1, "right": 9, "bottom": 9, "more": NaN}',
        "[" * 100_000,
        '{"left":' * 10_000,
    ],
)
def test_400_for_an_invalid_face(app, face):
    refused(app.compute(photo("obama.jpg"), face), 400)


def test_a_face_is_described_wherever_it_is(app):
    for side in (-500, 0, 380, 900, 5000, 1_000_000):
        face = {"left": side, "top": side, "right": side + 200, "bottom": side + 200}
        status, answer = app.compute(photo("obama.jpg"), face | {"confidence": 1.5})
        assert status == 200 and len(answer["face"]["descriptor"]) == 128
        assert answer["face"]["confidence"] == 1.5
    huge = {
        "left": -1_000_000,
        "top": -1_000_000,
        "right": 1_000_000,
        "bottom": 1_000_000,
    }
    assert app.compute(photo("obama.jpg"), huge)[0] == 200
    point = {"left": 400, "top": 400, "right": 400, "bottom": 400}
    assert app.compute(photo("obama.jpg"), point)[0] == 200
    halves = {"left": 374.6, "top": 154.4, "right": 610.9, "bottom": 390.0}
    assert app.compute(photo("obama.jpg"), halves)[0] == 200


def test_400_for_an_image_that_is_cut_short(app):
    whole = {
        "JPEG": photo("obama.jpg"),
        "PNG": encoded(scaled(picture("obama.jpg"), 0.1), "PNG"),
        "WEBP": encoded(scaled(picture("obama.jpg"), 0.1), "WEBP"),
        "GIF": encoded(scaled(picture("obama.jpg"), 0.1), "GIF"),
        "TIFF": encoded(scaled(picture("obama.jpg"), 0.1), "TIFF"),
        "BMP": encoded(scaled(picture("obama.jpg"), 0.1), "BMP"),
    }
    for format, content in whole.items():
        assert app.detect(content)[0] == 200, format
        for part in (0.01, 0.3, 0.9):
            refused(app.detect(content[: int(len(content) * part)]), 400)
    refused(app.detect(b""), 400)
    refused(app.detect(photo("obama.jpg")[:20]), 400)


def test_400_for_an_image_that_is_broken(app):
    content = bytearray(encoded(scaled(picture("obama.jpg"), 0.1), "PNG"))
    content[len(content) // 2] ^= 0xFF
    refused(app.detect(bytes(content)), 400)


def test_412_before_anything_is_decoded(app):
    """A black PNG of 100 million pixels is some 100 KB, and would be 300 MB."""
    refused(app.detect(encoded(Image.new("RGB", (10_000, 10_000)), "PNG")), 412)
    refused(app.detect(encoded(Image.new("L", (3842, 2160)), "PNG")), 412)
    refused(app.detect(encoded(Image.new("1", (1, 8_000_000)), "PNG")), 412)


def test_413(app):
    refused(app.detect(bytes(65 << 20)), 413)
    refused(app.request("/detect", {f"field{i}": "x" for i in range(5000)}), 413)


@pytest.mark.parametrize(
    "content", [b"hello", b"%PDF-1.7 ...", b"%!PS-Adobe-3.0 EPSF-3.0\n", bytes(5000)]
)
def test_415(app, content):
    refused(app.detect(content), 415)


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
    answer = app.detect(photo("astronaut.png"), filename=sent)[1]
    assert answer["filename"] == answered


def test_curl_with_a_large_body(service, tmp_path):
    """As libcurl does it: 3 MB, Expect: 100-continue, a file name without extension."""
    large = encoded(
        picture("obama.jpg").resize((2600, 3000)), quality=100, subsampling=0
    )
    assert 3e6 < len(large) < 9e6
    (tmp_path / "phpXyZ").write_bytes(large)
    for key, status in ((KEY, "200"), ("wrong", "401")):
        for expect in ("Expect: 100-continue", "Expect:"):
            done = subprocess.run(
                [
                    "curl",
                    "-sS",
                    "-w",
                    "\n%{http_code}",
                    "-H",
                    f"x-api-key: {key}",
                    "-H",
                    expect,
                ]
                + ["-F", f"file=@{tmp_path}/phpXyZ", service.url + "/detect"],
                check=False,
                capture_output=True,
                text=True,
            )
            answer, code = done.stdout.rsplit("\n", 1)
            assert (code, done.stderr) == (status, "")
            assert (
                "error" in json.loads(answer)
                or json.loads(answer)["filename"] == "phpXyZ"
            )


def test_an_upload_without_a_length(service):
    """Chunked, as some proxies send it on."""
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%b\r\n--b--\r\n'
        % photo("obama.jpg")
    )
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(
            b"POST /detect HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nx-api-key: %b\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
            % (KEY.encode(), len(form), form)
        )
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("model", [1, 3])
def test_flask_run_as_the_reference_documents_it(tmp_path, model):
    port = free_port()
    command = [sys.executable, "-m", "flask", "run", "-h", "127.0.0.1", "-p", str(port)]
    with started(
        tmp_path,
        command,
        port,
        FLASK_APP="facerecognition-external-model.py",
        FACE_MODEL=model,
    ) as service:
        assert service.request("/welcome")[1]["model"] == model
        assert service.detect(photo("obama.jpg"))[1]["faces-count"] == 1


def test_gunicorn_with_the_app_by_name(tmp_path):
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "-b",
        f"127.0.0.1:{port}",
        "facerecognition-external-model:app",
    ]
    with started(tmp_path, command, port) as service:
        assert service.detect(photo("obama.jpg"))[1]["faces-count"] == 1
