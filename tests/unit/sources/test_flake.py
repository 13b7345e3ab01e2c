import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import structlog

from chandlery.errors import (
    InvalidSourceError,
    NixError,
    ReferenceNotFoundError,
    SourceUnavailableError,
)
from chandlery.image.name import LATEST
from chandlery.nix.closure import StorePath
from chandlery.nix.nix import NixLimits
from chandlery.nix.output import DerivationMissingError, LockedFlake
from chandlery.nix.pinned_source import PinnedSource
from chandlery.nix.stores import NixStores
from chandlery.oci.documents import Platform
from chandlery.sources.debian.index import DebianMirrors
from chandlery.sources.flake import FlakeReference, FlakeSource
from chandlery.sources.kinds import parse
from chandlery.sources.package_source import SourceOptions
from chandlery.sources.pins import PinLimits

HOST = Platform.of_host()
# Whoever asks sees what upstream has by then.
ALWAYS = PinLimits(lifetime=0.0, patience=60.0, back_off=0.0)


# References


@pytest.mark.parametrize(
    ("text", "location", "shown"),
    [
        ("git+https://host/ours", "git+https://host/ours", "git+https://host/ours"),
        ("git+https://host/ours?ref=main", "git+https://host/ours", "git+https://host/ours?ref=main"),
        ("git+https://host/ours?ref=main&dir=a/b", "git+https://host/ours?dir=a/b", None),
        ("git+https://user:s3cret@host/ours", "git+https://host/ours", "git+https://host/ours"),
        ("git+https://s3cret@host/ours?ref=v1", "git+https://host/ours", "git+https://host/ours?ref=v1"),
        ("git+ssh://git@host/ours", "git+ssh://git@host/ours", "git+ssh://git@host/ours"),
        ("git+ssh://git:s3cret@host/ours", "git+ssh://host/ours", "git+ssh://host/ours"),
        ("git+file:///srv/ours?rev=abc", "git+file:///srv/ours", "git+file:///srv/ours?rev=abc"),
        (
            "github:NixOS/nixpkgs/nixos-unstable",
            "github:NixOS/nixpkgs",
            "github:NixOS/nixpkgs/nixos-unstable",
        ),
        ("github:a/b?host=ghe.local&ref=x", "github:a/b?host=ghe.local", None),
        ("https://host/ours.tar.gz?token=s3cret", "https://host/ours.tar.gz", "https://host/ours.tar.gz"),
        ("path:/srv/ours?dir=x", "path:/srv/ours?dir=x", "path:/srv/ours?dir=x"),
        ("/srv/ours", "/srv/ours", "/srv/ours"),
        ("/srv/a/../ours", "/srv/a/../ours", "/srv/a/../ours"),
    ],
)
def test_a_location_has_nothing_that_moves_and_no_credentials(
    text: str, location: str, shown: str | None
) -> None:
    reference = FlakeReference.parse(text)

    assert reference.text == text
    assert reference.location == location
    assert shown is None or reference.shown == shown
    assert "s3cret" not in reference.without_secrets(f"fatal: {text}: not found")
    assert "s3cret" not in reference.shown


@pytest.mark.parametrize(
    "locked",
    [
        "git+https://user:s3cret@host/ours?ref=main&rev=0123",
        "git+https://user:s3cret@host/ours?dir=x&rev=0123&token=s3cret",
    ],
)
def test_what_is_kept_of_a_locked_reference_is_enough_for_nix_again(locked: str) -> None:
    reference = FlakeReference.parse(
        locked.partition("&rev")[0] + ("&token=s3cret" if "token" in locked else "")
    )
    kept = reference.stripped(locked)

    assert "s3cret" not in kept
    assert "rev=0123" in kept
    assert set(reference.completed(kept).replace("?", "&").split("&")) == set(
        locked.replace("?", "&").split("&")
    )


def test_a_folder_may_be_written_from_here_or_from_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in (".", "./set", "~/set"):
        assert FlakeReference.parse(text).location == str(tmp_path / text.lstrip("~./"))
    assert FlakeReference.parse("path:./set?dir=x").text == f"path:{tmp_path}/set?dir=x"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nixpkgs", "say where it is"),
        ("flake:nixpkgs", "say where it is"),
        ("github:a/b#hello", "ends before the #"),
    ],
)
def test_what_says_not_where_it_is_is_no_source(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(InvalidSourceError, match=reason):
        parse(f"flake!{text}", tmp_path, DebianMirrors())


def test_a_flake_needs_nix_and_takes_no_config(tmp_path: Path) -> None:
    text = "flake!git+https://user:s3cret@host/ours"
    with pytest.raises(InvalidSourceError, match="can't be read without Nix") as caught:
        parse(text, tmp_path, DebianMirrors())
    assert "s3cret" not in str(caught.value)
    with pytest.raises(InvalidSourceError, match="config and overlays"):
        parse(text, tmp_path, DebianMirrors(), SourceOptions(config={"allowUnfree": True}))
    source = parse(text, tmp_path, DebianMirrors(), nix=NixStores(tmp_path, NixLimits()))
    assert (source.text, source.location) == ("flake!git+https://host/ours", "git+https://host/ours")


# With a stand-in for Nix


@dataclass
class FakeStore:
    """Fetches whatever `revision` says, into a store of empty files."""

    store_root: Path
    revision: str = "a" * 40
    error: NixError | None = None
    errors_of_archive: list[NixError] = field(default_factory=list)
    hangs: bool = False
    asked: list[str] = field(default_factory=list)
    archived: int = 0

    async def flake_metadata(self, reference: str) -> LockedFlake:
        self.asked.append(reference)
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        location = f"git+https://user:s3cret@host/ours?ref=main&rev={self.revision}"
        revision = reference.rpartition("rev=")[2] if "rev=" in reference else self.revision
        return LockedFlake(location, revision, 1, f"path:/nix/store/{revision[:32]}-source?rev={revision}")

    async def flake_archive(self, flake: LockedFlake, roots: Path) -> list[StorePath]:
        self.archived += 1
        if self.errors_of_archive:
            raise self.errors_of_archive.pop()
        path = StorePath.parse(flake.reference.partition("?")[0].removeprefix("path:"))
        (self.store_root / path.base_name).mkdir(parents=True, exist_ok=True)
        roots.mkdir(parents=True, exist_ok=True)
        if not (roots / "source").is_symlink():
            (roots / "source").symlink_to(str(path))
        return [path]

    def beginning(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def lose(self, revision: str) -> None:
        shutil.rmtree(self.store_root / f"{revision[:32]}-source")


@pytest.fixture
def store(tmp_path: Path) -> FakeStore:
    return FakeStore(tmp_path / "store")


REFERENCE = FlakeReference.parse("git+https://user:s3cret@host/ours?ref=main")


@asynccontextmanager
async def faked(
    store: FakeStore,
    folder: Path,
    *,
    limits: PinLimits = ALWAYS,
    fetch_timeout: float = 60.0,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[FlakeSource]:
    data = folder / "data"
    source = FlakeSource(REFERENCE, data, store, limits, fetch_timeout=fetch_timeout, clock=clock)
    try:
        yield source
    finally:
        await source.close()


async def test_a_flake_is_pinned_to_what_evaluation_takes(store: FakeStore, tmp_path: Path) -> None:
    async with faked(store, tmp_path) as source:
        pin = await source.pin(LATEST, HOST)

    assert pin == PinnedSource("flake", "git+https://host/ours", "a" * 40)
    assert pin.public_location == "git+https://host/ours"
    assert pin.to_nix() == {
        "kind": "flake",
        "location": "git+https://host/ours",
        "flake": f"path:/nix/store/{'a' * 32}-source?rev={'a' * 40}",
    }
    assert store.asked == [REFERENCE.text]
    assert "s3cret" not in (tmp_path / "data/pins.json").read_text()


async def test_a_flake_that_did_not_move_is_not_archived_again(store: FakeStore, tmp_path: Path) -> None:
    async with faked(store, tmp_path) as source:
        await source.pin(LATEST, HOST)
        archived = store.archived
        await source.pin(LATEST, HOST)
        assert store.archived == archived
        store.lose("a" * 40)
        await source.pin(LATEST, HOST)
        assert store.archived > archived


async def test_each_revision_keeps_its_tag(store: FakeStore, tmp_path: Path) -> None:
    async with faked(store, tmp_path) as source:
        first = await source.pin(LATEST, HOST)
        store.revision = "b" * 40
        second = await source.pin(LATEST, HOST)
        assert second.revision == "b" * 40
        asked = len(store.asked)
        for reference in (first.tag, first.revision):
            assert (await source.pin(reference, HOST)).to_nix() == first.to_nix()
        assert await source.at(first.revision, HOST) == first
        assert await source.at("c" * 40, HOST) is None
        assert await source.at("../..", HOST) is None
        for reference in ("main", "c" * 16, "v1"):
            with pytest.raises(ReferenceNotFoundError, match="for each revision that was served its own tag"):
                await source.pin(reference, HOST)
        assert len(store.asked) == asked


async def test_a_revision_that_is_gone_from_the_store_is_fetched_again(
    store: FakeStore, tmp_path: Path
) -> None:
    async with faked(store, tmp_path) as source:
        first = await source.pin(LATEST, HOST)
        store.revision = "b" * 40
        await source.pin(LATEST, HOST)
        store.lose(first.revision)

        assert (await source.pin(first.tag, HOST)).to_nix() == first.to_nix()
        assert store.asked[-1] == f"git+https://user:s3cret@host/ours?ref=main&rev={first.revision}"

        store.lose(first.revision)
        store.error = NixError("nix: it is away")
        gone = await source.pin(first.tag, HOST)
        assert gone == first
        assert gone.nix is None
        assert "it is away" in gone.stale


async def test_trouble_upstream_leaves_the_last_good_pin(store: FakeStore, tmp_path: Path) -> None:
    async with faked(store, tmp_path) as source:
        first = await source.pin(LATEST, HOST)
        store.revision = "b" * 40
        store.error = NixError("nix: unable to access 'https://user:s3cret@host/ours': refused")
        with structlog.testing.capture_logs() as logged:
            stale = await source.pin(LATEST, HOST)
        assert stale == first
        assert stale.nix == first.nix
        assert "unable to access 'https://user:***@host/ours'" in stale.stale
        assert "s3cret" not in repr(logged)
        store.error = None
        assert (await source.pin(LATEST, HOST)).revision == "b" * 40


async def test_an_upstream_that_can_not_be_reached_makes_a_pin_stale_though_nix_goes_on(
    store: FakeStore, tmp_path: Path
) -> None:
    async def ask() -> None:
        if store.revision != "a" * 40:
            raise SourceUnavailableError("flake!x", "refused")

    reference = FlakeReference.parse("git+https://host/ours?ref=main")
    source = FlakeSource(reference, tmp_path / "data", store, ALWAYS, ask_upstream=ask)
    first = await source.pin(LATEST, HOST)
    assert not first.stale
    store.revision = "b" * 40
    stale = await source.pin(LATEST, HOST)
    assert stale.revision == first.revision
    assert "refused" in stale.stale
    await source.close()


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("git+https://host/ours?ref=main", "https://host/ours"),
        ("git+https://user:secret@host/ours", "https://host/ours"),
        ("git+ssh://git@host/ours?dir=sub", "ssh://git@host/ours"),
        ("git+file:///srv/ours", "file:///srv/ours"),
        ("github:NixOS/nixpkgs", None),
        ("tarball+https://host/ours.tar.gz", None),
        ("/srv/ours", None),
    ],
)
def test_git_is_asked_where_nix_asks_it(text: str, location: str | None) -> None:
    address = FlakeReference.parse(text).git_address
    assert (address.location if address else None) == location


async def test_what_was_never_had_is_told_with_the_reason(store: FakeStore, tmp_path: Path) -> None:
    store.error = NixError("nix: refused")
    async with faked(store, tmp_path) as source:
        with pytest.raises(
            SourceUnavailableError, match=r"flake!git\+https://host/ours\?ref=main .*: nix: refused"
        ):
            await source.pin(LATEST, HOST)


async def test_a_nix_that_hangs_is_stopped(store: FakeStore, tmp_path: Path) -> None:
    store.hangs = True
    async with faked(store, tmp_path, fetch_timeout=0.05) as source:
        with pytest.raises(SourceUnavailableError, match=r"Nix was stopped after 0.05 s"):
            await source.pin(LATEST, HOST)


async def test_what_a_collector_took_meanwhile_is_fetched_once_more(store: FakeStore, tmp_path: Path) -> None:
    store.errors_of_archive = [DerivationMissingError("path '/nix/store/...' is not valid")]
    async with faked(store, tmp_path) as source:
        assert (await source.pin(LATEST, HOST)).nix is not None
    assert len(store.asked) == 2


async def test_of_old_revisions_those_that_are_wanted_are_kept(store: FakeStore, tmp_path: Path) -> None:
    now = 1_000_000.0
    revisions = [f"{number:040x}" for number in range(12)]
    async with faked(store, tmp_path, clock=lambda: now) as source:
        for store.revision in revisions:
            await source.pin(LATEST, HOST)
        roots = tmp_path / "data/roots"
        assert sorted(path.name for path in roots.iterdir()) == revisions

        # An hour later nobody uses them any more.
        source.keep([revisions[0], revisions[3]])
        now += 7200
        store.revision = "f" * 40
        await source.pin(LATEST, HOST)
        kept = {path.name for path in roots.iterdir()}
        assert len(kept) == 8
        assert {revisions[0], revisions[3], "f" * 40} <= kept
