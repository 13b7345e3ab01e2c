"""The index of a Debian suite, fetched by apt; the last good one serves while a mirror is down.

All architectures have one revision, that of the suite's Release files (`sources.debian.release`). An
architecture's snapshot, made of its Packages files, is made when it is first asked for. A new revision is in
force once the architectures that are in use have their snapshots; until then the one before it is.

    <folder>/current                               the revision in force; its time is that of the last fetch
    <folder>/mirrors.json                          the addresses of the releases' repositories
    <folder>/revisions/<revision>/release.json     what the Release files listed
    <folder>/revisions/<revision>/<architecture>/  the snapshot
    <folder>/packages/                             the Packages files of the revision in force
    <folder>/apt/                                  apt's private directory
    <folder>/lock                                  held while something is fetched

The mirrors are those that this machine's apt is configured with, unless the settings name others; none is
written here. A snapshot is made aside and renamed, so that what is there is whole.
"""

import asyncio
import gzip
import lzma
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import msgspec
import structlog

from chandlery.errors import SourceUnavailableError
from chandlery.machine.age import age_of
from chandlery.machine.durable import durably_replace
from chandlery.machine.locks import holding
from chandlery.machine.process_pool import ProcessPool
from chandlery.sources.debian.apt import Apt, PackagesReplacedError, Repository
from chandlery.sources.debian.kept_revisions import (
    POPULARITY,
    PinnedIndex,
    kept_mirrors,
    remove_last,
    remove_oldest,
    revision_in,
)
from chandlery.sources.debian.progress import FetchProgress
from chandlery.sources.debian.release import PackagesFile, Release, SuiteState
from chandlery.sources.debian.snapshot import DebianSnapshot, parse_packages

log = structlog.get_logger()

# Revisions that are kept, 28 MB for each architecture: the newest, and those that images in use were made at
# (`keep`).
KEPT_REVISIONS = 16

_ALIASES = files("chandlery") / "nix/expressions/debian_aliases.json"
_STATE = "release.json"

# Suites that stand on another: what they lack comes from there.
_ADDITION = re.compile(r"(.+)-(?:backports|backports-sloppy|proposed-updates)")
_ADDITIONS = {"experimental": "sid", "rc-buggy": "sid"}
# Suites that get no updates of their own. It is known by name, since a mirror could leave out what it likes.
_UPDATED_IN_PLACE = ("sid", "unstable")


class ArchitectureNotFoundError(SourceUnavailableError):
    """The suite's signed Release file lists no packages for an architecture."""


@dataclass(frozen=True, slots=True)
class DebianMirrors:
    """Where packages come from; what is empty is read from this machine's apt configuration.

    `security` is the mirror of `<suite>-security`, a repository of its own; `keyring` is the file with the
    keys that sign the index.
    """

    main: str = ""
    security: str = ""
    keyring: str = ""


class DebianIndex:
    """One suite for one architecture; `folder` is the suite's, for all of its architectures."""

    def __init__(
        self,
        folder: Path,
        suite: str,
        architecture: str,
        mirrors: DebianMirrors,
        progress: Callable[[str, str], FetchProgress] = FetchProgress,
    ) -> None:
        self._progress = progress
        self._folder = folder
        self._suite = suite
        self._architecture = architecture
        self._mirrors = mirrors
        self._apt = Apt(folder / "apt", f"debian!{suite}", mirrors.keyring)

    @property
    def was_fetched(self) -> bool:
        """Whether there ever was a good state of the suite, for whatever architecture."""
        return (self._folder / "current").exists()

    def current(self) -> PinnedIndex | None:
        """Return the last good state of the suite; None without one, or without one for the architecture."""
        revision = self._named()
        return None if revision is None else self.at(revision)

    def at(self, revision: str) -> PinnedIndex | None:
        """Return the suite as it stood at a revision (or the beginning of one), if its snapshot is kept."""
        whole = self.revision(revision)
        # Until the first fetch is over nothing is in force, and nobody knows a revision.
        if whole is None or not self.was_fetched or not self._snapshot(whole).exists():
            return None
        return PinnedIndex(whole, self._snapshot(whole), kept_mirrors(self._folder))

    def revision(self, beginning: str) -> str | None:
        """Return the revision that is kept and begins so, for whichever architectures it has snapshots."""
        return revision_in(self._folder / "revisions", beginning)

    def number_of_revisions(self) -> int:
        """Return how many revisions are kept."""
        return sum(1 for _ in self._folder.glob("revisions/*"))

    def keep(self, revisions: Sequence[str]) -> None:
        """Let these revisions be the last that are removed; the most wanted comes first."""
        remove_last(self._folder / "revisions", revisions)

    def remove(self) -> None:
        """Remove the folder of a suite that was never there, so that nobody's guesses fill the disk."""
        if not self.was_fetched:
            shutil.rmtree(self._folder, ignore_errors=True)

    def age(self) -> float:
        """Return how many seconds ago the index was last fetched; infinity if never, see `age_of`."""
        return age_of(self._folder / "current")

    async def refresh(self, max_age: float = 0.0, also: Sequence[str] = ()) -> PinnedIndex:
        """Fetch the index unless it is younger than `max_age` seconds, and make the snapshot if need be.

        A new revision is in force when the architectures of `also` have snapshots, too, as far as the suite
        has them. Several callers, also in other processes, wait for one of them to do it. Raises
        `SourceUnavailableError`; what was kept before stays.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        before = self._last_fetch()
        async with holding(self._folder / "lock", make=True):
            # One that waited for another's fetch takes what that gave.
            is_young = self._last_fetch() != before or self.age() < max_age
            async with self._telling() as progress:
                if not (is_young and await self._has_snapshot_of_current(progress)):
                    await self._fetch(also, progress)
        pinned = self.current()
        if pinned is None:
            raise SourceUnavailableError(
                f"debian!{self._suite}", "the index was removed while it was fetched"
            )
        return pinned

    async def make(self, revision: str) -> None:
        """Make the snapshot of a revision that is kept, unless it is there.

        Raises `SourceUnavailableError`, mostly since the mirror has other packages by now.
        """
        async with holding(self._folder / "lock", make=True), self._telling() as progress:
            await self._make_kept(revision, progress)

    async def addresses(self) -> list[str]:
        """Return the addresses of the mirrors in force. Raises `SourceUnavailableError` if there are none."""
        return list(dict.fromkeys(each.address for each in await self._repositories()))

    @asynccontextmanager
    async def _telling(self) -> AsyncIterator[FetchProgress]:
        """Log how far it is, if it takes long."""
        progress = self._progress(self._suite, self._architecture)
        async with progress.told():
            yield progress

    def _named(self) -> str | None:
        """Return the revision in force."""
        try:
            return (self._folder / "current").read_text().strip()
        except FileNotFoundError:
            return None

    def _snapshot(self, revision: str) -> Path:
        return self._folder / "revisions" / revision / self._architecture

    def _last_fetch(self) -> tuple[int, int] | None:
        """Return what is another after each fetch."""
        try:
            status = (self._folder / "current").stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    async def _has_snapshot_of_current(self, progress: FetchProgress) -> bool:
        """Make the snapshot of the revision in force; False if that can't be had any more."""
        revision = self._named()
        if revision is None:
            return False
        try:
            await self._make_kept(revision, progress)
        except PackagesReplacedError as error:
            log.info("the mirror has moved on", suite=self._suite, revision=revision, reason=error.reason)
            return False
        return True

    async def _fetch(self, also: Sequence[str], progress: FetchProgress) -> None:
        """Fetch the Release files, make snapshots of what they list, and only then put that in force."""
        repositories = await self._repositories()
        architectures = dict.fromkeys([self._architecture, *also])
        made: dict[str, int] = {}
        # Once more if the mirror was changed between its Release files and its packages.
        for is_last in (False, True):
            state, revision = await self._released(repositories, progress)
            try:
                for each in architectures:
                    if each == self._architecture or each in state.architectures:
                        made[each] = await self._make(state, revision, each, repositories, progress)
                break
            except PackagesReplacedError:
                if is_last:
                    raise
        addresses = [each.address for each in repositories]
        await asyncio.to_thread(put_in_force, self._folder, revision, addresses)
        for architecture, unresolved in made.items():
            self._log_fetched(revision, architecture, unresolved)

    async def _released(
        self, repositories: Sequence[Repository], progress: FetchProgress
    ) -> tuple[SuiteState, str]:
        """Return what the suite's Release files list now, and its revision."""
        contents = await self._apt.update(repositories, progress.begins)

        def read() -> tuple[SuiteState, str]:
            named = zip(repositories, contents, strict=True)
            state = SuiteState(tuple(Release.parse(each.release, content) for each, content in named))
            return state, state.revision(load_aliases())

        try:
            return await asyncio.to_thread(read)
        except ValueError as error:
            raise SourceUnavailableError(f"debian!{self._suite}", f"its Release file: {error}") from error

    async def _make_kept(self, revision: str, progress: FetchProgress) -> None:
        """Make the snapshot of a revision that is kept, unless it is there."""
        if self._snapshot(revision).exists():
            return
        try:
            state = SuiteState.from_json((self._folder / "revisions" / revision / _STATE).read_bytes())
        except (OSError, ValueError) as error:
            reason = f"its revision {revision} is not kept any more"
            raise SourceUnavailableError(f"debian!{self._suite}", reason) from error
        repositories = await self._repositories()
        unresolved = await self._make(state, revision, self._architecture, repositories, progress)
        self._log_fetched(revision, self._architecture, unresolved)

    def _log_fetched(self, revision: str, architecture: str, unresolved: int) -> None:
        log.info(
            "debian index fetched",
            suite=self._suite,
            architecture=architecture,
            revision=revision,
            unresolved=unresolved,
        )

    async def _make(
        self,
        state: SuiteState,
        revision: str,
        architecture: str,
        repositories: Sequence[Repository],
        progress: FetchProgress,
    ) -> int:
        """Make the snapshot of an architecture at a revision, unless it is there.

        Return how many dependencies nothing in it meets: none if it was there.
        """
        if (self._folder / "revisions" / revision / architecture).exists():
            return 0
        if architecture not in state.architectures:
            address = repositories[0].address
            raise ArchitectureNotFoundError(
                f"debian!{self._suite}", f"{address} has no packages of {self._suite} for {architecture}"
            )
        packages = await self._packages(state, architecture, repositories, progress)
        progress.reading()
        # Seconds of pure computation, with half a gigabyte: in a process of its own, which ends with it.
        async with ProcessPool(1) as processes:
            try:
                unresolved = await processes.run(
                    keep_snapshot, self._folder, state, revision, architecture, packages
                )
            except (LookupError, TypeError, ValueError) as error:
                # What a package says of itself is anybody's text: the last good revision serves meanwhile.
                reason = f"its packages for {architecture} can't be read: {error!r}"
                raise SourceUnavailableError(f"debian!{self._suite}", reason) from error
        return len(unresolved)

    async def _packages(
        self,
        state: SuiteState,
        architecture: str,
        repositories: Sequence[Repository],
        progress: FetchProgress,
    ) -> list[Path | None]:
        """Return the Packages file of each release, fetched if need be; None where there are no packages."""
        kept = self._folder / "packages"
        of_release = {each.release: each for each in repositories}
        wanted: list[tuple[Repository, Release, PackagesFile]] = []
        chosen: list[Path | None] = []
        for release in state.releases:
            file = release.file(architecture)
            chosen.append(None if file is None else kept / file.name)
            if file is None or (kept / file.name).exists():
                continue
            if release.name not in of_release:
                raise SourceUnavailableError(f"debian!{self._suite}", f"no mirror is set for {release.name}")
            wanted.append((of_release[release.name], release, file))
        if wanted:
            await self._fetch_packages(wanted, kept, progress)
        return chosen

    async def _fetch_packages(
        self,
        wanted: Sequence[tuple[Repository, Release, PackagesFile]],
        folder: Path,
        progress: FetchProgress,
    ) -> None:
        """Fetch Packages files into a folder: those of these very hashes, while the mirror has them."""
        plain = [(repository.url(file.path), file) for repository, _, file in wanted]
        by_hash = [
            (repository.url(file.by_hash if release.has_by_hash else file.path), file)
            for repository, release, file in wanted
        ]
        try:
            await self._apt.fetch(by_hash, folder, progress.heard)
        except PackagesReplacedError:
            # Many a mirror leaves the files by hash out, whatever the Release file says.
            if by_hash == plain:
                raise
            await self._apt.fetch(plain, folder, progress.heard)

    async def _repositories(self) -> list[Repository]:
        """List the suite, its updates and its security updates, at the mirrors in force."""
        main, security = self._mirrors.main, self._mirrors.security
        if not main or not security:
            configured = await self._apt.mirrors_of_machine(self._suite)
            main = main or configured.get("main", "")
            security = security or configured.get("security", "")
        if not main:
            raise SourceUnavailableError(
                f"debian!{self._suite}",
                "this machine's apt has no Debian mirror configured; set CHANDLERY_DEBIAN_MIRROR to one",
            )
        addition = _ADDITION.fullmatch(self._suite)
        base = addition[1] if addition else _ADDITIONS.get(self._suite, self._suite)
        wanted = [(main, each) for each in dict.fromkeys((self._suite, base))]
        if base not in _UPDATED_IN_PLACE:
            wanted += [(main, f"{base}-updates"), (security, f"{base}-security")]
        return [Repository(address.rstrip("/"), release) for address, release in wanted if address]


def keep_snapshot(
    folder: Path, state: SuiteState, revision: str, architecture: str, packages: Sequence[Path | None]
) -> tuple[str, ...]:
    """Make the snapshot of some Packages files, one of each release, and return what nothing in it meets.

    A kill in between leaves nothing that looks whole. It isn't in force yet.
    """
    parsed = (
        each
        for number, file in enumerate(packages)
        if file is not None
        for each in parse_packages(_text(file), number)
    )
    snapshot = DebianSnapshot.of(parsed, load_aliases())
    of_revision = folder / "revisions" / revision
    of_revision.mkdir(parents=True, exist_ok=True)
    durably_replace(of_revision / _STATE, state.to_json())
    aside = folder / "snapshot.new"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, content in snapshot.files():
        (aside / name).write_bytes(content)
    (aside / POPULARITY).write_bytes(snapshot.popularity().encode())
    os.sync()
    aside.rename(of_revision / architecture)
    return snapshot.unresolved


def put_in_force(folder: Path, revision: str, addresses: Sequence[str]) -> None:
    """Let `current` name a revision; remove the oldest, and the Packages files of all others."""
    durably_replace(folder / "mirrors.json", msgspec.json.encode(list(addresses)))
    durably_replace(folder / "current", revision.encode())
    revisions = folder / "revisions"
    (revisions / revision).touch()
    remove_oldest(revisions, KEPT_REVISIONS)
    state = SuiteState.from_json((revisions / revision / _STATE).read_bytes())
    needed = {file.name for each in state.releases for forms in each.packages.values() for file in forms}
    for file in folder.glob("packages/*"):
        if file.name not in needed:
            file.unlink(missing_ok=True)


def load_aliases() -> Mapping[str, Sequence[str]]:
    """Read the names of nixpkgs, and for each the Debian packages that hold the same."""
    return msgspec.json.decode(_ALIASES.read_bytes(), type=dict[str, list[str]])


def _text(packages: Path) -> str:
    """Read a Packages file, as its ending says."""
    content = packages.read_bytes()
    if packages.suffix == ".xz":
        content = lzma.decompress(content)
    elif packages.suffix == ".gz":
        content = gzip.decompress(content)
    return content.decode(errors="replace")
