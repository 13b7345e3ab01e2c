"""Which tags of an image name can be pulled, each for the very platforms that `latest` has.

They are `latest`, the tag of its revision, and of the tags that the name was pulled by before those whose
images are kept, as the tags mean them now: for any other something would have to be built, which may fail, or
give an image for one more platform. So a branch that has moved is listed again once it was pulled again.

Clients that copy a repository pull all that is listed, and stop at the first tag that can't be had or lacks a
platform (`skopeo sync`, `crane copy --all-tags`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from chandlery.access.rules import Permission
from chandlery.builds.index import ImageRecords
from chandlery.builds.permissions import Permissions
from chandlery.builds.recipe import Recipe
from chandlery.errors import (
    BuildError,
    BuildTooLargeError,
    ChandleryError,
    EvaluationError,
    NotFoundError,
    UnsupportedEntryError,
)
from chandlery.image.name import LATEST, ImageRequest
from chandlery.machine.deadline import Deadline
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, ManifestFormat, Platform, image_index
from chandlery.sources.configured import Sources

# What a platform lacks that other platforms may have: it is left out of an index then.
LACKING = (NotFoundError, EvaluationError, BuildError, BuildTooLargeError, UnsupportedEntryError)


class _Tagged(NamedTuple):
    """What a tag means for one platform, and the image of it, if that is kept."""

    recipe: Recipe
    image: BuiltImage | None


class TagLists:
    """Lists the tags of image names.

    `recipe` tells what the image of a request is made from now; `evaluate` raises what keeps its packages
    from being resolved, or a client from having them, until a deadline.
    """

    def __init__(
        self,
        sources: Sources,
        index: ImageRecords,
        permissions: Permissions,
        *,
        recipe: Callable[[ImageRequest, Deadline], Awaitable[Recipe]],
        evaluate: Callable[[Recipe, str, Deadline, Permission], Awaitable[None]],
    ) -> None:
        self._sources = sources
        self._index = index
        self._permissions = permissions
        self._recipe = recipe
        self._evaluate = evaluate

    async def tags(
        self, request: ImageRequest, client: str, deadline: Deadline, permission: Permission
    ) -> Sequence[str]:
        """Return the tags of an image that may be pulled with the permission, sorted.

        Raises why no platform has it, as `PackagesNotFoundError`; `PullDeniedError`; and at the deadline
        `BuildPendingError`.
        """
        request = replace(request, reference=LATEST)
        platforms = self._platforms(request)
        latest = await self._latest(request, platforms, client, deadline, permission)
        # Only what version 0.1 kept has several.
        revisions = {each.recipe.pin.tag for each in latest.values()}
        listed = {LATEST, *(revisions if len(revisions) == 1 else ())}
        has = list(latest)

        async def is_listed(tag: str) -> bool:
            images = await self._kept(replace(request, reference=tag), has, deadline, permission)
            return len(images) == len(has) and (
                len(has) == len(platforms) or await self._was_given_out(images)
            )

        others = sorted(await self._asked_for(request, permission) - listed)
        are_listed = await asyncio.gather(*map(is_listed, others))
        return sorted(listed.union(tag for tag, is_one in zip(others, are_listed, strict=True) if is_one))

    async def _asked_for(self, request: ImageRequest, permission: Permission) -> set[str]:
        """Return the tags that a name was built with, of those that may be chosen with the permission."""
        if not permission.rule.restricts:
            return set(await self._index.tags(request.name))
        found = set()
        for tag, recipe in await self._index.tagged(request.name):
            if await self._permissions.permits(permission, request, tag, recipe):
                found |= {tag, recipe.pin.tag}
        return found

    def _platforms(self, request: ImageRequest) -> Sequence[Platform]:
        return self._sources.platforms(request.source) if request.any_platform else (request.platform,)

    async def _latest(
        self,
        request: ImageRequest,
        platforms: Sequence[Platform],
        client: str,
        deadline: Deadline,
        permission: Permission,
    ) -> Mapping[Platform, _Tagged]:
        """Return what `latest` means for the platforms for which it can be pulled."""
        latest: dict[Platform, _Tagged] = {}
        lacking: list[ChandleryError] = []
        for platform in platforms:
            try:
                latest[platform] = await self._tagged(replace(request, platform=platform), deadline)
            except LACKING as error:
                lacking.append(error)
        images = {platform: each.image for platform, each in latest.items() if each.image}
        if await self._was_given_out(images):
            latest = {platform: latest[platform] for platform in images}
        for platform, tagged in tuple(latest.items()):
            try:
                await self._evaluate(tagged.recipe, client, deadline, permission)
            except LACKING as error:
                lacking.append(error)
                del latest[platform]
        if not latest:
            raise lacking[0]
        return latest

    async def _kept(
        self,
        request: ImageRequest,
        platforms: Sequence[Platform],
        deadline: Deadline,
        permission: Permission,
    ) -> Mapping[Platform, BuiltImage]:
        """Return the images of a tag that are kept and may be pulled."""
        images = {}
        for platform in platforms:
            with suppress(ChandleryError):
                recipe, image = await self._tagged(replace(request, platform=platform), deadline)
                if image and await self._permissions.check_remembered(permission, recipe.pin, recipe.request):
                    images[platform] = image
        return images

    async def _tagged(self, request: ImageRequest, deadline: Deadline) -> _Tagged:
        recipe = await self._recipe(request, deadline)
        return _Tagged(recipe, await self._index.image(recipe.key))

    async def _was_given_out(self, images: Mapping[Platform, BuiltImage]) -> bool:
        """Return whether there was an index of just these images, so that the other platforms lack it."""
        listed = [(each, image.manifests[ManifestFormat.OCI]) for each, image in images.items()]
        content = image_index(ManifestFormat.OCI, listed)
        return await self._index.image_index(Digest.of(content)) is not None
