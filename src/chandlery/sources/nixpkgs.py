"""Channels and revisions of nixpkgs: `nixpkgs!nixos-unstable`, `nixpkgs!<commit>`.

A channel's name is resolved to the commit that NixOS publishes for it, and that commit's tarball is unpacked
into a tree. Where both are asked for is a template in the settings. A commit is the same wherever it comes
from, so no mirror is part of a pin's identity.

Any tag means what was pinned once, and `latest` the configured channel. Other channels and commits can be
chosen by a tag only where the operator says so: each costs a download and an evaluation, and GitHub gives
commits of everybody's forks as if they were nixpkgs' own.
"""

import asyncio
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Self

import structlog

from chandlery.errors import (
    ChandleryError,
    ReferenceNotFoundError,
    SettingsError,
    SourceUnavailableError,
)
from chandlery.image.name import LATEST
from chandlery.machine.download import (
    Address,
    DownloadFailedError,
    DownloadLimits,
    fetch,
    fetch_text,
    retried,
)
from chandlery.machine.tarball import TarballError, unpack
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform
from chandlery.sources.arguments import PinnedArguments, SetArguments
from chandlery.sources.negative_cache import MissingReferences, NegativeCache
from chandlery.sources.pin_file import PinFile
from chandlery.sources.pins import PinLimits, Pins, Resolved
from chandlery.sources.trees import SourceTrees

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# A name that can stand in a URL and in a path, and leads nowhere else.
CHANNEL = re.compile(r"[a-z0-9][a-z0-9.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
_BEGINNING = re.compile(r"[0-9a-f]{12,40}")

# Half a gigabyte each, and any of them can be fetched again.
_MOST_TREES = 4

# Bytes of what should be a commit, to look at and to show.
_LONGEST_ANSWER, _LONGEST_SHOWN = 4096, 60

# The channel whose server is asked if no other will do.
_COMPARED = "nixos-unstable"

# A channel's revision is a few bytes.
_CHANNEL_LIMITS = DownloadLimits(silence=10.0, total=30.0, pauses=(0.5,))


@dataclass(frozen=True, slots=True)
class NixpkgsAddresses:
    """Where NixOS publishes, or a mirror does: templates with `{channel}` and with `{revision}`."""

    channel_template: str
    tarball_template: str

    @classmethod
    def parse(cls, channel_template: str, tarball_template: str) -> Self:
        """Check both; `SettingsError` names the setting that is wrong."""
        for name, template, part in (
            ("nixpkgs_channel_url", channel_template, "{channel}"),
            ("nixpkgs_tarball_url", tarball_template, "{revision}"),
        ):
            if part not in template:
                raise SettingsError(f"{name} has no {part}, which stands for what is asked for")
            try:
                Address.parse(template.replace(part, "0"))
            except ValueError as error:
                raise SettingsError(f"{name} is no address: {error}") from error
        return cls(channel_template, tarball_template)

    def channel(self, name: str) -> Address:
        """Return the address of a channel's revision."""
        return Address.parse(self.channel_template.replace("{channel}", name))

    def tarball(self, revision: str) -> Address:
        """Return the address of a revision's tarball."""
        return Address.parse(self.tarball_template.replace("{revision}", revision))


NIXOS = NixpkgsAddresses(
    "https://channels.nixos.org/{channel}/git-revision",
    "https://github.com/NixOS/nixpkgs/archive/{revision}.tar.gz",
)


class NixpkgsSource:
    """A channel or a commit of nixpkgs; what was fetched is kept in `data`.

    `tags` are patterns (fnmatch) of the other channels and commits that a tag may choose.
    """

    kind = "nixpkgs"
    location = "nixpkgs"

    def __init__(
        self,
        channel: str,
        data: Path,
        addresses: NixpkgsAddresses,
        arguments: SetArguments,
        *,
        tags: Sequence[str] = (),
        limits: PinLimits | None = None,
        downloads: DownloadLimits | None = None,
    ) -> None:
        self.text = f"nixpkgs!{channel}"
        self._channel = channel
        self._addresses = addresses
        self._arguments = arguments
        self._tags = tuple(tags)
        self._downloads = downloads or DownloadLimits()
        limits = limits or PinLimits()
        self._failures = NegativeCache(limits.back_off)
        self._trees = SourceTrees(data, self.text, most=_MOST_TREES)
        self._pins = Pins(
            PinFile(data / "pins.json"),
            self.text,
            self._resolve,
            limits,
            missing=MissingReferences(self.text),
        )

    @property
    def platforms(self) -> tuple[Platform, ...]:
        """See `PackageSource.platforms`."""
        return (Platform.of_host(),)

    def serves(self, location: str) -> bool:
        """See `PackageSource.serves`."""
        return location == self.location

    async def upstreams(self) -> Sequence[str]:
        """See `PackageSource.upstreams`."""
        return (str(self._addresses.channel(_COMPARED)),)

    async def pin(self, reference: str, platform: Platform) -> PinnedSource:
        """See `PackageSource.pin`; the first time, a channel's tarball is fetched."""
        arguments = await self._arguments.pin()
        if _BEGINNING.fullmatch(reference):
            known = await self._pins.revision(reference) or self._trees.revision(reference)
            if known is not None:
                return await self._source(known, arguments)
        if reference == self._channel:
            reference = LATEST
        if reference != LATEST and not self._is_allowed(reference):
            raise ReferenceNotFoundError(self.text, reference, self._hint())
        pin = await self._pins.get(reference)
        return await self._source(pin.revision, arguments, pin.stale)

    def chosen_by(self, reference: str, pin: PinnedSource | None = None) -> str:
        """See `PackageSource.chosen_by`: a channel or a revision."""
        own = reference in (LATEST, self._channel)
        return "" if own else f"{self.kind}!{reference}"

    async def at(self, revision: str, platform: Platform) -> PinnedSource | None:
        """See `PackageSource.at`."""
        known = await self._pins.details(revision) is not None or self._trees.revision(revision) == revision
        return await self._source(revision, await self._arguments.pin()) if known else None

    async def refresh(self, max_age: float) -> None:
        """See `PackageSource.refresh`: a new revision is fetched before somebody waits for it."""
        await self._pins.refresh(max_age, always=(LATEST,))

    def keep(self, revisions: Sequence[str]) -> None:
        """See `PackageSource.keep`."""
        self._trees.keep(revisions)

    async def close(self) -> None:
        """See `PackageSource.close`."""
        await self._pins.close()

    def _is_allowed(self, reference: str) -> bool:
        return CHANNEL.fullmatch(reference) is not None and any(
            fnmatchcase(reference, pattern) for pattern in self._tags
        )

    def _hint(self) -> str:
        others = f"those that match {', '.join(self._tags)}" if self._tags else "none"
        return (
            f"there is {LATEST!r}, and for each revision that was served its own tag; "
            f"of other channels and commits, this server's settings allow {others}"
        )

    async def _source(self, revision: str, arguments: PinnedArguments, stale: str = "") -> PinnedSource:
        """Return a revision that was pinned once; its tree may have gone since, and is fetched again."""
        try:
            tree = self._trees.get(revision) or await self._tree(revision)
        except ChandleryError as error:
            # What was built of it needs no tree.
            log.warning(
                "a revision can't be had again", source=self.text, revision=revision, reason=str(error)
            )
            why = "; ".join(each for each in (stale, str(error)) if each)
            return PinnedSource(self.kind, self.location, revision, arguments.variant, None, stale=why)
        return arguments.source(self.kind, self.location, revision, tree, stale)

    async def _resolve(self, reference: str) -> Resolved:
        """Ask what a channel stands at, and fetch it."""
        name = self._channel if reference == LATEST else reference
        revision = name if COMMIT.fullmatch(name) else await self._published(name, reference)
        try:
            await self._tree(revision)
        except DownloadFailedError as error:
            if error.missing and reference == revision:
                raise ReferenceNotFoundError(
                    self.text, reference, f"nixpkgs has no such commit: {error}"
                ) from error
            raise SourceUnavailableError(self.text, str(error)) from error
        return Resolved(revision)

    async def _published(self, channel: str, reference: str) -> str:
        """Return the commit that a channel stands at."""
        address = self._addresses.channel(channel)
        try:
            answer = await retried(
                lambda: fetch_text(address, _LONGEST_ANSWER, _CHANNEL_LIMITS), _CHANNEL_LIMITS.pauses
            )
        except DownloadFailedError as error:
            if not error.missing:
                raise SourceUnavailableError(self.text, str(error)) from error
            if reference != LATEST:
                raise ReferenceNotFoundError(
                    self.text, reference, f"there is no such channel: {error}"
                ) from error
            advice = "see whether the channel's name is right, and the setting nixpkgs_channel_url"
            raise SourceUnavailableError(self.text, f"{error}: {advice}") from error
        revision = answer.strip()
        if COMMIT.fullmatch(revision) is None:
            shown = repr(revision[:_LONGEST_SHOWN])
            raise SourceUnavailableError(self.text, f"{address}: it says {shown}, which is no commit")
        return revision

    async def _tree(self, revision: str) -> Path:
        async def fill(folder: Path) -> None:
            with self._failures.trying(revision):
                await self._fetch(revision, folder)

        return await self._trees.make(revision, fill)

    async def _fetch(self, revision: str, folder: Path) -> None:
        """Unpack the tarball of a revision; `DownloadFailedError` if it can't be had, or is another."""
        address = self._addresses.tarball(revision)
        began = time.monotonic()

        async def attempt() -> str:
            await asyncio.to_thread(_make_empty, folder)
            return await fetch(address, lambda read: unpack(read, folder), self._downloads)

        try:
            commit = await retried(attempt, self._downloads.pauses)
        except TarballError as error:
            raise DownloadFailedError(str(address), str(error)) from error
        if COMMIT.fullmatch(commit) and commit != revision:
            raise DownloadFailedError(str(address), f"it has the commit {commit}, and not {revision}")
        if not (folder / "default.nix").is_file():
            raise DownloadFailedError(str(address), "it has no default.nix, so it isn't nixpkgs")
        seconds = round(time.monotonic() - began, 1)
        log.info(
            "nixpkgs fetched", source=self.text, revision=revision, address=str(address), seconds=seconds
        )


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
