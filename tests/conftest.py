"""The services and applications that tests ask for."""

import os
from contextlib import ExitStack

import pytest
from shared import app_with, control_group, started

# Where CI is set, a test is skipped for one of these reasons, or fails.
MAY_BE_MISSING = ("apt install nginx", "apt install systemd")
MAY_BE_MISSING += ("no qemu-user-static", "of x86-64")
if os.geteuid():
    MAY_BE_MISSING += ("only root can mount a small folder",)
    MAY_BE_MISSING += ("needs root and setpriv (apt install util-linux)",)
    MAY_BE_MISSING += ("no control group for memory can be made here",)
    MAY_BE_MISSING += ("no control group for pids can be made here",)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and os.environ.get("CI"):
        _, _, why = report.longrepr
        if why.removeprefix("Skipped: ") not in MAY_BE_MISSING:
            report.outcome, report.longrepr = "failed", f"{why}, where CI is set"
    return report


@pytest.fixture
def start(tmp_path):
    """start(SETTING=value) returns a running service, which is stopped after the test.

    ``megabytes`` limits its memory, ``processes`` their number; other options are those
    of ``shared.started``.
    """
    with ExitStack() as stack:
        folders = map(str, range(100))

        def start(*, megabytes=None, processes=None, **options):
            if megabytes or processes:
                limit = (
                    ("memory", megabytes << 20) if megabytes else ("pids", processes)
                )
                options["prefix"] = stack.enter_context(control_group(*limit))
            return stack.enter_context(started(tmp_path / next(folders), **options))

        yield start


@pytest.fixture(scope="session")
def service(tmp_path_factory):
    """A running service with model 1, the same for all tests."""
    with started(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture
def app():
    return app_with(1)


@pytest.fixture(params=[1, 2, 3, 4])
def each_app(request):
    return app_with(request.param)
