"""Markers by folder, how many examples hypothesis tries, and an environment without settings."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# What a test in a folder has need of; `unit` has need of nothing.
_MARKERS = {name: getattr(pytest.mark, name) for name in ("integration", "nix", "end_to_end")}
_DAEMONS = {"docker", "containerd", "podman", "engine"}
_TESTS = Path(__file__).parent

# A contributor waits for the result; CI is thorough.
hypothesis.settings.register_profile("quick", max_examples=20, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=100, deadline=None, print_blob=True)


def pytest_configure() -> None:
    hypothesis.settings.load_profile(
        os.environ.get("HYPOTHESIS_PROFILE") or ("thorough" if "CI" in os.environ else "quick")
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = item.path.relative_to(_TESTS)
        if file.parts[0] in _MARKERS:
            item.add_marker(_MARKERS[file.parts[0]])
        # Several processes may run the tests (pytest-xdist). One has all that need a daemon of clients or the
        # server of end_to_end/conftest.py, so there is one of each; and a file's tests share its fixtures.
        if item.get_closest_marker("xdist_group") is None:
            needs_daemon = _DAEMONS.intersection(getattr(item, "fixturenames", ()))
            item.add_marker(pytest.mark.xdist_group("daemons" if needs_daemon else str(file)))


@pytest.fixture(autouse=True)
def no_settings() -> Iterator[None]:
    """Take what says in this environment how a server should be away from the tests."""
    with pytest.MonkeyPatch.context() as environment:
        for name in list(os.environ):
            if name.startswith(("CHANDLERY_", "NIXERY_")):
                environment.delenv(name)
        yield
