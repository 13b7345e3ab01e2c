"""Suites of Debian, `debian!<suite>`: the embedded package set, which needs nothing but a mirror.

A tag is `latest`, another suite where the operator allows it, or that of a state in which an index once was.
"""

import re
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from chandlery.errors import (
    ReferenceNotFoundError,
    SourceUnavailableError,
    SuiteNotFoundError,
)
from chandlery.image.name import LATEST
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import ARCHITECTURES, Platform
from chandlery.sources.debian.index import DebianIndex, DebianMirrors, PinnedIndex
from chandlery.sources.negative_cache import MissingReferences
from chandlery.sources.pin_file import PinFile
from chandlery.sources.pins import PinLimits, Pins, Resolved

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
            PinFile(folder / "pins.json"),
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
        earlier = await self.at(reference, platform)
        if earlier is not None:
            return earlier
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
        for suite in self._suites(platform.architecture):
            found = self._index(suite, platform.architecture).at(revision)
            if found is not None:
                return self._source(suite, found)
        return None

    async def refresh(self, max_age: float) -> None:
        """See `PackageSource.refresh`; of what isn't the suite for the host, what was asked for lately."""
        host = Platform.of_host().architecture
        await self._pins.refresh(max_age, always=(f"{self.location}/{host}",))

    def keep(self, revisions: Sequence[str]) -> None:
        """See `PackageSource.keep`."""
        for architecture in ARCHITECTURES:
            for suite in self._suites(architecture):
                self._index(suite, architecture).keep(revisions)

    async def close(self) -> None:
        """See `PackageSource.close`."""
        await self._pins.close()

    async def _pin(self, suite: str, platform: Platform) -> PinnedSource:
        pin = await self._pins.get(f"{suite}/{platform.architecture}")
        index = self._index(suite, platform.architecture)
        # Somebody may have removed it, or all of them.
        found = index.at(pin.revision) or index.current() or await index.refresh()
        return self._source(suite, found, pin.stale)

    async def _resolve(self, reference: str) -> Resolved:
        """Fetch an index, unless another process has; one that nobody pinned yet may be a lifetime old."""
        suite, architecture = reference.split("/")
        index = self._index(suite, architecture)
        last = await self._pins.last(reference)
        max_age = self._lifetime if last is None else self._clock() - last.resolved
        try:
            found = await index.refresh(max_age)
        except SuiteNotFoundError as error:
            # A mirror in trouble has no suites, and what was once there may be served until it is well again.
            if suite == self.location or index.current() is not None:
                raise
            index.remove()
            raise self._not_found(suite) from error
        except SourceUnavailableError:
            before = index.current()
            if last is not None or before is None:
                raise
            found = before
        age = index.age()
        return Resolved(found.revision, as_of=self._clock() - age)

    def _index(self, suite: str, architecture: str) -> DebianIndex:
        return DebianIndex(self._folder / f"{suite}-{architecture}", suite, architecture, self._mirrors)

    def _suites(self, architecture: str) -> list[str]:
        """Return the suites of which there is an index, the source's own first."""
        found = (
            path.parent.name.removesuffix(f"-{architecture}")
            for path in sorted(self._folder.glob(f"*-{architecture}/current"))
        )
        return [self.location, *(each for each in found if each != self.location and self._allows(each))]

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
