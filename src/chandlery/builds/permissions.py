"""What access rules say of what names turn out to be: a denied package has more names than one.

`deny` is compared with all that a package is called at a pin, before anything is built for a client, and
before a known image is given to it. At a pin that never changes. So it is found out once: the names are
remembered with the resolutions, in the build index, and what follows for a rule in memory. Decision 13 says
why (docs/decisions/0013-deny-is-about-what-a-name-turns-out-to-be.md).
"""

import asyncio
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

import structlog
from cachetools import LRUCache

from chandlery.access.rules import EVERYTHING, Permission
from chandlery.builds.index import ImageRecords
from chandlery.builds.recipe import Recipe
from chandlery.builds.resolver import PackageResolver
from chandlery.errors import (
    ChandleryError,
    EvaluationError,
    PackagesNotFoundError,
    PullDeniedError,
    RevisionGoneError,
)
from chandlery.image.name import LATEST, ImageRequest
from chandlery.nix.nix import Resolution
from chandlery.nix.pinned_source import PinnedSource
from chandlery.sources.configured import Sources

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# What may be the tag of a revision.
_REVISION = re.compile(r"[0-9a-f]{7,64}")

_MOST_VERDICTS = 20_000


class Permissions:
    """Compares rules with what packages are, and with the sources that tags choose.

    Of what isn't remembered, and isn't being built, no more than `evaluations` run at once.
    """

    def __init__(
        self, resolver: PackageResolver, sources: Sources, index: ImageRecords, evaluations: int
    ) -> None:
        self._resolver = resolver
        self._sources = sources
        self._index = index
        self._evaluating = asyncio.Semaphore(evaluations)
        self._verdicts: LRUCache[tuple[object, ...], tuple[str, ...]] = LRUCache(_MOST_VERDICTS)

    async def check(self, permission: Permission, pin: PinnedSource, request: ImageRequest) -> None:
        """Raise `PullDeniedError` if a client may not have what an image is made of.

        Raises what evaluation raises, and `RevisionGoneError` if the package set isn't there for one.
        """
        if not await self.check_remembered(permission, pin, request):
            async with self._evaluating:
                permission.refuse(await self._verdict(permission, pin, request))

    async def check_remembered(
        self, permission: Permission, pin: PinnedSource, request: ImageRequest
    ) -> bool:
        """Do the same without an evaluation; return whether all that it takes is remembered."""
        with suppress(RevisionGoneError):
            # What isn't remembered can't be evaluated without the package set.
            permission.refuse(await self._verdict(permission, replace(pin, nix=None), request))
            return True
        return False

    async def require_one(
        self, permissions: Collection[Permission], pin: PinnedSource, request: ImageRequest
    ) -> None:
        """Raise `PullDeniedError` unless one of the clients that wait for an image may have it."""
        refusals: dict[Permission, PullDeniedError] = {}
        # Others may come to wait meanwhile.
        while left := set(permissions) - refusals.keys():
            permission = left.pop()
            try:
                await self.check(permission, pin, request)
            except PullDeniedError as error:
                refusals[permission] = error
            else:
                return
        for refusal in refusals.values():
            raise refusal

    async def permits(
        self,
        permission: Permission,
        request: ImageRequest,
        tag: str,
        recipe: Recipe,
        *,
        evaluate: bool = False,
    ) -> bool:
        """Return whether an image may be pulled that was made for a tag; if that isn't known, it may not."""
        if not permission.allows_tag(self._sources.of(request.source).chosen_by(tag, recipe.pin)):
            return False
        try:
            if await self.check_remembered(permission, recipe.pin, recipe.request):
                return True
            if evaluate:
                pin = await self._sources.at(recipe.pin, recipe.request.platform)
                await self.check(permission, pin or replace(recipe.pin, nix=None), recipe.request)
        except PullDeniedError:
            return False
        except ChandleryError as error:
            log.info("it isn't known whether an image is denied", image=recipe.title, reason=str(error))
            return False
        return evaluate

    async def check_tag(
        self, permission: Permission, request: ImageRequest, pin: PinnedSource | None = None
    ) -> None:
        """Raise `PullDeniedError` if a tag chooses a package source that a client may not pull from.

        Without the pin that it gives, a tag that may be a revision's is let pass.
        """
        tag, source = request.reference, self._sources.of(request.source)
        if tag == LATEST or permission is EVERYTHING or (pin is None and _REVISION.fullmatch(tag)):
            return
        if permission.allows_tag(source.chosen_by(tag, pin)):
            return
        # The tag of a revision is as good as the tag that has led to it.
        if pin is not None and _REVISION.fullmatch(tag):
            if pin == await source.pin(LATEST, request.platform):
                return
            for other, recipe in await self._index.tagged(request.name):
                if recipe.pin == pin and permission.allows_tag(source.chosen_by(other, pin)):
                    return
        permission.refuse((f"the tag {tag}",))

    async def _verdict(
        self, permission: Permission, pin: PinnedSource, request: ImageRequest
    ) -> tuple[str, ...]:
        """Return what of a request is denied, as the client knows it."""
        if not permission.rule.deny:
            return ()
        asked = tuple(dict.fromkeys([*request.packages, *request.profile.packages]))
        key = (pin.key_parts, request.platform, request.profiles, asked, permission.rule.deny)
        verdict = self._verdicts.get(key)
        if verdict is None:
            denied = await self._denied(permission, pin, request, asked)
            added = denied.difference(request.packages)
            verdict = tuple(path for path in request.packages if path in denied)
            verdict += (f"what {'/'.join(request.profiles)} adds",) if added else ()
            self._verdicts[key] = verdict
        return verdict

    async def _denied(
        self, permission: Permission, pin: PinnedSource, request: ImageRequest, asked: Collection[str]
    ) -> set[str]:
        """Return those of the attribute paths that a request asks for that lead to what is denied."""
        rule, system = permission.rule, request.platform.nix_system
        found = await self._named(pin, system, asked)
        denied = {path for path, package in found.items() if rule.denies(package.names)}
        others = {
            other
            for path, package in found.items()
            if path not in denied
            for other in rule.denied_paths(package.path, package.other_names or (), package.place)
        }
        if not others:
            return denied
        try:
            derivations = await self._resolver.derivations(pin, system, sorted(others), sound=min(found))
        except EvaluationError as error:
            # Not that it is denied: a client may have found what takes all the time there is.
            log.warning("denied packages can't be evaluated", source=pin.text, reason=str(error))
            raise PullDeniedError(permission.user, (*request.profiles, *request.packages)) from error
        same = set(derivations.values())
        return denied | {path for path, package in found.items() if package.derivation in same}

    async def _named(
        self, pin: PinnedSource, system: str, asked: Collection[str]
    ) -> Mapping[str, Resolution]:
        """Resolve attribute paths; what an older version remembered has no names, and is evaluated again."""
        known = await self._resolver.known(pin, system, list(asked))
        named = {path: each for path, each in known.items() if each.other_names is not None}
        unknown = [path for path in asked if path not in named]
        if unknown:
            named |= await self._resolver.resolve(pin, system, unknown, remembered=False)
        return named


@contextmanager
def told_to(permission: Permission, request: ImageRequest) -> Iterator[None]:
    """Let an error say no more than a client may know of a package set."""
    try:
        yield
    except EvaluationError as error:
        refused = [each for each in request.packages if not permission.rule.may_name(each)]
        if refused:
            raise PullDeniedError(permission.user, refused) from error
        raise
    except PackagesNotFoundError as error:
        raise error.suggesting(permission.rule.may_name) from error
