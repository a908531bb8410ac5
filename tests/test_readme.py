"""The README says what is so."""

import json
import re

from conftest import ROOT, box, module, overlap, photo

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
    for target in re.findall(r"`make (?:[A-Z_]+=\S+ )*([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_curls_output_is_real(service):
    (welcome,) = re.findall(r"^\{.*welcome.*\}$", README, re.MULTILINE)
    assert json.loads(welcome).keys() == service.request("/welcome")[1].keys()
    assert json.loads(welcome)["version"] == module.__version__
    (shown,) = re.findall(r"^\{.*obama.*\}$", README, re.MULTILINE)
    shown = json.loads(shown.replace(", …", ""))
    answer = service.detect(photo("obama.jpg"), filename="obama.jpg")[1]
    assert shown.keys() == answer.keys() and shown["filename"] == answer["filename"]
    one, other = shown["faces"][0], answer["faces"][0]
    assert (
        one.keys() == other.keys() and overlap(box(one), box(other)) > 0.5
    )  # with either detector


def test_memory_is_as_written():
    for model, cells in {1: "215 bytes", 3: "105 (3)", 4: "290 (4)"}.items():
        assert (
            module.bytes_per_pixel(model) == int(cells.split()[0]) and cells in README
        )
