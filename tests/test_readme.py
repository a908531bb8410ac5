"""What the README names is there, and what there is, the README names."""

import re

import pytest
from shared import ROOT, module

README = (ROOT / "README.md").read_text()
PAGES = [README, (ROOT / "tests/README.md").read_text()]
MAKEFILE = (ROOT / "Makefile").read_text()
SOURCE = (ROOT / "facerecognition-external-model.py").read_text()
DECODING = (ROOT / "vendor/decoding.py").read_text()


def cells(section):
    """The first cells of the tables below this heading, without their backquotes."""
    text = README.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return [c.strip("`") for c in re.findall(r"^\| ([^|]+?) \|", text, re.MULTILINE)]


def test_settings():
    named = re.findall(r"\b[A-Z]+_[A-Z_]+\b|\bHOST\b|\bPORT\b", module.__doc__)
    named += ["DLIB_NUM_THREADS", "FACES_CPU", "TMPDIR"]
    assert {c for c in cells("Settings") if re.fullmatch("[A-Z_]+", c)} == set(named)


def test_endpoints_and_statuses():
    api = " ".join(cells("API"))
    for path in re.findall(r'@service\.\w+\("(/\w+)"\)', SOURCE):
        assert path in api
    raised = re.findall(r"\babort\(\s*(\d+)|\bstatus_code = (\d+)", SOURCE)
    raised += re.findall(r"\bRefusal\(\s*(\d+)()", DECODING)
    statuses = {"".join(status) for status in raised}
    assert {"400", "401", "412", "413", "415", "500", "507"} == statuses
    for status in statuses:
        assert re.search(rf"\b{status}\b", api), status


def test_limits():
    prose = " ".join(README.split())
    at_rest, per_photo = module.MEMORY_AT_REST >> 20, module.MEMORY_PER_PHOTO >> 20
    assert f"At rest it takes {at_rest} MB" in prose
    assert f"takes {per_photo} MB and 64 bytes a pixel" in prose
    assert module.MEMORY_PER_PIXEL == (64 if module.OUR_ENGINE else 1050)
    assert f"`maximum_area` is {module.REFERENCE_AREA}" in prose
    for path, most in module.MOST_BYTES.items():
        assert f"{most >> 20} MiB for `{path}`" in prose
    for name in re.findall(r"^from PIL.(\w+)ImagePlugin", DECODING, re.MULTILINE):
        assert f" {name.lower()}" in prose.lower()


@pytest.mark.parametrize("page", PAGES)
def test_targets_of_make(page):
    targets = re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE)
    command = r"(?:`|^|&& |sudo )make ((?:[A-Z_]+=\S+ )*[a-z-]+)"
    named = re.findall(command, page, re.MULTILINE)
    assert named
    for name in named:
        assert name.split()[-1] in targets, name


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    folder = ROOT if page is README else ROOT / "tests"
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in headings}
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page):
        assert link in anchors or (folder / link.split("#")[0]).exists(), link


def test_length():
    assert len([word for word in README.split() if word.strip("|-")]) <= 2200


def test_the_apps_link_has_its_anchor():
    assert "\n## Run service\n" in README


def test_promises_have_tests():
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    promises = PAGES[1].split("## Measurements")[0]
    named = re.findall(r"^\| .* \| (test_\w+) \|$", promises, re.MULTILINE)
    assert len(named) > 10
    for name in named:
        assert f"\ndef {name}(" in tests, name
