"""The index of a Debian suite, fetched by apt; the last good one serves while a mirror is down.

apt runs in a private directory, for any architecture and without root, and checks the index's signature. Its
mirrors are those that this machine's apt is configured with, unless the settings name others; none is written
here. A snapshot is a folder named by its revision, made aside and renamed, so that what is there is whole.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import msgspec
import structlog

from chandlery.errors import SourceUnavailableError, SuiteNotFoundError
from chandlery.machine import program
from chandlery.machine.age import age_of
from chandlery.machine.durable import durably_replace
from chandlery.machine.locks import holding
from chandlery.machine.process_pool import ProcessPool
from chandlery.machine.program import Limits, OutputLimitError, ProgramMissingError, TimeLimitError
from chandlery.sources.debian.progress import STATUS_OPTION, FetchProgress
from chandlery.sources.debian.snapshot import DebianSnapshot, parse_packages

log = structlog.get_logger()

# Revisions that are kept, 28 MB each: the newest, and those that images in use were made at (`keep`).
KEPT_SNAPSHOTS = 16

_ALIASES = files("chandlery") / "nix/expressions/debian_aliases.json"
_COMPONENT = "main"
_POPULARITY = "popularity.json"
_REVISION_LENGTH = 64

# Suites that stand on another: what they lack comes from there.
_ADDITION = re.compile(r"(.+)-(?:backports|backports-sloppy|proposed-updates)")
_ADDITIONS = {"experimental": "sid", "rc-buggy": "sid"}
# Suites that get no updates of their own. It is known by name, since a mirror could leave out what it likes.
_UPDATED_IN_PLACE = ("sid", "unstable")
_APT_TIMEOUT = 300.0  # seconds; apt gives up on a silent mirror long before

_APT_CONFIGURATION = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets;
#clear APT::Architectures;
Acquire::IndexTargets::deb::Packages {{
    MetaKey "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages";
    ShortDescription "Packages";
    Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages";
}};
Acquire::Languages "none";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
Acquire::Retries "2";
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Update::Error-Mode "any";
Dir::State "{folder}/state";
Dir::State::status "/dev/null";
Dir::Cache "{folder}/cache";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "/dev/null";
"""


@dataclass(frozen=True, slots=True)
class DebianMirrors:
    """Where packages come from; what is empty is read from this machine's apt configuration.

    `security` is the mirror of `<suite>-security`, a repository of its own; `keyring` is the file with the
    keys that sign the index.
    """

    main: str = ""
    security: str = ""
    keyring: str = ""


@dataclass(frozen=True, slots=True)
class Repository:
    """One line of a sources.list(5): the address, and the release below its `dists/`."""

    address: str
    release: str


@dataclass(frozen=True, slots=True)
class PinnedIndex:
    """A suite as it stood once: the folder with its snapshot, and the addresses its repositories have now."""

    revision: str
    snapshot: Path
    mirrors: tuple[str, ...]

    @property
    def popularity(self) -> Path:
        """The file with the popularity of its packages (see `Popularity`)."""
        return self.snapshot / _POPULARITY


class DebianIndex:
    """One suite for one architecture, in a folder of its own."""

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

    def current(self) -> PinnedIndex | None:
        """Return the last good state of the suite, or None if there never was one."""
        try:
            revision = (self._folder / "current").read_text().strip()
        except FileNotFoundError:
            return None
        return self.at(revision)

    def at(self, revision: str) -> PinnedIndex | None:
        """Return the suite as it stood at a revision (or the beginning of one), if it is still kept."""
        if re.fullmatch("[0-9a-f]{12,64}", revision) is None:
            return None
        snapshot: Path | None = self._folder / "locks" / revision
        if len(revision) < _REVISION_LENGTH:
            snapshot = next(iter(sorted((self._folder / "locks").glob(f"{revision}*"))), None)
        # One that an older version made has no table.
        if snapshot is None or not (snapshot / _POPULARITY).exists():
            return None
        mirrors = msgspec.json.decode((self._folder / "mirrors.json").read_bytes(), type=tuple[str, ...])
        return PinnedIndex(snapshot.name, snapshot, mirrors)

    def keep(self, revisions: Sequence[str]) -> None:
        """Let the snapshots of these revisions be the last that are removed; the most wanted comes first."""
        # `keep_snapshot` removes the oldest, by the time of their folder.
        now = time.time()
        for number, revision in enumerate(revisions):
            with suppress(OSError):
                os.utime(self._folder / "locks" / revision, (now - number, now - number))

    def remove(self) -> None:
        """Remove the folder of a suite that was never there, so that nobody's guesses fill the disk."""
        if self.current() is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def age(self) -> float:
        """Return how many seconds ago the index was last fetched; infinity if never, see `age_of`."""
        return age_of(self._folder / "current")

    async def refresh(self, max_age: float = 0.0) -> PinnedIndex:
        """Fetch the index unless it is younger than `max_age` seconds.

        Several callers, also in other processes, wait for one of them to do it. Raises
        `SourceUnavailableError`; what was kept before stays.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        before = self._last_fetch()
        async with holding(self._folder / "lock", make=True):
            # One that waited for another's fetch takes what that gave.
            if self._last_fetch() == before and self.age() >= max_age:
                await self._fetch()
        pinned = self.current()
        if pinned is None:
            raise SourceUnavailableError(
                f"debian!{self._suite}", "the index was removed while it was fetched"
            )
        return pinned

    def _last_fetch(self) -> tuple[int, int] | None:
        """Return what is another after each fetch."""
        try:
            status = (self._folder / "current").stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    async def _fetch(self) -> None:
        progress = self._progress(self._suite, self._architecture)
        async with progress.told():
            await self._fetch_and_read(progress)

    async def _fetch_and_read(self, progress: FetchProgress) -> None:
        repositories = await self._repositories()
        apt = self._folder / "apt"
        for needed in ("state/lists/partial", "cache/archives/partial"):
            (apt / needed).mkdir(parents=True, exist_ok=True)
        configuration = apt / "apt.conf"
        configuration.write_text(_APT_CONFIGURATION.format(folder=apt, architecture=self._architecture))
        option = f"[signed-by={self._mirrors.keyring}] " if self._mirrors.keyring else ""
        (apt / "sources.list").write_text(
            "".join(f"deb {option}{each.address} {each.release} {_COMPONENT}\n" for each in repositories)
        )
        try:
            await self._apt(
                "apt-get", "-c", str(configuration), "-o", STATUS_OPTION, "update", on_output=progress.heard
            )
        except SourceUnavailableError as error:
            suite = re.escape(f"{repositories[0].address} {self._suite} Release'")
            if re.search(rf"{suite} (does not have|no longer has) a Release file", error.reason):
                raise SuiteNotFoundError(error.source, error.reason) from error
            raise
        listed = await self._apt(
            "apt-get", "-c", str(configuration), "indextargets",
            "--format", "$(REPO_URI)|$(RELEASE)|$(FILENAME)", "Created-By: Packages",
        )  # fmt: skip
        files = {}
        for line in listed.splitlines():
            address, release, file = line.split("|", 2)
            files[address.rstrip("/"), release] = file
        # apt keeps no file of a release without packages, as the updates of a new suite are.
        found = [files.get((each.address, each.release)) for each in repositories]
        if found[0] is None:
            raise SourceUnavailableError(
                f"debian!{self._suite}",
                f"{repositories[0].address} has no packages of {self._suite} for {self._architecture}",
            )
        texts = [
            "" if file is None else await self._apt("/usr/lib/apt/apt-helper", "cat-file", file)
            for file in found
        ]
        progress.reading()
        # Seconds of pure computation, with half a gigabyte: in a process of its own, which ends with it.
        async with ProcessPool(1) as processes:
            addresses = [each.address for each in repositories]
            revision, unresolved = await processes.run(keep_snapshot, self._folder, texts, addresses)
        log.info(
            "debian index fetched",
            suite=self._suite,
            architecture=self._architecture,
            revision=revision,
            unresolved=len(unresolved),
        )

    async def addresses(self) -> list[str]:
        """Return the addresses of the mirrors in force. Raises `SourceUnavailableError` if there are none."""
        return list(dict.fromkeys(each.address for each in await self._repositories()))

    async def _repositories(self) -> list[Repository]:
        """List the suite, its updates and its security updates, at the mirrors in force."""
        main, security = self._mirrors.main, self._mirrors.security
        if not main or not security:
            configured = await self._configured()
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

    async def _configured(self) -> Mapping[str, str]:
        """Find the mirrors of this machine's own apt: of the release it runs, and of security updates."""
        # Without release info, what was never downloaded is listed too: a container's apt often has no lists.
        listed = await self._apt(
            "apt-get", "indextargets", "--no-release-info",
            "--format", "$(RELEASE)|$(COMPONENT)|$(REPO_URI)", "Created-By: Packages",
        )  # fmt: skip
        found: dict[str, str] = {}
        for line in listed.splitlines():
            release, component, address = line.split("|", 2)
            # Nix fetches from there too, which doesn't know apt's other methods, such as mirror+file.
            if component != _COMPONENT or not address.startswith(("http://", "https://")):
                continue
            if release.endswith(("-security", "/updates")):
                found.setdefault("security", address)
            elif release in (self._suite, _running_release()):
                found.setdefault("main", address)
        return found

    async def _apt(self, *command: str, on_output: Callable[[bytes], object] | None = None) -> str:
        """Return what one of apt's programs prints. Raises `SourceUnavailableError` with its complaint.

        What it writes to stderr goes to `on_output` as well, as it comes.
        """
        source = f"debian!{self._suite}"
        environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        try:
            finished = await program.run(command, environment, Limits(_APT_TIMEOUT), on_output=on_output)
        except ProgramMissingError as error:
            raise SourceUnavailableError(
                source, f"{error}: this package set needs Debian's apt on this machine"
            ) from error
        except TimeLimitError as error:
            raise SourceUnavailableError(source, f"apt did not finish within {_APT_TIMEOUT:g} s") from error
        except OutputLimitError as error:
            raise SourceUnavailableError(source, f"apt was stopped: {error}") from error
        if finished.code != 0:
            complaint = finished.stderr.decode(errors="replace")
            said = [line for line in complaint.splitlines() if line[:2] in ("E:", "W:")]
            # Errors first: a warning may be about something else.
            said.sort(key=lambda line: line[0])
            reason = "; ".join(said[:4]) or f"exit code {finished.code}"
            raise SourceUnavailableError(source, f"apt said: {reason}")
        return finished.stdout.decode(errors="replace")


def keep_snapshot(
    folder: Path, texts: Sequence[str], addresses: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """Make the snapshot of some Packages files, and only then let `current` name it.

    A kill in between leaves the old one in force. Returns the snapshot's revision, and the dependencies that
    nothing meets.
    """
    packages = (each for number, text in enumerate(texts) for each in parse_packages(text, number))
    snapshot = DebianSnapshot.of(packages, load_aliases())
    revision = snapshot.revision()
    snapshots = folder / "locks"
    if not (snapshots / revision).exists():
        aside = folder / "lock.new"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, content in snapshot.files():
            (aside / name).write_bytes(content)
        (aside / _POPULARITY).write_bytes(snapshot.popularity().encode())
        os.sync()
        snapshots.mkdir(exist_ok=True)
        aside.rename(snapshots / revision)
    durably_replace(folder / "mirrors.json", msgspec.json.encode(list(addresses)))
    durably_replace(folder / "current", revision.encode())
    (snapshots / revision).touch()
    by_age = sorted(snapshots.iterdir(), key=lambda each: each.stat().st_mtime, reverse=True)
    for old in by_age[KEPT_SNAPSHOTS:]:
        shutil.rmtree(old, ignore_errors=True)
    return revision, snapshot.unresolved


def load_aliases() -> Mapping[str, Sequence[str]]:
    """Read the names of nixpkgs, and for each the Debian packages that hold the same."""
    return msgspec.json.decode(_ALIASES.read_bytes(), type=dict[str, list[str]])


def _running_release() -> str:
    """Return the code name of the Debian release that this machine runs (os-release(5))."""
    try:
        text = Path("/etc/os-release").read_text()
    except OSError:
        return ""
    match = re.search(r"^VERSION_CODENAME=(\S+)$", text, re.MULTILINE)
    return match[1] if match else ""
