"""The services and applications that tests ask for."""

import functools
from contextlib import ExitStack

import pytest
from shared import App, started


@pytest.fixture(scope="session")
def services(tmp_path_factory):
    """services(N) is a running service with model N, the same for all tests."""
    with ExitStack() as stack:
        running = {}

        def service(model):
            if model not in running:
                tmp = tmp_path_factory.mktemp(f"model{model}")
                running[model] = stack.enter_context(started(tmp, FACE_MODEL=model))
            return running[model]

        yield service


@pytest.fixture
def service(services):
    return services(1)


@pytest.fixture(params=[1, 2, 3, 4])
def each_service(request, services):
    """A running service, with each model in turn; ``model`` is its number."""
    service = services(request.param)
    service.model = request.param
    return service


@pytest.fixture(scope="session")
def apps():
    """apps(N) is the application with model N, without a server, the same for all tests."""
    return functools.cache(App)


@pytest.fixture
def app(apps):
    return apps(1)


@pytest.fixture(params=[1, 2, 3, 4])
def each_app(request, apps):
    """The application with each model in turn; ``model`` is its number."""
    return apps(request.param)
