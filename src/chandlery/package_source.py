"""Where packages come from: `debian!<suite>` and `path!<folder>`, and the pin that makes each immutable.

A source moves (an index is updated, a folder is edited); a pin doesn't. Everything after the pin works with a
`PinnedSource`, so every build has a key. Adding a source is one class here and one branch in
`nix/package_set.nix`.
"""

import asyncio
import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from chandlery.debian_index import DebianIndex, DebianMirrors, PinnedIndex
from chandlery.errors import (
    InvalidSourceError,
    ReferenceNotFoundError,
    RevisionGoneError,
    SourceUnavailableError,
)
from chandlery.image_name import LATEST
from chandlery.oci import ARCHITECTURES, Platform

# How much of a revision a tag shows: enough to be unique, short enough to type.
REVISION_TAG_LENGTH = 16


@dataclass(frozen=True, slots=True)
class PinnedSource:
    """A package set at one revision.

    `kind` and `location` say which source it is and `revision` what it held; `nix` is what
    `nix/package_set.nix` needs to know beyond that, such as where the lock is: it is no part of the identity.
    It is None when the source has that revision no longer: what was resolved at it stays valid, and nothing
    new can be evaluated.
    """

    kind: str
    location: str
    revision: str
    nix: Mapping[str, Any] | None = field(default_factory=dict, compare=False, hash=False)

    @property
    def tag(self) -> str:
        """The tag that always means this revision."""
        return self.revision[:REVISION_TAG_LENGTH]

    def to_nix(self) -> dict[str, Any]:
        """Give the `source` argument of `nix/package_set.nix`; `RevisionGoneError` if there is none."""
        if self.nix is None:
            raise RevisionGoneError(f"{self.kind}!{self.location}", self.tag)
        return {"kind": self.kind, "location": self.location, **self.nix}


class PackageSource(Protocol):
    """Something that can be pinned."""

    text: str

    async def pin(self, reference: str, platform: Platform) -> PinnedSource:
        """Give what a tag means now: `latest`, or the tag of a revision.

        Raises `ReferenceNotFoundError` for another tag, `SourceUnavailableError` if there is nothing to pin.
        """
        ...

    async def refresh(self, max_age: float) -> None:
        """See whether the source has moved, if that was last done more than `max_age` seconds ago."""
        ...

    def keep(self, revisions: Sequence[str]) -> None:
        """Let these revisions be the last to go when old ones are removed; the most wanted comes first."""
        ...


class DebianSource:
    """The embedded package set: a suite of Debian, `debian!<suite>`."""

    def __init__(self, suite: str, folder: Path, mirrors: DebianMirrors) -> None:
        self.text = f"debian!{suite}"
        self._suite = suite
        self._indexes = {
            architecture: DebianIndex(folder / f"{suite}-{architecture}", suite, architecture, mirrors)
            for architecture in ARCHITECTURES
        }

    async def pin(self, reference: str, platform: Platform) -> PinnedSource:
        """See `PackageSource.pin`; an index that was never fetched is fetched now."""
        index = self._indexes[platform.architecture]
        if reference == LATEST:
            pinned = index.current() or await index.refresh(max_age=float("inf"))
        else:
            found = index.at(reference)
            if found is None:
                raise ReferenceNotFoundError(
                    self.text, reference, f"there is {LATEST!r}, and for each state of the index its own tag"
                )
            pinned = found
        return self._source(pinned)

    async def refresh(self, max_age: float) -> None:
        """See `PackageSource.refresh`; of other architectures than the host's, those that were asked for."""
        host = Platform.of_host().architecture
        for architecture, index in self._indexes.items():
            if architecture == host or index.current() is not None:
                await index.refresh(max_age)

    def keep(self, revisions: Sequence[str]) -> None:
        """See `PackageSource.keep`."""
        for index in self._indexes.values():
            index.keep(revisions)

    def _source(self, pinned: PinnedIndex) -> PinnedSource:
        return PinnedSource(
            "debian",
            self._suite,
            pinned.revision,
            {"lock": str(pinned.lock), "mirrors": list(pinned.mirrors)},
        )


class PathSource:
    """A Nix package set in a folder of this machine, `path!<folder>`: its revision is its content's hash."""

    def __init__(self, folder: Path) -> None:
        self.text = f"path!{folder}"
        self._folder = folder
        self._hashes: dict[bytes, tuple[tuple[int, int, int], bytes]] = {}

    async def pin(self, reference: str, platform: Platform) -> PinnedSource:
        """See `PackageSource.pin`; only the content that the folder has now can be pinned."""
        try:
            revision = await asyncio.to_thread(self._revision)
        except OSError as error:
            where = os.fsdecode(error.filename or self._folder)
            raise SourceUnavailableError(self.text, f"{where}: {error.strerror}") from error
        pinned = PinnedSource("path", str(self._folder), revision)
        if reference not in (LATEST, pinned.tag):
            raise ReferenceNotFoundError(
                self.text, reference, f"there is {LATEST!r}, and {pinned.tag!r} for what the folder holds now"
            )
        return pinned

    async def refresh(self, max_age: float) -> None:
        """Do nothing: every pin reads the folder."""

    def keep(self, revisions: Sequence[str]) -> None:
        """Do nothing: a folder has one revision."""

    def _revision(self) -> str:
        """Hash every name and content below the folder; a file that didn't change is not read again."""
        state = hashlib.sha256()
        pending = [b""]
        root = os.fsencode(self._folder)
        while pending:
            relative = pending.pop()
            path = os.path.join(root, relative) if relative else root  # noqa: PTH118
            for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
                name = os.path.join(relative, entry.name)  # noqa: PTH118
                # A version control system's own state says nothing about the packages.
                if name == b".git":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name)
                    content = b"directory"
                elif entry.is_symlink():
                    content = b"link " + os.readlink(entry.path)  # noqa: PTH115
                else:
                    content = self._file_hash(entry)
                state.update(b"%d:%s%d:%s" % (len(name), name, len(content), content))
        return state.hexdigest()

    def _file_hash(self, entry: os.DirEntry[bytes]) -> bytes:
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            return b"special"
        signature = (status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._hashes.get(entry.path)
        if known is None or known[0] != signature:
            with open(entry.path, "rb") as file:  # noqa: PTH123
                known = (signature, hashlib.file_digest(file, "sha256").digest())
            self._hashes[entry.path] = known
        executable = b"x" if status.st_mode & stat.S_IXUSR else b"-"
        return executable + known[1]


def parse(text: str, folder: Path, mirrors: DebianMirrors) -> PackageSource:
    """Read `<kind>!<location>`; `folder` is for what sources fetch. Raises `InvalidSourceError`."""
    kind, separator, location = text.partition("!")
    if not separator or not location:
        raise InvalidSourceError(text, "write debian!<suite> or path!<folder>, such as debian!bookworm")
    if kind == "debian":
        if not location.replace("-", "").isalnum() or not location.islower():
            raise InvalidSourceError(text, f"{location!r} is not the name of a Debian suite")
        return DebianSource(location, folder / "debian", mirrors)
    if kind == "path":
        path = Path(location).expanduser().absolute()
        if not path.exists():
            raise InvalidSourceError(text, f"there is no folder {path}")
        return PathSource(path)
    raise InvalidSourceError(text, f"{kind!r} is not a kind of source: there are debian and path")
