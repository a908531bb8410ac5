"""The README says what is so."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import PHOTOS, ROOT, box, module, overlap, photo
from test_try import run

README = (ROOT / "README.md").read_text()


def rows(section):
    """The first cells of the table below this heading, without their backquotes."""
    text = README.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    cells = re.findall(r"^\| ([^|]+?) \|", text, re.MULTILINE)
    return [cell.strip("`") for cell in cells]


def test_settings_are_those_of_the_module():
    named = set(re.findall(r"\b[A-Z]+_[A-Z_]+\b|\bHOST\b|\bPORT\b", module.__doc__))
    assert named | {"TMPDIR", "setting"} == set(rows("Settings"))


def test_endpoints_and_statuses_are_all_there():
    cells = rows("Endpoints")
    for path in ("/welcome", "/health", "/open", "/detect", "/compute"):
        assert any(cell.endswith(f" {path}") for cell in cells)
    source = (ROOT / "facerecognition-external-model.py").read_text()
    for status in set(re.findall(r"\babort\(\s*(\d+)", source)) | {"413", "507"}:
        assert status in cells


def test_make_has_what_is_named():
    makefile = (ROOT / "Makefile").read_text()
    settings = r'(?:[A-Z_]+=(?:"[^"]*"|\S+) )*'
    for target in re.findall(f"`make {settings}([a-z/-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def words(text):
    """The text without its numbers: those of either detector are right."""
    return re.sub(r"[\d.]+", "0", text)


def test_what_make_try_says_is_real(service, tmp_path):
    photos, shown = re.search(
        r'^\$ make try PHOTO="([^"]*)"\n(.*?)^```', README, re.MULTILINE | re.DOTALL
    ).groups()
    (tmp_path / "tests").mkdir()
    shutil.copytree(PHOTOS, tmp_path / "tests/photos")
    status, said = run(tmp_path, *photos.split(), port=service.port)
    assert status == 0, said
    assert [words(line) for line in said] == [
        words(line) for line in shown.splitlines()
    ]


@pytest.mark.parametrize("file", ["hostile", "nextcloud", "protocol", "proxy", "trust"])
def test_the_tests_that_are_named_are_there(file):
    """Each -k in the README, on its line or below it in a table, chooses some test."""
    chosen, last = [], None
    for found in re.finditer(r'tests/test_(\w+)\.py|-k ("[^"]+"|\w+)', README):
        last = found[1] or last
        if last == file:
            chosen.append(found[2].strip('"') if found[2] else "test")
    assert chosen
    for expression in chosen:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", "-k", expression]
            + [ROOT / f"tests/test_{file}.py"],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, expression


def test_curls_output_is_real(service):
    (welcome,) = re.findall(r"^\{.*welcome.*\}$", README, re.MULTILINE)
    assert json.loads(welcome).keys() == service.request("/welcome")[1].keys()
    assert json.loads(welcome)["version"] == module.__version__
    (shown,) = re.findall(r"^\{.*obama.*\}$", README, re.MULTILINE)
    shown = json.loads(shown.replace(", …", ""))
    answer = service.detect(photo("obama.jpg"), filename="obama.jpg")[1]
    assert shown.keys() == answer.keys() and shown["filename"] == answer["filename"]
    one, other = shown["faces"][0], answer["faces"][0]
    assert one.keys() == other.keys()
    assert overlap(box(one), box(other)) > 0.5  # with either detector


def test_memory_is_as_written(monkeypatch):
    prose = " ".join(README.split())
    assert "120 bytes a pixel (70 with model 3)" in prose
    assert [module.bytes_per_pixel(model) for model in (1, 2, 3, 4)] == [120] * 2 + [
        70,
        120,
    ]
    for area, megabytes in zip(module.AREAS, (1190, 735, 480, 280), strict=True):
        assert str(area) in prose and f"{megabytes} MB" in prose
        for given, fits in ((megabytes, True), (megabytes - 10, False)):
            memory = (given << 20, given << 20)
            monkeypatch.setattr(module, "_memory", lambda memory=memory: memory)
            try:
                assert (module._fit_memory(1, None, None)[0] >= area) == fits
            except SystemExit:
                assert not fits and area == module.AREAS[-1]


def test_the_units_are_those_that_are_installed():
    for kind in ("socket", "service"):
        assert (ROOT / f".systemd/facerecognition.{kind}").read_text() in README


def test_the_apps_link_has_its_anchor():
    assert "\n## Run service\n" in README
