"""A Nix package set in a git repository, `git!<address>!<branch, tag or revision>`.

An image's tag is `latest`, which is the configured reference, or the remote's HEAD; a tag or branch of the
repository, in this order (gitrevisions(7)); or a revision. Tags of images have no `/`, so `feature-x` is also
the branch `feature/x`, if nothing has that name itself and nothing else fits.

Nothing that a client writes comes to git: names are looked up in the list that the remote gave, which is
fetched at its own pace, whatever clients ask for. What isn't a name is the id of a commit, or the beginning
of one that was pinned.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from chandlery.errors import ChandleryError, ReferenceNotFoundError, SourceUnavailableError
from chandlery.image.name import LATEST
from chandlery.machine.token_buckets import TokenBuckets
from chandlery.nix.pinned_source import REVISION_TAG_LENGTH, PinnedSource
from chandlery.oci.documents import Platform
from chandlery.sources.arguments import PinnedArguments, SetArguments
from chandlery.sources.git.address import GitAddress
from chandlery.sources.git.repository import COMMIT, HEAD, GitLimits, GitRepository
from chandlery.sources.negative_cache import MissingReferences
from chandlery.sources.pin_file import PinFile
from chandlery.sources.pins import PinLimits, Pins, Resolved
from chandlery.sources.trees import SourceTrees

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

Answer = TypeVar("Answer")

# What an operator may name: git-check-ref-format(1), or nothing for the remote's HEAD.
REFERENCE = re.compile(r"(?!.*(?:\.\.|@\{|//))(?:[^\x00-\x20\x7f~^:?*\[\\-][^\x00-\x20\x7f~^:?*\[\\]*)?")

_BEGINNING = re.compile(r"[0-9a-f]{7,64}")
_HEADS, _TAGS = "refs/heads/", "refs/tags/"

# Seconds for which what the remote said is good for references that have no pin, or whose pin has expired.
FRESH = 5.0
# How often in a minute it is asked all the same, because something isn't in what it said.
_SECOND_LOOKS = 12


class GitSource:
    """One repository; `reference` is what `latest` means, and `tags` are patterns of what tags may choose."""

    kind = "git"

    def __init__(
        self,
        address: GitAddress,
        reference: str,
        data: Path,
        arguments: SetArguments,
        tags: Sequence[str] | None = None,
        limits: PinLimits | None = None,
        git_limits: GitLimits | None = None,
        fresh: float = FRESH,
    ) -> None:
        self.location = address.location
        self.text = f"git!{address.location}" + (f"!{reference}" if reference else "")
        self._reference = reference or HEAD
        self._tags = tags
        self._arguments = arguments
        self._repository = GitRepository(address, data, self.text, git_limits)
        self._references = _Shared(self._repository.references)
        self._head = _Shared(self._repository.head)
        self._fresh = fresh
        self._second_looks = TokenBuckets(60.0, most_clients=1)
        self._trees = SourceTrees(data, self.text)
        self._pins = Pins(PinFile(data / "pins.json"), self.text, self._resolve, limits)
        # A commit stays what it is.
        for_ever = PinLimits(float("inf"), *((limits.patience, limits.back_off) if limits else ()))
        self._commits = Pins(
            PinFile(data / "commits.json"),
            self.text,
            self._resolve_commit,
            for_ever,
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
        return ()

    async def pin(self, reference: str, platform: Platform) -> PinnedSource:
        """See `PackageSource.pin`."""
        arguments = await self._arguments.pin()
        if reference == LATEST:
            return await self._pin(self._reference, arguments)
        # The tag of a revision always means that revision, whatever branches are called.
        if _BEGINNING.fullmatch(reference) and len(reference) >= REVISION_TAG_LENGTH:
            known = await self._known(reference)
            if known is not None:
                return await self._at(known, arguments)
        if COMMIT.fullmatch(reference):
            self._check(reference, reference)
        try:
            return await self._pin(reference, arguments)
        except ReferenceNotFoundError:
            known = await self._known(reference) if _BEGINNING.fullmatch(reference) else None
            if known is None:
                raise
            return await self._at(known, arguments)

    def chosen_by(self, reference: str, pin: PinnedSource | None = None) -> str:
        """See `PackageSource.chosen_by`: a branch, a tag or a revision, as it is written in the tag."""
        own = reference in (LATEST, self._reference, _as_tag(self._reference))
        return "" if own else f"{self.kind}!{self.location}!{reference}"

    async def at(self, revision: str, platform: Platform) -> PinnedSource | None:
        """See `PackageSource.at`; a revision whose tree was removed is fetched again."""
        if COMMIT.fullmatch(revision) is None:
            return None
        try:
            return await self._at(revision, await self._arguments.pin())
        except (ReferenceNotFoundError, SourceUnavailableError) as error:
            log.info("a revision can't be had", source=self.text, revision=revision, reason=str(error))
            return None

    async def refresh(self, max_age: float) -> None:
        """See `PackageSource.refresh`."""
        always = () if COMMIT.fullmatch(self._reference) else (self._reference,)
        await self._pins.refresh(max_age, always)

    def keep(self, revisions: Sequence[str]) -> None:
        """See `PackageSource.keep`."""
        self._trees.keep(revisions)

    async def close(self) -> None:
        """See `PackageSource.close`."""
        await asyncio.gather(self._pins.close(), self._commits.close())

    async def _pin(self, reference: str, arguments: PinnedArguments) -> PinnedSource:
        if COMMIT.fullmatch(reference):
            return await self._at((await self._commits.get(reference)).revision, arguments)
        pin = await self._pins.get(reference)
        # The operator may have changed what is allowed since it was pinned.
        self._check(reference, pin.details.get("name", ""))
        return await self._at(pin.revision, arguments, pin.details.get("name", ""), pin.stale)

    async def _at(
        self, commit: str, arguments: PinnedArguments, name: str = "", stale: str = ""
    ) -> PinnedSource:
        tree = await self._tree(commit, name)
        return arguments.source(self.kind, self.location, commit, tree, stale)

    async def _tree(self, commit: str, name: str) -> Path:
        tree = self._trees.get(commit)
        if tree is not None:
            return tree
        name = name if name.startswith("refs/") else ""
        return await self._trees.make(commit, lambda target: self._repository.check_out(commit, name, target))

    async def _resolve(self, reference: str) -> Resolved:
        name, commit, as_of = await self._look_up(reference)
        self._check(reference, name)
        try:
            await self._tree(commit, name)
        except ReferenceNotFoundError as error:
            raise SourceUnavailableError(self.text, f"{name} moved while it was fetched") from error
        return Resolved(commit, {"name": name}, as_of)

    async def _resolve_commit(self, commit: str) -> Resolved:
        await self._tree(commit, "")
        return Resolved(commit)

    async def _look_up(self, reference: str) -> tuple[str, str, float]:
        """Find the full name and the commit of a reference, and when the remote said so (since 1970)."""
        if reference == HEAD:
            head, as_of = await self._head.get(self._fresh)
            if head is None:
                raise ReferenceNotFoundError(
                    self.text, reference, "the repository has no HEAD; name a branch"
                )
            return HEAD, head, as_of
        references, as_of = await self._references.get(self._fresh)
        found = self._choose(reference, references)
        # It may have been pushed a moment ago; but not everybody who asks for what isn't there makes us look.
        if found is None and self._second_looks.take("", _SECOND_LOOKS) == 0.0:
            references, as_of = await self._references.get(0.0)
            found = self._choose(reference, references)
        if found is None:
            raise ReferenceNotFoundError(self.text, reference, self._hint())
        return found, references[found], as_of

    def _choose(self, reference: str, references: Mapping[str, str]) -> str | None:
        exact = [
            name for name in (reference, f"{_TAGS}{reference}", f"{_HEADS}{reference}") if name in references
        ]
        if exact:
            return exact[0]
        alike = sorted({_short(name) for name in references if _as_tag(_short(name)) == reference})
        if len(alike) == 1:
            # The same name may be a tag's and a branch's.
            return self._choose(alike[0], references)
        if alike:
            raise ReferenceNotFoundError(
                self.text, reference, f"it may be any of {', '.join(alike)}; name one by its revision"
            )
        return None

    async def _known(self, beginning: str) -> str | None:
        """Return the revision that was pinned once and begins so, if it is only one."""
        found = {await each.revision(beginning) for each in (self._pins, self._commits)} - {None}
        return found.pop() if len(found) == 1 else None

    def _check(self, reference: str, name: str) -> None:
        """Raise `ReferenceNotFoundError` unless the operator allows a reference, by either of its names."""
        if self._tags is None or reference == self._reference:
            return
        if not any(
            fnmatchcase(each, pattern) for pattern in self._tags for each in (reference, _short(name))
        ):
            raise ReferenceNotFoundError(self.text, reference, self._hint())

    def _hint(self) -> str:
        if self._tags is None:
            others = "the branches and tags of the repository, and revisions"
        else:
            others = "".join(f"what is like {pattern}, " for pattern in self._tags)
            others += "and revisions that were pinned once"
        return f"there is {LATEST!r} ({_short(self._reference)}), {others}"


class _Shared(Generic[Answer]):
    """An answer, or a failure, that is good for some seconds, and that many may wait for together."""

    def __init__(self, ask: Callable[[], Awaitable[Answer]]) -> None:
        self._ask = ask
        self._lock = asyncio.Lock()
        self._began = float("-inf")
        self._outcome: Answer | ChandleryError

    async def get(self, max_age: float) -> tuple[Answer, float]:
        """Return one that was asked for at most `max_age` seconds ago, and when that was (since 1970)."""
        asked = time.monotonic()
        async with self._lock:
            if self._began < asked - max_age:
                began = time.monotonic()
                try:
                    self._outcome = await self._ask()
                except ChandleryError as error:
                    self._outcome = error
                self._began = began
            if isinstance(self._outcome, ChandleryError):
                raise self._outcome
            return self._outcome, time.time() - (time.monotonic() - self._began)


def _short(name: str) -> str:
    return name.removeprefix(_TAGS).removeprefix(_HEADS)


def _as_tag(name: str) -> str:
    """Write a name as a tag of an image can be: distribution-spec, "Pulling manifests"."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)
