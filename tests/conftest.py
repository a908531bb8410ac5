"""The services and applications that tests ask for."""

from contextlib import ExitStack

import pytest
from shared import app_with, memory_limit, started


@pytest.fixture
def start(tmp_path):
    """start(SETTING=value) returns a running service, which is stopped after the test.

    ``megabytes`` limits its memory; other options are those of ``shared.started``.
    """
    with ExitStack() as stack:
        folders = map(str, range(100))

        def start(*, megabytes=None, **options):
            if megabytes:
                options["prefix"] = stack.enter_context(memory_limit(megabytes))
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
