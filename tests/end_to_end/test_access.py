"""Users, rules and tokens, as docker, containerd, podman and skopeo meet them.

At a loopback address over plain HTTP clients are asked for Basic credentials; over TLS, and behind a proxy
that the settings tell of, they get tokens. Over TLS here, whoever hasn't logged in gets some too.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import bcrypt
import pytest

from tests.support.certificates import make_certificate
from tests.support.clients import ClientError, Containerd, Docker, Podman, Skopeo
from tests.support.package_sets import SOURCE
from tests.support.proxy import proxy
from tests.support.running import require
from tests.support.servers import RunningServer, free_port, serving

ALICE = "alice:wonderland"
SETTINGS = """
[access.default]
deny = ["jq"]

[access.anonymous]
allow = ["hello"]
"""

Pull = Callable[[RunningServer, str, str | None], str]


def serve(folder: Path, **variables: str) -> Iterator[RunningServer]:
    require("nix", "openssl", root=False)
    user, _, password = ALICE.partition(":")
    hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(10)).decode()
    (folder / "users").write_text(f"{user}:{hashed}\n")
    (folder / "settings.toml").write_text(SETTINGS)
    variables = {
        "CHANDLERY_SETTINGS": str(folder / "settings.toml"),
        "CHANDLERY_USERS_FILE": str(folder / "users"),
        **variables,
    }
    with serving(folder / "data", SOURCE, folder / "server.log", variables=variables) as server:
        yield server


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    yield from serve(tmp_path_factory.mktemp("loopback"))


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("public")
    shown = make_certificate(folder, "shown")
    yield from serve(
        folder,
        CHANDLERY_TLS_CERTIFICATE=str(shown.certificate),
        CHANDLERY_TLS_KEY=str(shown.key),
        CHANDLERY_ANONYMOUS="read",
    )


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Return a server at the address of a proxy that tells it neither that address nor its port."""
    require("nginx", root=False)
    folder = tmp_path_factory.mktemp("proxied")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    for server in serve(folder, CHANDLERY_PUBLIC_URL=url):
        with proxy(folder, server, port):
            yield dataclasses.replace(server, url=url)


@pytest.fixture(params=["loopback", "public", "proxied"])
def server(request: pytest.FixtureRequest) -> RunningServer:
    running: RunningServer = request.getfixturevalue(request.param)
    return running


@dataclass(frozen=True)
class Clients:
    """One way of pulling for each client; each keeps nothing, so that it asks for everything each time."""

    request: pytest.FixtureRequest
    folder: Path

    def docker(self, server: RunningServer, name: str, credentials: str | None) -> str:
        client: Docker = self.request.getfixturevalue("docker")
        address = server.url.partition("://")[2]
        with client.logged_in(address, credentials) if credentials else nullcontext():
            output = client.pull(f"{address}/{name}")
            client.remove(f"{address}/{name}")
        return output

    def containerd(self, server: RunningServer, name: str, credentials: str | None) -> str:
        client: Containerd = self.request.getfixturevalue("containerd")
        scheme, _, address = server.url.partition("://")
        return client.pull(f"{address}/{name}:latest", scheme == "http", credentials=credentials)

    def podman(self, server: RunningServer, name: str, credentials: str | None) -> str:
        client: Podman = self.request.getfixturevalue("podman")
        image = f"{server.url.partition('://')[2]}/{name}"
        output = client.pull(image, credentials)
        client.remove(image)
        return output

    def skopeo(self, server: RunningServer, name: str, credentials: str | None) -> str:
        client: Skopeo = self.request.getfixturevalue("skopeo")
        image = f"{server.url.partition('://')[2]}/{name}"
        return client.copy(image, f"dir:{self.folder}/{name.replace('/', '-')}", credentials)


@pytest.fixture(params=["docker", "containerd", "podman", "skopeo"])
def pull(request: pytest.FixtureRequest, tmp_path: Path) -> Pull:
    way: Pull = getattr(Clients(request, tmp_path), request.param)
    return way


def test_a_user_pulls(server: RunningServer, loopback: RunningServer, pull: Pull) -> None:
    pull(server, "shell/hello", ALICE)
    log = server.log.read_text()
    assert "client=user:alice" in log
    assert ("path=/v2/token" in log) == (server is not loopback)


def test_who_has_not_logged_in_pulls_what_everybody_may(public: RunningServer, pull: Pull) -> None:
    pull(public, "hello", None)
    with pytest.raises(ClientError):
        pull(public, "greeter", None)
    pull(public, "greeter", ALICE)


def test_who_has_not_logged_in_pulls_nothing_if_not_everybody_may(
    loopback: RunningServer, pull: Pull
) -> None:
    with pytest.raises(ClientError):
        pull(loopback, "hello", None)


def test_a_wrong_password_is_refused(server: RunningServer, pull: Pull) -> None:
    with pytest.raises(ClientError, match=r"(?i)unauthorized|authentication required|invalid username"):
        pull(server, "hello", "alice:looking-glass")


def test_a_denied_package_is_named(server: RunningServer, pull: Pull) -> None:
    with pytest.raises(ClientError) as denied:
        pull(server, "hello/jq", ALICE)
    # ctr prints the status alone.
    assert "alice may not pull jq" in denied.value.output or "403 Forbidden" in denied.value.output


def test_docker_says_who_may_not_pull_what(server: RunningServer, docker: Docker) -> None:
    address = server.url.partition("://")[2]
    with docker.logged_in(address, ALICE), pytest.raises(ClientError) as denied:
        docker.pull(f"{address}/hello/jq")
    assert "pull access denied for" in denied.value.output
    assert "denied: alice may not pull jq: the access rules of this server say so" in denied.value.output


def test_nothing_that_clients_sent_is_in_the_log(server: RunningServer, pull: Pull) -> None:
    pull(server, "hello", ALICE)
    log = server.log.read_text()
    assert "wonderland" not in log
    assert "eyJ" not in log  # how every token begins
