"""What the README says is true."""

import json
import re
import shutil

import pytest
from shared import PHOTOS, ROOT, box, module, overlap, photo
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


def test_endpoints_and_statuses_are_complete():
    cells = rows("Endpoints")
    for path in ("/welcome", "/health", "/open", "/detect", "/compute"):
        assert any(cell.endswith(f" {path}") for cell in cells)
    source = (ROOT / "facerecognition-external-model.py").read_text()
    for status in set(re.findall(r"\babort\(\s*(\d+)", source)) | {"413", "507"}:
        assert status in cells


def assert_make_has(targets):
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_named_make_targets_exist():
    settings = r'(?:[A-Z_]+=(?:"[^"]*"|\S+) )*'
    assert_make_has(re.findall(f"`make {settings}([a-z/-]+)", README))


def test_make_targets_in_the_workflow_exist():
    workflows = "".join(f.read_text() for f in (ROOT / ".github").rglob("*.yml"))
    targets = re.findall(r"(?:run:|&&|^) *make ([a-z-]+)", workflows, re.MULTILINE)
    assert "test" in targets and "docker-test" in targets
    assert_make_has(targets)


def words(text):
    """The text without numbers, which differ between the two detectors."""
    return re.sub(r"[\d.]+", "0", text)


def test_the_output_of_make_try(service, tmp_path):
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
def test_named_tests_exist(file):
    """Each word of a -k in the README, on its line or below it in a table, is in a test's name."""
    source = (ROOT / f"tests/test_{file}.py").read_text()
    names = re.findall(r"^def (test_\w+)", source, re.MULTILINE)
    chosen, last = [], None
    for found in re.finditer(r'tests/test_(\w+)\.py|-k ("[^"]+"|\w+)', README):
        last = found[1] or last
        if last == file:
            chosen += re.findall(r"\w+", found[2] or "test")
    assert chosen
    for word in set(chosen) - {"or"}:
        assert any(word in name for name in names), word


def test_the_output_of_curl(service):
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


def test_memory_figures(monkeypatch):
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


def test_the_units_are_the_installed_ones():
    for kind in ("socket", "service"):
        assert (ROOT / f".systemd/facerecognition.{kind}").read_text() in README


def test_the_apps_link_has_its_anchor():
    assert "\n## Run service\n" in README
