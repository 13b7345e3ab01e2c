"""Flakes: `flake!git+https://git.example.com/ours?ref=main`, `flake!/srv/flake`, `flake!github:owner/name`.

Nix fetches the flake as it is now, and all that its lock names, into the store; from then on nothing of it is
needed from elsewhere. Links protect the sources of the revisions that are kept from Nix's garbage collector:

    <data>/pins.json
    <data>/roots/<revision>/source*    into the store
    <data>/roots/<revision>/whole      they are all there; its time is when it was last handed out

A revision is the commit, or else the hash of the content (of folders, and of git work trees with changes). It
says which inputs the flake has only if its lock file does: a flake whose lock lacks one is refused.
"""

import asyncio
import os
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import structlog

from chandlery.errors import ChandleryError, NixError, ReferenceNotFoundError, SourceUnavailableError
from chandlery.image.name import LATEST
from chandlery.machine.disk_errors import storage_errors
from chandlery.nix.closure import StorePath
from chandlery.nix.output import DerivationMissingError, LockedFlake
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform
from chandlery.sources.git.address import GitAddress
from chandlery.sources.negative_cache import NegativeCache
from chandlery.sources.pin_file import PinFile
from chandlery.sources.pins import PinLimits, Pins, Resolved

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_REVISION = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_BEGINNING = re.compile(r"[0-9a-f]{12,64}")

# What of a reference's query says where a flake is, and not which revision of it is wanted.
_PLACE = ("dir", "host", "submodules")
_SHOWN = (*_PLACE, "ref", "rev")
_KNOWN = (*_SHOWN, "narHash", "revCount", "lastModified", "shallow", "allRefs")
# owner/name/branch or revision
_FORGES = ("github", "gitlab", "sourcehut")

# Of one flake; those that were handed out within the last hour are kept as well.
_MOST_REVISIONS = 8
_IN_USE = 3600.0
# Seconds in which Nix must have fetched a flake and all that it needs.
_FETCH_TIMEOUT = 1200.0


class FlakeStore(Protocol):
    """What a flake needs of Nix."""

    @property
    def store_root(self) -> Path:
        """Where `<hash>-<name>` is found."""
        ...

    async def flake_metadata(self, reference: str) -> LockedFlake:
        """Fetch a flake as it is now; `NixError` if it can't be had, or its lock lacks something."""
        ...

    async def flake_archive(self, flake: LockedFlake, roots: Path) -> list[StorePath]:
        """Fetch all that it needs, and protect everything by links in `roots`."""
        ...

    def beginning(self) -> AbstractAsyncContextManager[Any]:
        """Keep the collector away."""
        ...


@dataclass(frozen=True, slots=True)
class FlakeReference:
    """A flake reference: as Nix takes it, and as people see it.

    `location` and `shown` have no credentials, and `location` has nothing that moves. What a query says that
    Nix doesn't know is for the server that is asked, and may be a token.
    """

    text: str
    location: str
    shown: str
    _userinfo: str
    _extra: Mapping[str, str]
    _secrets: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a reference that says where the flake is; `ValueError` says what is wrong with another."""
        if "#" in text:
            raise ValueError("a flake's reference ends before the #: an image's name says which packages")
        if text.startswith(("/", ".", "~")):
            text = _absolute(text)
        elif text.startswith("path:"):
            text = f"path:{_absolute(text.removeprefix('path:'))}"
        parts = urlsplit(text)
        if not (parts.scheme or text.startswith("/")) or parts.scheme == "flake":
            raise ValueError("say where it is, as in github:NixOS/nixpkgs, git+https://... or a folder")
        host = parts.netloc.rpartition("@")[2]
        userinfo, secrets = parts.netloc.rpartition("@")[0], [parts.password or parts.username]
        # Who logs in by ssh is no secret, and often git.
        if parts.scheme.endswith("ssh") and not parts.password:
            host, userinfo, secrets = parts.netloc, "", []
        head = f"{parts.scheme}:" if parts.scheme else ""
        start = f"{head}//{host}" if text.startswith(f"{head}//") else head
        query = dict(parse_qsl(parts.query))
        extra = {name: value for name, value in query.items() if name not in _KNOWN}
        path = "/".join(parts.path.split("/")[:2]) if parts.scheme in _FORGES else parts.path
        secrets += extra.values()
        return cls(
            text,
            _with_query(f"{start}{path}", {name: query[name] for name in _PLACE if name in query}),
            _with_query(f"{start}{parts.path}", {name: query[name] for name in _SHOWN if name in query}),
            userinfo,
            extra,
            tuple(dict.fromkeys(form for each in secrets if each for form in (each, unquote(each)))),
        )

    @property
    def git_address(self) -> GitAddress | None:
        """Where git finds it; None if it isn't in git, or git itself is not asked for it."""
        if not self.text.startswith("git+"):
            return None
        try:
            return GitAddress.parse(self.text.removeprefix("git+").partition("?")[0])
        except ValueError:
            return None

    def without_secrets(self, text: str) -> str:
        """Return a text of Nix's without the credentials of this reference."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def stripped(self, text: str) -> str:
        """Return another reference to this flake without the credentials."""
        parts = urlsplit(text)
        netloc = parts.netloc.rpartition("@")[2] if self._userinfo else parts.netloc
        start = f"{parts.scheme}://{netloc}{parts.path}" if parts.netloc else text.partition("?")[0]
        known = {name: value for name, value in parse_qsl(parts.query) if name in _KNOWN}
        return _with_query(start, known)

    def completed(self, text: str) -> str:
        """Undo `stripped`."""
        if self._userinfo:
            text = text.replace("://", f"://{self._userinfo}@", 1)
        start, _, query = text.partition("?")
        return _with_query(start, {**dict(parse_qsl(query)), **self._extra})


async def _ask_nobody() -> None:
    return


class FlakeSource:
    """One flake; what is known of its revisions is kept in `data`, and their sources in Nix's store.

    `ask_upstream` raises `SourceUnavailableError` if the flake's server can't be reached: then Nix goes on
    with what it fetched once, and its exit code doesn't tell.
    """

    kind = "flake"

    def __init__(
        self,
        reference: FlakeReference,
        data: Path,
        nix: FlakeStore,
        limits: PinLimits | None = None,
        *,
        ask_upstream: Callable[[], Awaitable[object]] = _ask_nobody,
        fetch_timeout: float = _FETCH_TIMEOUT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.text = f"flake!{reference.shown}"
        self.location = reference.location
        self._reference = reference
        self._roots = data / "roots"
        self._nix = nix
        self._ask_upstream = ask_upstream
        self._fetch_timeout = fetch_timeout
        self._clock = clock
        self._wanted: Sequence[str] = ()
        self._fetching: dict[str, asyncio.Lock] = {}
        limits = limits or PinLimits()
        self._failures = NegativeCache(limits.back_off)
        self._pins = Pins(PinFile(data / "pins.json"), self.text, self._resolve, limits)

    @property
    def platforms(self) -> tuple[Platform, ...]:
        """See `PackageSource.platforms`."""
        return (Platform.of_host(),)

    def serves(self, location: str) -> bool:
        """See `PackageSource.serves`."""
        return location == self.location

    async def upstreams(self) -> Sequence[str]:
        """See `PackageSource.upstreams`."""
        return ()

    async def pin(self, reference: str, platform: Platform) -> PinnedSource:
        """See `PackageSource.pin`."""
        if _BEGINNING.fullmatch(reference):
            known = await self._pins.revision(reference)
            if known is not None:
                return await self._source(known)
        if reference != LATEST:
            hint = f"there is {LATEST!r}, and for each revision that was served its own tag"
            raise ReferenceNotFoundError(self.text, reference, hint)
        pin = await self._pins.get(LATEST)
        return await self._source(pin.revision, pin.stale)

    def chosen_by(self, reference: str, pin: PinnedSource | None = None) -> str:
        """See `PackageSource.chosen_by`: a tag chooses a revision of the same flake."""
        return ""

    async def at(self, revision: str, platform: Platform) -> PinnedSource | None:
        """See `PackageSource.at`."""
        if _REVISION.fullmatch(revision) is None or await self._pins.details(revision) is None:
            return None
        return await self._source(revision)

    async def refresh(self, max_age: float) -> None:
        """See `PackageSource.refresh`: a new revision is fetched before somebody waits for it."""
        await self._pins.refresh(max_age, always=(LATEST,))

    def keep(self, revisions: Sequence[str]) -> None:
        """See `PackageSource.keep`."""
        self._wanted = tuple(revisions)

    async def close(self) -> None:
        """See `PackageSource.close`."""
        await self._pins.close()

    async def _source(self, revision: str, stale: str = "") -> PinnedSource:
        """Return a revision that was pinned once; one that has gone from the store since is fetched again."""
        try:
            details = await self._pins.details(revision)
            if not self._hand_out(revision):
                details = (await self._fetch_again(revision, details or {})).details
        except ChandleryError as error:
            # What was built of it needs no source.
            reason = str(error)
            log.warning("a revision can't be had again", source=self.text, revision=revision, reason=reason)
            why = "; ".join(each for each in (stale, reason) if each)
            return PinnedSource(self.kind, self.location, revision, nix=None, stale=why)
        reference = (details or {})["reference"]
        return PinnedSource(self.kind, self.location, revision, nix={"flake": reference}, stale=stale)

    async def _resolve(self, _: str) -> Resolved:
        await self._ask_upstream()
        return await self._fetch(self._reference.text)

    async def _fetch_again(self, revision: str, details: Mapping[str, str]) -> Resolved:
        """Fetch a revision that was pinned once; what isn't in git may have changed since."""
        async with self._fetching.setdefault(revision, asyncio.Lock()):
            if self._hand_out(revision):
                return Resolved(revision, details)
            with self._failures.trying(revision):
                found = await self._fetch(self._reference.completed(details["location"]))
                if found.revision != revision:
                    raise SourceUnavailableError(self.text, f"it has the revision {found.revision} there now")
                return found

    async def _fetch(self, reference: str) -> Resolved:
        """Fetch a flake and what its lock names, and protect them."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._fetch_timeout):
                try:
                    flake = await self._fetched(reference)
                except DerivationMissingError:
                    # The collector took something before it was protected.
                    flake = await self._fetched(reference)
        except TimeoutError as error:
            reason = f"Nix was stopped after {self._fetch_timeout:g} s"
            raise SourceUnavailableError(self.text, reason) from error
        except NixError as error:
            raise SourceUnavailableError(self.text, self._reason(error)) from error
        await asyncio.to_thread(self._remove_old, flake.revision)
        log.info(
            "flake fetched",
            source=self.text,
            revision=flake.revision,
            seconds=round(time.monotonic() - began, 1),
        )
        location = self._reference.stripped(flake.location)
        return Resolved(flake.revision, {"reference": flake.reference, "location": location})

    async def _fetched(self, reference: str) -> LockedFlake:
        flake = await self._nix.flake_metadata(reference)
        known = await self._pins.details(flake.revision) or {}
        if known.get("reference") == flake.reference and self._hand_out(flake.revision):
            return flake
        roots = self._roots / flake.revision
        await self._nix.flake_archive(flake, roots)
        # Once more, which takes a moment, and with no collector about: it might have taken a source between
        # the two, or while it was being protected.
        async with self._nix.beginning():
            await self._nix.flake_archive(flake, roots)
            with storage_errors(self._roots):
                (roots / "whole").touch()
        return flake

    def _hand_out(self, revision: str) -> bool:
        """Return whether everything of a revision is in the store; it stays for an hour at least."""
        roots = self._roots / revision
        now = self._clock()
        try:
            os.utime(roots / "whole", (now, now))
            links = [path.readlink() for path in roots.iterdir() if path.is_symlink()]
        except OSError:
            return False
        return bool(links) and all((self._nix.store_root / link.name).exists() for link in links)

    def _remove_old(self, newest: str) -> None:
        """Let Nix's collector have what nobody wants any more."""
        rank = {revision: number for number, revision in enumerate((newest, *self._wanted))}
        used = {}
        for folder in self._roots.iterdir():
            with suppress(OSError):
                used[folder.name] = (folder / "whole").stat().st_mtime
        by_worth = sorted(used, key=lambda each: (rank.get(each, len(rank)), -used[each], each))
        for revision in by_worth[_MOST_REVISIONS:]:
            if abs(self._clock() - used[revision]) >= _IN_USE:
                log.info("a revision is removed", source=self.text, revision=revision)
                shutil.rmtree(self._roots / revision, ignore_errors=True)

    def _reason(self, error: NixError) -> str:
        text = self._reference.without_secrets(str(error))
        if "lock file" in text:
            return (
                "its flake.lock lacks some of its inputs, so its revision doesn't say what it is made of: "
                f"run `nix flake lock` there, and commit flake.lock ({text})"
            )
        return text


def _absolute(path: str) -> str:
    name, separator, query = path.partition("?")
    return f"{Path(name).expanduser().absolute()}{separator}{query}"


def _with_query(start: str, query: Mapping[str, str]) -> str:
    return f"{start}?{urlencode(query, quote_via=quote, safe='/')}" if query else start
