import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import structlog

from chandlery.errors import (
    SourceUnavailableError,
)
from chandlery.image.name import LATEST
from chandlery.nix.nix import Nix, NixLimits
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform
from chandlery.sources.flake import FlakeReference, FlakeSource
from chandlery.sources.pins import PinLimits
from tests.support.git_server import Fault, HttpServer, Repository, http_server
from tests.support.nix_package_set import SYSTEM, requires_nix, resolve

HOST = Platform.of_host()
# Whoever asks sees what upstream has by then.
ALWAYS = PinLimits(lifetime=0.0, patience=60.0, back_off=0.0)


# With Nix


def git(folder: Path, *argv: str) -> str:
    identity = ("-c", "user.name=T", "-c", "user.email=t@localhost", "-c", "protocol.file.allow=always")
    return subprocess.run(
        ["git", "-C", folder, *identity, *argv], check=True, capture_output=True, text=True
    ).stdout.strip()


LIBRARY = """{
  outputs = { self }: {
    build = name: text: derivation {
      inherit name;
      system = builtins.currentSystem or "%s";
      builder = "/bin/sh";
      args = [ "-c" "echo '${text}' > $out" ];
      __impureHostDeps = [ "/bin" "/usr" "/lib" "/lib64" ];
    };
  };
}"""

FLAKE = """{
  inputs.library.url = "git+file://%s?ref=main";
  outputs = { self, library }: {
    packages.%s = {
      hello = library.build "hello" (builtins.readFile ./text);
      both = library.build "both" "of packages";
    };
    legacyPackages.%s = {
      both = library.build "both" "of legacyPackages";
      set.nested = library.build "nested" "nested";
    };
  };
}"""


@dataclass(frozen=True)
class Upstream:
    """A flake in git that has another as its input, locked."""

    folder: Path

    @property
    def flake(self) -> Path:
        return self.folder / "flake"

    @property
    def library(self) -> Path:
        return self.folder / "library"

    @property
    def reference(self) -> str:
        return f"git+file://{self.flake}?ref=main"

    def commit(self, text: str) -> str:
        (self.flake / "text").write_text(text)
        git(self.flake, "add", "-A")
        git(self.flake, "commit", "-qm", text)
        return git(self.flake, "rev-parse", "HEAD")

    @contextmanager
    def gone(self) -> Iterator[None]:
        self.folder.rename(self.folder.with_name("away"))
        try:
            yield
        finally:
            self.folder.with_name("away").rename(self.folder)


@pytest.fixture
def upstream(tmp_path: Path) -> Upstream:
    upstream = Upstream(tmp_path / "upstream")
    for folder, content in (
        (upstream.library, LIBRARY % SYSTEM),
        (upstream.flake, FLAKE % (upstream.library, SYSTEM, SYSTEM)),
    ):
        folder.mkdir(parents=True)
        git(folder, "init", "-q", "-b", "main")
        (folder / "flake.nix").write_text(content)
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", "first")
    (upstream.flake / "text").write_text("not locked")
    git(upstream.flake, "add", "-A")
    git(upstream.flake, "commit", "-qm", "not locked")
    lock(upstream.flake, tmp_path)
    upstream.commit("one")
    return upstream


def lock(flake: Path, folder: Path) -> None:
    """Write a lock file as its author does, with a Nix of their own."""
    subprocess.run(
        ["nix", "--extra-experimental-features", "nix-command flakes", "flake", "lock", flake],
        env={
            **os.environ,
            "NIX_CONFIG": f"store = {folder / 'other-nix'}\nbuild-users-group =\nsubstituters =",
            "XDG_CACHE_HOME": str(folder / "other-cache"),
        },
        check=True,
        capture_output=True,
    )


@asynccontextmanager
async def flake_of(nix: Nix, reference: str, folder: Path) -> AsyncIterator[FlakeSource]:
    await nix.check()
    source = FlakeSource(FlakeReference.parse(reference), folder / "data", nix, ALWAYS)
    try:
        yield source
    finally:
        await source.close()


async def built(nix: Nix, pin: PinnedSource, attribute_path: str, folder: Path) -> str:
    resolution = await resolve(nix, pin, attribute_path)
    assert resolution.found, resolution.message
    await nix.realise([resolution.derivation], folder / "roots" / pin.tag / attribute_path, folder / "log")
    return (nix.store_root / resolution.store_path.base_name).read_text().strip()


@pytest.fixture
def nix(tmp_path: Path) -> Nix:
    return Nix(tmp_path / "nix", NixLimits())


@requires_nix
async def test_a_branch_that_moves_is_followed_and_outlived(
    upstream: Upstream, tmp_path: Path, nix: Nix
) -> None:
    first = git(upstream.flake, "rev-parse", "HEAD")
    async with flake_of(nix, upstream.reference, tmp_path) as source:
        pin = await source.pin(LATEST, HOST)
        assert pin.revision == first
        assert await built(nix, pin, "hello", tmp_path) == "one"

        second = upstream.commit("two")
        moved = await source.pin(LATEST, HOST)
        assert moved.revision == second
        assert not moved.stale

        with upstream.gone():
            # What was never evaluated, too.
            stale = await source.pin(LATEST, HOST)
            assert stale.revision == second
            assert stale.stale
            assert await built(nix, stale, "hello", tmp_path) == "two"
            assert await built(nix, await source.pin(first[:16], HOST), "set.nested", tmp_path) == "nested"
        assert not (await source.pin(LATEST, HOST)).stale
    assert git(upstream.flake, "status", "--porcelain") == ""


@requires_nix
async def test_packages_come_before_legacy_packages(upstream: Upstream, tmp_path: Path, nix: Nix) -> None:
    async with flake_of(nix, upstream.reference, tmp_path) as source:
        assert await built(nix, await source.pin(LATEST, HOST), "both", tmp_path) == "of packages"


@requires_nix
async def test_what_is_pinned_outlives_nixs_collector(upstream: Upstream, tmp_path: Path, nix: Nix) -> None:
    async with flake_of(nix, upstream.reference, tmp_path) as source:
        pin = await source.pin(LATEST, HOST)
        await nix.collect_garbage(1 << 60)
        shutil.rmtree(tmp_path / "nix/cache")
        with upstream.gone():
            assert await built(nix, pin, "hello", tmp_path) == "one"


@requires_nix
async def test_what_is_pinned_is_fetched_again_if_the_store_was_lost(
    upstream: Upstream, tmp_path: Path, nix: Nix
) -> None:
    async with flake_of(nix, upstream.reference, tmp_path) as source:
        first = await source.pin(LATEST, HOST)
        upstream.commit("two")
        await source.pin(LATEST, HOST)
        remove_store(tmp_path / "nix")
        await nix.check()
        assert await built(nix, await source.pin(first.tag, HOST), "hello", tmp_path) == "one"


def remove_store(folder: Path) -> None:
    subprocess.run(["chmod", "-R", "u+w", folder], check=True)
    shutil.rmtree(folder)


@requires_nix
async def test_a_flake_without_a_lock_is_refused_with_what_to_do(
    upstream: Upstream, tmp_path: Path, nix: Nix
) -> None:
    git(upstream.flake, "rm", "-q", "flake.lock")
    upstream.commit("no lock")
    async with flake_of(nix, upstream.reference, tmp_path) as source:
        with pytest.raises(
            SourceUnavailableError, match=r"run `nix flake lock` there, and commit flake\.lock"
        ):
            await source.pin(LATEST, HOST)
    # And one without inputs needs none.
    async with flake_of(nix, f"git+file://{upstream.library}", tmp_path / "other") as source:
        assert (await source.pin(LATEST, HOST)).revision == git(upstream.library, "rev-parse", "HEAD")


@requires_nix
async def test_a_folder_is_pinned_by_its_content(upstream: Upstream, tmp_path: Path, nix: Nix) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("flake.nix", "flake.lock", "text"):
        shutil.copy(upstream.flake / name, folder)
    async with flake_of(nix, f"path:{folder}", tmp_path) as source:
        first = await source.pin(LATEST, HOST)
        assert len(first.revision) == 64
        assert await built(nix, first, "hello", tmp_path) == "one"
        os.utime(folder / "text", (1, 1))
        assert (await source.pin(LATEST, HOST)).to_nix() == first.to_nix()
        (folder / "text").write_text("two")
        second = await source.pin(LATEST, HOST)
        assert second.revision != first.revision
        assert await built(nix, second, "hello", tmp_path) == "two"
        assert await built(nix, await source.pin(first.tag, HOST), "set.nested", tmp_path) == "nested"
    assert sorted(path.name for path in folder.iterdir()) == ["flake.lock", "flake.nix", "text"]


@requires_nix
async def test_a_work_tree_with_changes_is_pinned_by_its_content(
    upstream: Upstream, tmp_path: Path, nix: Nix
) -> None:
    async with flake_of(nix, str(upstream.flake), tmp_path) as source:
        clean = await source.pin(LATEST, HOST)
        assert clean.revision == git(upstream.flake, "rev-parse", "HEAD")
        (upstream.flake / "text").write_text("changed")
        changed = await source.pin(LATEST, HOST)
        assert len(changed.revision) == 64
        assert await built(nix, changed, "hello", tmp_path) == "changed"


@dataclass(frozen=True)
class Served:
    """A flake's server, that of its input, and the flake."""

    server: HttpServer
    other: HttpServer
    repository: Repository

    @property
    def reference(self) -> str:
        return f"git+{self.server.url('flake', 'git:s3cret@')}?ref=main"


@pytest.fixture
def served(tmp_path: Path) -> Iterator["Served"]:
    """Serve a flake with a password, whose locked input another server has."""
    (tmp_path / "private").mkdir()
    (tmp_path / "public").mkdir()
    library = Repository(tmp_path / "public/library")
    library.commit({"flake.nix": LIBRARY % SYSTEM})
    with (
        http_server(tmp_path / "public") as public,
        http_server(tmp_path / "private", password="s3cret") as own,  # noqa: S106
    ):
        flake = Repository(tmp_path / "private/flake")
        content = (FLAKE % ("", SYSTEM, SYSTEM)).replace("git+file://", f"git+{public.url('library')}")
        flake.commit({"flake.nix": content, "text": "one"})
        lock(flake.work, tmp_path)
        flake.commit_all()
        yield Served(own, public, flake)


@requires_nix
async def test_over_http_with_a_password_and_then_without_a_server(
    served: Served, tmp_path: Path, nix: Nix, caplog: pytest.LogCaptureFixture
) -> None:
    server = served.server
    with structlog.testing.capture_logs() as logged:
        async with flake_of(nix, served.reference, tmp_path) as source:
            pins = [await source.pin(LATEST, HOST)]
            second = served.repository.commit({"text": "two"})
            pins.append(await source.pin(LATEST, HOST))
            assert pins[-1].revision == second
            for fault in (Fault.NOT_FOUND, Fault.ERROR, Fault.REFUSE):
                server.fault = fault
                pins.append(await source.pin(LATEST, HOST))
                assert pins[-1].revision == second
                assert pins[-1].stale
            server.stop()
            served.other.stop()
            pins.append(await source.pin(LATEST, HOST))
            assert pins[-1].stale
            assert await built(nix, pins[-1], "hello", tmp_path) == "two"
            assert await built(nix, await source.pin(pins[0].tag, HOST), "hello", tmp_path) == "one"
    seen = repr((pins, logged, caplog.records)) + (tmp_path / "data/pins.json").read_text()
    assert "s3cret" not in seen
    assert source.location == f"git+{server.url('flake')}"


@requires_nix
async def test_a_server_that_says_nothing_does_not_stop_what_is_known(
    served: Served, tmp_path: Path, nix: Nix
) -> None:
    reference = FlakeReference.parse(served.reference)
    await nix.check()
    source = FlakeSource(reference, tmp_path / "data", nix, replace(ALWAYS, patience=1.0))
    first = await source.pin(LATEST, HOST)
    served.server.fault = Fault.SILENCE
    stale = await source.pin(LATEST, HOST)
    assert stale.to_nix() == first.to_nix()
    assert "not answered within 1 s" in stale.stale
    async with asyncio.timeout(20):
        await source.close()
