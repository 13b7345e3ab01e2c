"""One server with every kind of source: what a real client gets while these move, die and hang."""

import http.client
import json
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import httpx
import pytest

from chandlery.oci.digest import Digest
from tests.support import layers
from tests.support.clients import Skopeo
from tests.support.servers import LIMIT, RunningServer, free_port, serving, wait_until
from tests.support.upstreams import NetworkUpstream, Upstream, Upstreams, upstreams

T = TypeVar("T")

NAMES = ("debian", "channel", "web", "ssh", "file", "flake", "folder")
# Those that keep each revision whole on this machine; of a suite only the index is kept.
KEPT_NAMES = tuple(name for name in NAMES if name != "debian")

# Seconds: for which a pin lives; and within which a pull is answered whatever upstream does.
LIFETIME = 2.0
MOMENT = 10.0

SETTINGS = """
source = "web"
source_refresh = {lifetime}
log_format = "json"
nixpkgs_channel_url = "{channel.server.channel_template}"
nixpkgs_tarball_url = "{channel.server.tarball_template}"
debian_mirror = "{debian.repository.mirrors.main}"
debian_security_mirror = "{debian.repository.mirrors.security}"
debian_keyring = "{debian.repository.mirrors.keyring}"

[sources]
web = "{web.source}"
file = "{file.source}"
flake = "{flake.source}"
folder = "{folder.source}"
debian = "{debian.source}"
pinned = "nixpkgs!{commit}"

[sources.channel]
from = "{channel.source}"
tags = ["nixos-*"]

[sources.ssh]
from = "{ssh.source}"
tags = ["main", "v*"]
"""


STALE = re.compile(
    r'299 - "as of (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC, because the source could not be asked since: (.+)"'
)
IS_DEAD = "the package source can't be asked: its last good pin is served"
IS_BACK = "the package source answers again"
REASONS = {
    "channel": "connection",
    "web": "Failed to connect to 127.0.0.1",
    "ssh": "Connection refused",
    "file": "does not appear to be a git repository",
    "flake": "Failed to connect to 127.0.0.1",
    "folder": "No such file or directory",
    "debian": "apt said: E: Failed to fetch",
}


@dataclass(frozen=True)
class Pulled:
    """An image as a client has it, and what the answer's header said of its revision."""

    digest: Digest
    revision: str
    labels: Mapping[str, str]
    says: str


class Registry:
    """A server that may be killed and started again, and a client that pulls from it."""

    def __init__(self, folder: Path, upstreams: Upstreams, skopeo: Skopeo) -> None:
        self._folder = folder
        self._skopeo = skopeo
        self.port = free_port()
        self._exit = ExitStack()
        settings = folder / "chandlery.toml"
        commit = upstreams.channel.server.publish("unstable", "pinned")
        settings.write_text(SETTINGS.format(lifetime=LIFETIME, commit=commit, **vars(upstreams)))
        self._variables = {**upstreams.variables, "CHANDLERY_SETTINGS": str(settings)}

    def start(self) -> None:
        running = serving(
            self._folder / "data", "web", self._folder / "log", port=self.port, variables=self._variables
        )
        self.server: RunningServer = self._exit.enter_context(running)

    def kill(self) -> None:
        self._exit.close()

    def image(self, name: str, tag: str = "latest") -> str:
        return f"127.0.0.1:{self.port}/{name}:{tag}"

    def answer(self, name: str, tag: str = "latest", timeout: float = LIMIT) -> httpx.Response:
        return self.server.get(f"/v2/{name}/manifests/{tag}", timeout)

    def served(self, name: str, tag: str = "latest") -> httpx.Headers:
        response = self.answer(name, tag)
        assert response.status_code == 200, response.text
        return response.headers

    def revision(self, name: str, tag: str = "latest") -> str:
        return str(self.served(name, tag)["chandlery-revision"])

    def warning(self, source: str) -> str:
        return str(self.served(f"{source}/revision").get("warning", ""))

    def warning_of(self, source: str, reason: str) -> re.Match[str]:
        """Wait for a warning with a reason; give it, with the time that it tells as the first group."""
        wait_until(lambda: reason in self.warning(source))
        told = STALE.fullmatch(self.warning(source))
        assert told is not None
        return told

    def refusal(self, name: str, tag: str) -> str:
        """Return the message of a tag that is not found."""
        response = self.answer(name, tag)
        assert response.status_code == 404, response.text
        [error] = response.json()["errors"]
        assert error["code"] == "MANIFEST_UNKNOWN"
        return str(error["message"])

    def pull(self, name: str, tag: str = "latest") -> Pulled:
        """Pull an image that has the program `revision`."""
        headers = self.served(name, tag)
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        self._skopeo.copy(self.image(name, tag), f"dir:{folder}")

        def blob(descriptor: Mapping[str, str]) -> Path:
            return folder / Digest.parse(descriptor["digest"]).hex

        manifest = json.loads((folder / "manifest.json").read_bytes())
        archives = [layers.layer(blob(each)) for each in manifest["layers"]]
        [script] = [
            layers.text(archive, member.name)
            for archive in archives
            for member in archive
            if member.isfile() and member.name.endswith("bin/revision")
        ]
        [says] = re.findall("^echo (.*)$", script, re.MULTILINE)
        labels = json.loads(blob(manifest["config"]).read_bytes())["config"]["Labels"]
        digest = Digest.parse(headers["docker-content-digest"])
        return Pulled(digest, headers["chandlery-revision"], labels, says)

    def logged(self, event: str, source: str) -> list[str]:
        """Return the references of a source of which the log says something."""
        lines = (self._folder / "log").read_text().splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{")]
        return [
            each["reference"] for each in events if each["event"] == event and each.get("source") == source
        ]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstreams]:
    with upstreams(tmp_path_factory.mktemp("upstreams")) as started:
        yield started


@pytest.fixture(scope="module")
def registry(
    tmp_path_factory: pytest.TempPathFactory, upstream: Upstreams, skopeo: Skopeo
) -> Iterator[Registry]:
    registry = Registry(tmp_path_factory.mktemp("registry"), upstream, skopeo)
    registry.start()
    yield registry
    registry.kill()


def of_each(ask: Callable[[str], T], names: tuple[str, ...] = NAMES) -> dict[str, T]:
    """Ask about each source, about all at once."""
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(ask, names), strict=True))


def test_the_first_part_of_a_name_picks_the_source_and_the_image_has_its_revision(
    registry: Registry, upstream: Upstreams
) -> None:
    pulled = of_each(lambda name: registry.pull(f"{name}/revision"))

    assert {name: each.says for name, each in pulled.items()} == upstream.says
    for name, each in pulled.items():
        assert each.labels["org.opencontainers.image.revision"] == each.revision
        assert upstream.revisions[name] in (each.revision, ""), name
    assert len({each.revision for each in pulled.values()}) == len(NAMES)
    assert registry.pull("revision").says == upstream.says["web"]
    assert registry.pull("pinned/revision").says == "pinned"
    where = {name: each.labels["org.opencontainers.image.source"] for name, each in pulled.items()}
    assert where["channel"] == "https://github.com/NixOS/nixpkgs"
    assert where["web"] == upstream.web.server.url("set.git")
    # Where a folder of the server's is, is nobody's business.
    assert where["folder"] == f"path!{upstream.folder.folder.name}"


def test_latest_follows_its_source_and_the_tag_of_a_revision_stays(
    registry: Registry, upstream: Upstreams
) -> None:
    before = of_each(lambda name: registry.pull(f"{name}/revision"))
    for name in NAMES:
        upstream.move(name, f"{name}-moved")

    def follow(name: str) -> Pulled:
        wait_until(lambda: registry.revision(f"{name}/revision") != before[name].revision)
        return registry.pull(f"{name}/revision")

    after = of_each(follow)

    assert {name: each.says for name, each in after.items()} == upstream.says
    for name, each in after.items():
        assert upstream.revisions[name] in (each.revision, ""), name
    assert of_each(lambda name: registry.pull(f"{name}/revision", before[name].revision[:16])) == before


def test_a_flake_is_made_of_what_its_lock_names(registry: Registry, upstream: Upstreams) -> None:
    before = registry.served("flake/of-library")["docker-content-digest"]
    upstream.flake.move_library("another library")
    revision = upstream.move("flake", "flake-with-an-old-library")
    wait_until(lambda: registry.revision("flake/of-library") == revision)

    # No revision is in the manifest's layers: the package is the same.
    first, second = (
        registry.server.get(f"/v2/flake/of-library/manifests/{tag}").json()["layers"]
        for tag in (before, "latest")
    )

    assert first == second


def test_a_git_tag_a_branch_and_a_commit_are_tags(registry: Registry, upstream: Upstreams) -> None:
    repository = upstream.web.repository
    main = registry.pull("web/revision")
    commit = repository.commit({"revision": "a-feature"}, branch="feature/new")
    repository.tag("v1.0", commit, annotated=True)

    pulled = registry.pull("web/revision", "feature-new")

    assert (pulled.says, pulled.revision) == ("a-feature", commit)
    for tag in ("v1.0", commit, commit[:16]):
        assert registry.pull("web/revision", tag) == pulled
    assert registry.pull("web/revision", "main") == main
    assert registry.pull("web/revision") == main


def test_a_tag_chooses_a_channel_where_the_operator_lets_it(registry: Registry, upstream: Upstreams) -> None:
    commit = upstream.channel.server.publish("nixos-other", "another-channel")

    pulled = registry.pull("channel/revision", "nixos-other")

    assert (pulled.says, pulled.revision) == ("another-channel", commit)
    # A revision that was served has its own tag, and so has each that another channel stood at.
    assert registry.pull("channel/revision", commit[:16]) == pulled


def test_a_tag_that_is_not_there_or_not_allowed_is_not_found_and_the_answer_says_what_is_there(
    registry: Registry, upstream: Upstreams
) -> None:
    upstream.ssh.repository.commit({}, branch="secret")
    upstream.ssh.repository.tag("v2", upstream.ssh.repository.commit({}, branch="release"))
    unpublished = upstream.channel.server.publish("nixpkgs-unstable", "not-for-clients")
    other_commit = upstream.web.repository.commit({}, branch="other")

    assert registry.revision("ssh/revision", "v2")
    for name, tag, there_is in (
        ("web", "no-such-branch", "'latest' (main), the branches and tags of the repository, and revisions"),
        ("web", "0" * 40, "the repository has no such commit"),
        ("web", "refs", "the branches and tags of the repository"),
        ("ssh", "secret", "what is like main, what is like v*, and revisions that were pinned once"),
        ("ssh", "v3", "what is like main, what is like v*"),
        ("ssh", other_commit, "what is like main, what is like v*"),
        ("channel", "nixpkgs-unstable", "this server's settings allow those that match nixos-*"),
        ("channel", unpublished, "this server's settings allow those that match nixos-*"),
        ("channel", "nixos-none", "there is no such channel"),
        ("pinned", "nixos-test", "this server's settings allow none"),
        ("flake", "main", "'latest', and for each revision that was served its own tag"),
        ("folder", "main", "'latest', and "),
        ("debian", "no_suite", "'latest', other suites that the mirror has"),
        ("debian", "nosuite", "'latest', other suites that the mirror has"),
    ):
        assert there_is in registry.refusal(f"{name}/revision", tag), (name, tag)


@contextmanager
def trap() -> Iterator[tuple[str, Callable[[], bool]]]:
    """Return an address, and what tells whether anybody has been there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)

        def was_visited() -> bool:
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                return False
            return True

        yield f"127.0.0.1:{listener.getsockname()[1]}", was_visited


@pytest.mark.parametrize("name", NAMES)
def test_no_name_and_no_tag_leads_elsewhere(registry: Registry, name: str, tmp_path: Path) -> None:
    with trap() as (address, was_visited):
        for image, tag in (
            (f"git!http://{address}/set.git!main/revision", "latest"),
            (f"git!http:%2F%2F{address}%2Fset.git/revision", "latest"),
            (f"flake!git+http:%2F%2F{address}%2Fset.git/revision", "latest"),
            (f"{name}!http:%2F%2F{address}%2F/revision", "latest"),
            (f"{name}@http:%2F%2F{address}/revision", "latest"),
            (f"path!{tmp_path}/revision", "latest"),
            (f"path!{tmp_path}".replace("/", "%2F"), "latest"),
            (f"{name}/../../etc/passwd", "latest"),
            (f"{name}/..%2F..%2Fetc/revision", "latest"),
            (f"{name}/%2e%2e/revision", "latest"),
            (f"{name}/revision", f"http:%2F%2F{address}%2Fset.git"),
            (f"{name}/revision", f"ext::nc%20{address.replace(':', '%20')}"),
            (f"{name}/revision", f"--upload-pack=touch%20{tmp_path}%2Fhere".replace("/", "%2F")),
            (f"{name}/revision", "refs%2Fheads%2Fmain"),
            *((f"{name}/revision", tag) for tag in ("..", "a..b", "a!b", "main@%7B0%7D", "HEAD~1", "main^")),
            *((f"{name}/revision", tag) for tag in ("@", "-x", "main:set", "%00", "main%0A", "%7Bx%7D", "*")),
        ):
            # Not by httpx, which makes a path tidy before it asks.
            connection = http.client.HTTPConnection("127.0.0.1", registry.port, timeout=MOMENT)
            connection.request("GET", f"/v2/{image}/manifests/{tag}")
            response = connection.getresponse()
            answer = response.read()
            connection.close()
            assert response.status in (400, 404), (image, tag, answer)
        assert not was_visited()
    assert not list(tmp_path.iterdir())


@dataclass
class Pulls:
    """What somebody got who pulled all the time."""

    refused: list[str]
    count: int = 0


@contextmanager
def pulls_of(registry: Registry, names: tuple[str, ...], clients: int = 2) -> Iterator[Pulls]:
    """Pull from these sources, again and again."""
    stop = threading.Event()
    pulls = Pulls([])

    def pull() -> None:
        while not stop.is_set():
            for name in names:
                response = registry.answer(f"{name}/revision", timeout=MOMENT)
                pulls.count += 1
                if response.status_code != 200:
                    pulls.refused.append(f"{name}: {response.text}")
                stop.wait(0.05)

    with ThreadPoolExecutor(clients) as pool:
        pulling = [pool.submit(pull) for _ in range(clients)]
        try:
            yield pulls
        finally:
            stop.set()
    for each in pulling:
        each.result()


@contextmanager
def dead(*upstreams: Upstream) -> Iterator[None]:
    for each in upstreams:
        each.kill()
    try:
        yield
    finally:
        for each in upstreams:
            each.restart()


def test_each_source_may_die_while_others_pull_and_its_last_good_pin_serves(
    registry: Registry, upstream: Upstreams
) -> None:
    of_each(lambda name: registry.served(f"{name}/hello"))
    revisions = of_each(lambda name: registry.revision(f"{name}/revision"))
    with pulls_of(registry, NAMES) as pulls:
        for number, name in enumerate(NAMES):
            source = upstream.by_name[name].source
            with dead(upstream.by_name[name]):
                logged = len(registry.logged(IS_DEAD, source))
                died = datetime.now(UTC)
                told = registry.warning_of(name, REASONS[name])
                since = datetime.fromisoformat(f"{told[1]}+00:00")
                assert timedelta(seconds=-LIMIT) < since - died < timedelta(seconds=1), (name, died, told)
                # A new mix of known packages, of the same revision.
                assert registry.revision(f"{name}/hello/revision") == revisions[name]
                assert not [each for each in NAMES[number + 1 :] if registry.warning(each)]
                references = registry.logged(IS_DEAD, source)[logged:]
                assert len(references) == len(set(references)), name
            upstream.move(name, f"{name}-after-it-died")

        def recovered(name: str) -> bool:
            headers = registry.served(f"{name}/revision")
            return "warning" not in headers and headers["chandlery-revision"] != revisions[name]

        of_each(lambda name: wait_until(lambda: recovered(name)))
    assert of_each(lambda name: registry.pull(f"{name}/revision").says) == upstream.says
    assert not pulls.refused
    assert pulls.count > len(NAMES)
    for each in upstream.by_name.values():
        assert registry.logged(IS_DEAD, each.source), each.source
        assert registry.logged(IS_BACK, each.source), each.source


def test_a_source_that_says_nothing_delays_a_pull_by_seconds(registry: Registry, upstream: Upstreams) -> None:
    silent = {name: each for name, each in upstream.by_name.items() if isinstance(each, NetworkUpstream)}
    names = tuple(silent)
    assert len(names) == 5
    of_each(registry.warning, names)
    with pulls_of(registry, names) as pulls:
        for each in silent.values():
            each.silence()
        of_each(
            lambda name: wait_until(lambda: "has not answered within 3 s" in registry.warning(name)), names
        )
        for each in silent.values():
            each.resume()
        of_each(lambda name: wait_until(lambda: not registry.warning(name)), names)
    assert not pulls.refused


def test_a_server_that_was_killed_serves_from_its_pins_although_every_source_is_dead(
    registry: Registry, upstream: Upstreams
) -> None:
    before = of_each(lambda name: registry.pull(f"{name}/revision"))
    of_each(lambda name: registry.served(f"{name}/hello"))
    registry.kill()
    with dead(*upstream.by_name.values()):
        registry.start()
        assert of_each(lambda name: registry.pull(f"{name}/revision")) == before
        # A new mix of known packages; and packages that have never been evaluated, or built.
        of_each(lambda name: registry.served(f"{name}/hello/revision"))
        new = of_each(lambda name: registry.revision(f"{name}/sdl2/python3packages.scipy"), KEPT_NAMES)
        assert new == {name: before[name].revision for name in KEPT_NAMES}
        of_each(lambda name: registry.warning_of(name, REASONS[name]))
        registry.kill()
    registry.start()
    of_each(lambda name: wait_until(lambda: not registry.warning(name)))
