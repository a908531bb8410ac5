"""Starting: wrong settings are reported in one line, and make sets up everything once."""

import os
import shutil
import socket
import stat
import subprocess
import sys

import pytest
from shared import KEY, ROOT, free_port, module, photo, started


@pytest.fixture
def copy(tmp_path):
    """A copy of the service, its models linked, in a folder of its own."""
    place = tmp_path / "copy"
    shutil.copytree(
        ROOT,
        place,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            ".git",
            ".venv",
            "photos",
            "build",
            "wheels",
            "api.key",
            "*.dat",
            "__pycache__",
        ),
    )
    for model in (1, 2, 3, 4):
        for file in (ROOT / "vendor/models" / str(model)).iterdir():
            (place / "vendor/models" / str(model) / file.name).symlink_to(
                file.resolve()
            )
    return place


def start(place, command=("facerecognition-external-model.py",), **settings):
    """Run the service until it stops by itself; return its exit status and what it says."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in ("API_KEY", "FACE_MODEL")
    }
    environ |= {"PORT": str(free_port()), "HOST": "127.0.0.1"} | settings
    done = subprocess.run(
        [sys.executable, *command],
        cwd=place,
        env=environ,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def refuses(place, words, **settings):
    status, said = start(place, **settings)
    assert status == 1 and len(said.splitlines()) == 1 and words in said, said


def test_no_key(copy):
    refuses(copy, "openssl rand -base64 32")
    refuses(copy, "openssl rand -base64 32", API_KEY="  ")
    (copy / "api.key").write_text("\n")
    refuses(copy, "empty")


def test_the_examples_key(copy):
    shutil.copy(copy / "api.key.example", copy / "api.key")
    refuses(copy, "example")
    refuses(copy, "example", API_KEY=(copy / "api.key.example").read_text())


@pytest.mark.parametrize(
    "setting",
    [
        "FACE_MODEL",
        "PORT",
        "MAXIMUM_AREA",
        "MAXIMUM_BODY",
        "PHOTOS_AT_ONCE",
        "DLIB_NUM_THREADS",
    ],
)
@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "١", "9" * 40])
def test_invalid_numbers(monkeypatch, setting, value):
    monkeypatch.setenv("API_KEY", KEY)
    monkeypatch.setenv(setting, value)
    with pytest.raises(SystemExit) as refusal:
        module.read_settings()
    assert setting in refusal.value.code and "\n" not in refusal.value.code


def test_an_invalid_log_level(copy):
    refuses(copy, "debug, info, warning, error", API_KEY=KEY, LOG_LEVEL="verbose")


def test_all_addresses_and_the_settings_of_older_images(tmp_path):
    """It listens on IPv4 and IPv6, and logs which settings it does not need."""
    settings = {"HOST": "", "GUNICORN_WORKERS": 4, "REQ_TIMEOUT": 60, "LOG_LEVEL": ""}
    with started(tmp_path, **settings) as service:
        assert service.detect(photo("obama.jpg"))[0] == 200
        if socket.has_dualstack_ipv6():
            service.url = f"http://[::1]:{service.port}"
            assert service.detect(photo("obama.jpg"))[0] == 200
        assert service.log().count("is not needed") == 2
        assert service.log().count("1 faces in 910 x 1137 pixels; ms: waited") >= 1


def test_a_quiet_log(tmp_path):
    with started(tmp_path, LOG_LEVEL="Warning") as service:
        assert service.detect(photo("obama.jpg"))[0] == 200
        assert "INFO" not in service.log() and "pixels" not in service.log()


def test_an_invalid_model(copy):
    refuses(copy, "the models are 1, 2, 3 and 4", API_KEY=KEY, FACE_MODEL="5")


def test_a_missing_model_file(copy):
    (copy / "vendor/models/2/shape_predictor_68_face_landmarks.dat").unlink()
    refuses(copy, "make FACE_MODEL=2 download-models", API_KEY=KEY, FACE_MODEL="2")


def test_a_model_file_damaged_by_one_byte(copy):
    file = copy / "vendor/models/1/dlib_face_recognition_resnet_model_v1.dat"
    content = bytearray(file.read_bytes())
    content[12_345_678] ^= 1
    file.unlink()
    file.write_bytes(content)
    refuses(copy, "damaged", API_KEY=KEY)


def test_errors_of_flask_run_are_one_line(copy):
    flask = {
        "command": ("-m", "flask", "run"),
        "FLASK_APP": "facerecognition-external-model.py",
    }
    refuses(copy, "API key", **flask)


@pytest.mark.parametrize("content", [KEY, KEY + "\n", f"  {KEY} \r\n"])
def test_the_key_of_the_file(copy, tmp_path, content):
    (copy / "api.key").write_text(content)
    (copy / "api.key").chmod(0o644)
    command = [sys.executable, str(copy / "facerecognition-external-model.py")]
    with started(tmp_path, command, API_KEY="") as service:
        assert service.request("/welcome", key=KEY)[0] == 200
        assert service.request("/welcome", key="other")[0] == 401
        assert "chmod 600" in service.log()
        (copy / "api.key").chmod(0o600)
    with started(tmp_path / "again", command, API_KEY="another") as service:
        assert service.request("/welcome", key="another")[0] == 200
        assert service.request("/welcome", key=KEY)[0] == 401
        assert "chmod 600" not in service.log()


def make(*arguments, cwd=ROOT):
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MAKE", "MFLAGS", "API_KEY"))
    }
    return subprocess.run(
        ["make", *arguments],
        cwd=cwd,
        env=environ,
        check=False,
        capture_output=True,
        text=True,
    )


def test_models_are_downloaded_once():
    for model in "1234":
        done = make(f"FACE_MODEL={model}", "download-models")
        assert done.returncode == 0 and "Download" not in done.stdout
    done = make("FACE_MODEL=7", "download-models")
    assert done.returncode == 2 and "the models are 1, 2, 3 and 4" in done.stderr


def test_models_share_their_files_by_relative_links():
    for model in "1234":
        for file in (ROOT / "vendor/models" / model).iterdir():
            assert os.readlink(file) == f"../{file.name}"


def test_a_new_key(copy):
    (copy / ".venv").symlink_to(sys.prefix)
    done = make("api.key", cwd=copy)
    key = (copy / "api.key").read_text().strip()
    assert len(key) > 30 and stat.S_IMODE((copy / "api.key").stat().st_mode) == 0o600
    assert done.stdout.count(key) == 1
    assert "'facerecognition.external_model_url' => 'http://" in done.stdout
    assert f"'facerecognition.external_model_api_key' => '{key}'," in done.stdout
    assert "occ face:setup -m 5" in done.stdout and "README.md" in done.stdout
    make("api.key", cwd=copy)
    assert (copy / "api.key").read_text().strip() == key


def test_a_folder_with_spaces_and_a_key_with_a_dollar_sign(copy, tmp_path):
    """make finds its environment there, writes the units, and passes the key on."""
    place = tmp_path / "two words"
    copy.rename(place)
    (place / ".venv").symlink_to(sys.prefix)
    done = make(f"UNITS={tmp_path}/two words", "units", cwd=place)
    assert done.returncode == 0, done.stderr
    unit = (place / "facerecognition.service").read_text()
    assert f'ExecStart="{place}/.venv/bin/python"' in unit
    (place / "Key.mk").write_text("include Makefile\nkey: ; @printenv API_KEY\n")
    for key in ("a$b", "a$$b", "$(HOME)", "plain"):
        done = make("-s", "-f", "Key.mk", f"API_KEY={key}", "key", cwd=place)
        assert done.stdout.strip() == key, done.stderr


def test_a_cached_dlib_is_for_its_cpu_only():
    """The cache key depends on the flags, and on what native means here."""
    keys = {
        subprocess.check_output(
            ["vendor/dlib.sh", "key"], cwd=ROOT, env={**os.environ, "CXXFLAGS": flags}
        )
        for flags in ("", "-O1", "-march=native")
    }
    assert len(keys) == 3


def test_an_environment_whose_python_has_gone(copy):
    """As after a system upgrade: it is made again automatically."""
    (copy / ".venv/bin").mkdir(parents=True)
    (copy / ".venv/bin/python").symlink_to("/nonexistent/python")
    for name in ("pyvenv.cfg", "installed-base", "installed-patched"):
        (copy / ".venv" / name).touch()
    done = make("-n", ".venv/pyvenv.cfg", cwd=copy)
    assert "Python has changed" in done.stdout and "-m venv --clear" in done.stdout


def test_make_help():
    said = make("help").stdout
    for target in ("serve", "test", "download-models", "clean"):
        assert f"make {target}" in said
