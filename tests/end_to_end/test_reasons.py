"""Why an image can't be had, as `docker pull` prints it: the reason, and what to do."""

from collections.abc import Iterator

import pytest

from chandlery.oci.documents import Platform
from tests.support.channel_server import SHAPE
from tests.support.clients import ClientError, Docker
from tests.support.servers import RunningServer, serving

[OTHER] = {"amd64", "arm64"} - {Platform.of_host().architecture}

VARIABLES = {
    # Nobody listens there.
    "CHANDLERY_SOURCES": '{"gone": "git!http://127.0.0.1:1/set.git!main"}',
    "CHANDLERY_EVALUATION_TIMEOUT": "5",
    "CHANDLERY_EVALUATION_MEMORY": str(1 << 30),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("reasons")
    with serving(folder / "data", f"path!{SHAPE}", folder / "log", variables=VARIABLES) as server:
        yield server


# By image name, and tag where it isn't `latest`.
REASONS = {
    "helo": ["not in the package set: helo (did you mean hello", "?)"],
    "python3packages.nunpy": [
        "not in the package set: python3packages.nunpy (did you mean python3packages.numpy?)"
    ],
    "hello:v2": ["no manifest 'v2': there is 'latest', and '"],
    "gone/hello": [
        "the package source git!http://127.0.0.1:1/set.git!main can't be reached",
        "Failed to connect to 127.0.0.1 port 1",
    ],
    "hello/zzzzzz": ["not in the package set: zzzzzz"],
    "unrar": ["unrar is unfree", "allowUnfree = true"],
    "needs-unfree": ["needs-unfree is unfree", "unrar-7.0", "allowUnfree = true"],
    "broken": ["broken is marked as broken", "another revision", "allowBroken = true"],
    "insecure": ["insecure is marked as insecure", "take another version of it", "permittedInsecurePackages"],
    f"only-{OTHER}": [
        f"only-{OTHER} is not available for this platform",
        "put amd64 or arm64 before the packages",
    ],
    "python3packages": [
        "python3packages is not a package: it is a set",
        "name a package, such as one within that set",
    ],
    "throws": ["throws can't be evaluated: it was thrown", "for the authors of the package set to mend"],
    "renamed": ["renamed can't be evaluated: 'renamed' has been renamed to/replaced by 'hello'"],
    "aborts": ["aborts can't be evaluated:", "it was aborted"],
    "wrong": ["wrong can't be evaluated:", "for the authors of the package set to mend"],
    "recursion": [
        "recursion can't be evaluated: infinite recursion",
        "for the authors of the package set to mend",
    ],
    "deep": ["deep can't be evaluated: stack overflow", "for the authors of the package set to mend"],
    "loops": ["loops takes too long to evaluate", "the operator of this server can raise evaluation_timeout"],
    "eats": [
        "eats takes too much memory to evaluate",
        "the operator of this server can raise evaluation_memory",
    ],
    "fails": [
        "fails-1.0 could not be built: its builder failed with exit code 3",
        "cc: no such file: main.c",
    ],
    "unrar/broken/hello": [
        "unrar is unfree",
        "broken is marked as broken",
        "allowUnfree = true",
        "allowBroken = true",
    ],
}


@pytest.mark.parametrize("name", REASONS)
def test_docker_prints_the_reason_and_what_to_do(docker: Docker, server: RunningServer, name: str) -> None:
    with pytest.raises(ClientError) as failed:
        docker.pull(f"{server.url.removeprefix('http://')}/{name}")

    for each in REASONS[name]:
        assert each in failed.value.output
