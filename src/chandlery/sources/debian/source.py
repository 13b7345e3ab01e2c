"""Suites of Debian, `debian!<suite>`: the embedded package set, which needs nothing but a mirror.

A tag is `latest`, another suite where the operator allows it, or that of a revision that a suite once had. A
revision is the suite's, for all architectures. What is fetched for one of them is a reference of pins: its
index is `<suite>/<architecture>`, and its snapshot at an older revision has `/<revision>` behind it.

    <folder>/suites/<suite>/         its index, see `DebianIndex`
    <folder>/suites/pins.json        the pins
    <folder>/<suite>-<architecture>/ what version 0.1 kept, see `EarlierIndex`
"""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import structlog

from chandlery.errors import (
    ChandleryError,
    ReferenceNotFoundError,
    SourceUnavailableError,
    SuiteNotFoundError,
)
from chandlery.image.name import LATEST
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import ARCHITECTURES, Platform
from chandlery.sources.debian.index import (
    KEPT_REVISIONS,
    ArchitectureNotFoundError,
    DebianIndex,
    DebianMirrors,
)
from chandlery.sources.debian.kept_revisions import REVISION, EarlierIndex, PinnedIndex
from chandlery.sources.negative_cache import MissingReferences
from chandlery.sources.pin_file import PinFile
from chandlery.sources.pins import PinLimits, Pins, Resolved

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

SUITE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")

_LONGEST_SUITE = 40
# apt is slow to say that there is no such suite, and mirrors rarely get a new one.
_MISSING_SECONDS, _MISSING_PER_MINUTE = 300.0, 10


class DebianSource:
    """A suite, and beside it those that tags choose. `tags` are patterns of suites; None is all."""

    kind = "debian"

    def __init__(
        self,
        suite: str,
        folder: Path,
        mirrors: DebianMirrors,
        tags: Sequence[str] | None = None,
        limits: PinLimits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.text = f"debian!{suite}"
        self.location = suite
        self._folder = folder
        self._mirrors = mirrors
        self._tags = tags
        self._lifetime = (limits or PinLimits()).lifetime
        self._clock = clock
        self._missing = MissingReferences(self.text, seconds=_MISSING_SECONDS, per_minute=_MISSING_PER_MINUTE)
        # Of all sources that use the folder: a suite's index is the same, whoever asks for it.
        self._pins = Pins(
            PinFile(folder / "suites/pins.json"),
            self.text,
            self._resolve,
            limits,
            missing=self._missing,
            clock=clock,
        )

    @property
    def platforms(self) -> tuple[Platform, ...]:
        """See `PackageSource.platforms`: packages are unpacked, so no processor has to run them."""
        host = Platform.of_host()
        others = (Platform("linux", each) for each in ARCHITECTURES if each != host.architecture)
        return (host, *others)

    def serves(self, location: str) -> bool:
        """See `PackageSource.serves`: a tag may have chosen another suite."""
        return SUITE.fullmatch(location) is not None

    async def upstreams(self) -> Sequence[str]:
        """See `PackageSource.upstreams`: the mirrors."""
        return await self._index(self.location, Platform.of_host().architecture).addresses()

    async def pin(self, reference: str, platform: Platform) -> PinnedSource:
        """See `PackageSource.pin`; an index that was never fetched is fetched now."""
        if reference == LATEST:
            return await self._pin(self.location, platform)
        if REVISION.fullmatch(reference):
            kept = await self._kept(reference, platform.architecture)
            if kept is None:
                raise self._not_found(reference)
            return kept
        if (
            len(reference) > _LONGEST_SUITE
            or SUITE.fullmatch(reference) is None
            or not self._allows(reference)
        ):
            raise self._not_found(reference)
        return await self._pin(reference, platform)

    def chosen_by(self, reference: str, pin: PinnedSource | None = None) -> str:
        """See `PackageSource.chosen_by`: a suite has a text of its own."""
        location = pin.location if pin else self.location if reference == LATEST else reference
        return "" if location == self.location else f"{self.kind}!{location}"

    async def at(self, revision: str, platform: Platform) -> PinnedSource | None:
        """See `PackageSource.at`; the beginning of a revision will do."""
        try:
            return await self._kept(revision, platform.architecture)
        except ChandleryError as error:
            log.info("a revision can't be had", source=self.text, revision=revision, reason=str(error))
            return None

    async def refresh(self, max_age: float) -> None:
        """See `PackageSource.refresh`; of what isn't the suite for the host, what was asked for lately."""
        host = Platform.of_host().architecture
        await self._pins.refresh(max_age, always=(f"{self.location}/{host}",))

    def keep(self, revisions: Sequence[str]) -> None:
        """See `PackageSource.keep`."""
        for suite in self._suites():
            self._index(suite, ARCHITECTURES[0]).keep(revisions)
            for architecture in ARCHITECTURES:
                self._earlier(suite, architecture).keep(revisions)

    async def close(self) -> None:
        """See `PackageSource.close`."""
        await self._pins.close()

    async def _pin(self, suite: str, platform: Platform) -> PinnedSource:
        architecture = platform.architecture
        pin = await self._pins.get(f"{suite}/{architecture}")
        index = self._index(suite, architecture)
        # The suite's revision in force, whatever the architecture was pinned to: so all have the same one.
        found = (
            index.current()
            or self._earlier(suite, architecture).at(pin.revision)
            # Somebody may have removed it, or all of them.
            or await index.refresh()
        )
        return self._source(suite, found, pin.stale)

    async def _kept(self, revision: str, architecture: str) -> PinnedSource | None:
        """Return a revision that some suite once had; raises what keeps its packages from being had."""
        for suite in self._suites():
            index = self._index(suite, architecture)
            whole = index.revision(revision)
            found = index.at(revision) or self._earlier(suite, architecture).at(revision)
            if whole is not None and found is None:
                # Nobody has asked for this architecture before.
                pin = await self._pins.get(f"{suite}/{architecture}/{whole}")
                found = index.at(whole)
                if found is None:
                    raise SourceUnavailableError(self.text, pin.stale or "its snapshot was removed just now")
            if found is not None:
                return self._source(suite, found)
        return None

    async def _resolve(self, reference: str) -> Resolved:
        """See that an architecture's snapshot is there: at what its suite stands at, or at a revision."""
        suite, architecture, *revision = reference.split("/")
        index = self._index(suite, architecture)
        try:
            if revision:
                await index.make(revision[0])
                return Resolved(revision[0])
            return await self._latest(index, suite, architecture)
        except ArchitectureNotFoundError as error:
            raise ReferenceNotFoundError(self.text, (revision or [suite])[0], error.reason) from error

    async def _latest(self, index: DebianIndex, suite: str, architecture: str) -> Resolved:
        """Fetch an index, unless another process has; one that nobody pinned yet may be a lifetime old."""
        reference = f"{suite}/{architecture}"
        last = await self._pins.last(reference)
        max_age = self._lifetime if last is None else self._clock() - last.resolved
        earlier = self._earlier(suite, architecture)
        others = [f"{suite}/{each}" for each in ARCHITECTURES if each != architecture]
        in_use = [each.partition("/")[2] for each in await self._pins.in_use(others)]
        try:
            found = await index.refresh(max_age, in_use)
        except SuiteNotFoundError as error:
            # A mirror in trouble has no suites, and what was once there may be served until it is well again.
            if suite == self.location or index.was_fetched or earlier.current() is not None:
                raise
            index.remove()
            raise self._not_found(suite) from error
        except ArchitectureNotFoundError:
            raise
        except SourceUnavailableError:
            if last is not None:
                raise
            before = index.current()
            if before is not None:
                return Resolved(before.revision, as_of=self._clock() - index.age())
            before = earlier.current()
            if before is None:
                raise
            return Resolved(before.revision, as_of=self._clock() - earlier.age())
        await asyncio.to_thread(self._shrink, suite)
        return Resolved(found.revision, as_of=self._clock() - index.age())

    def _shrink(self, suite: str) -> None:
        """Let revisions of version 0.1 make room for those that came since."""
        kept = KEPT_REVISIONS - self._index(suite, ARCHITECTURES[0]).number_of_revisions()
        for architecture in ARCHITECTURES:
            self._earlier(suite, architecture).shrink(max(0, kept))

    def _index(self, suite: str, architecture: str) -> DebianIndex:
        return DebianIndex(self._folder / "suites" / suite, suite, architecture, self._mirrors)

    def _earlier(self, suite: str, architecture: str) -> EarlierIndex:
        return EarlierIndex(self._folder / f"{suite}-{architecture}")

    def _suites(self) -> list[str]:
        """Return the suites of which there is an index, the source's own first."""
        found = {path.parent.name for path in self._folder.glob("suites/*/current")}
        for architecture in ARCHITECTURES:
            earlier = self._folder.glob(f"*-{architecture}/current")
            found |= {path.parent.name.removesuffix(f"-{architecture}") for path in earlier}
        others = sorted(each for each in found if each != self.location and self._allows(each))
        return [self.location, *others]

    def _allows(self, suite: str) -> bool:
        return (
            suite == self.location
            or self._tags is None
            or any(fnmatchcase(suite, pattern) for pattern in self._tags)
        )

    def _not_found(self, reference: str) -> ReferenceNotFoundError:
        if self._tags is None:
            others = "other suites that the mirror has, such as trixie,"
        else:
            others = f"suites like {', '.join(self._tags)}," if self._tags else ""
        return ReferenceNotFoundError(
            self.text, reference, f"there is {LATEST!r}, {others} and for each state of an index its own tag"
        )

    def _source(self, suite: str, pinned: PinnedIndex, stale: str = "") -> PinnedSource:
        nix = {"lock": str(pinned.snapshot), "mirrors": list(pinned.mirrors)}
        return PinnedSource(
            self.kind, suite, pinned.revision, nix=nix, popularity=str(pinned.popularity), stale=stale
        )
