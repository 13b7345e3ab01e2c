"""From an `ImageRequest` to an image: pin it, see whether it is known, have it built once.

A build belongs to the application, not to the request that started it: the same build never runs twice at
once, and a client that goes away cancels nothing that another one waits for. Whatever is awaited, a pin or a
build, is awaited until one deadline. How an image is made is told in `builds.pipeline`.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog
from cachetools import TTLCache

from chandlery.access.rules import EVERYTHING, Permission
from chandlery.builds.build_queue import TAKEN_OVER, BuildQueue, QueueLimits
from chandlery.builds.evaluations import Evaluations
from chandlery.builds.known_images import KnownImages
from chandlery.builds.limits import BuildLimits
from chandlery.builds.permissions import Permissions, told_to
from chandlery.builds.pipeline import Pipeline
from chandlery.builds.popularity_tables import PopularityTables
from chandlery.builds.recipe import BuildOptions, Recipe
from chandlery.builds.resolver import PackageResolver
from chandlery.builds.stores import Stores
from chandlery.builds.tags import LACKING, TagLists
from chandlery.builds.wanted_collection import WantedCollection
from chandlery.errors import (
    BuildPendingError,
    ChandleryError,
    DownloadError,
    LowDiskError,
    PinPendingError,
    PullDeniedError,
    SourceUnavailableError,
)
from chandlery.image.name import ImageRequest
from chandlery.machine.deadline import NO_DEADLINE, Deadline
from chandlery.machine.free_disk import free_bytes
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    INDEX_MEDIA_TYPE,
    BuiltImage,
    Descriptor,
    ManifestFormat,
    Platform,
    image_index,
    manifests_of,
)
from chandlery.plan.popularity import Popularity
from chandlery.sources.configured import Sources
from chandlery.telemetry.metrics import Metrics

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# An index younger than this (seconds) isn't fetched again because a download failed.
_RETRY_AGE = 60.0

# See `Images.max_age`.
_MAX_AGE = 1.0

# Tags that are known to be remembered, and for how many seconds: collectors forget.
_MOST_NOTED_TAGS, _NOTED = 10_000, 60.0

_NO_TABLE = Popularity()

# How often all platforms are pulled because their source has moved between one and the next.
_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class BuildCapacity:
    """How many layers are packed at once, over all builds, and what the queue and each build may take."""

    packing_processes: int = 2
    queue: QueueLimits = field(default_factory=QueueLimits)
    build: BuildLimits = field(default_factory=BuildLimits)


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a tag names: the manifest or the index in every format, and the pin that it was made at.

    `warnings` are for the person who pulls: why it isn't the newest, or not for every platform. `recipes` are
    those of its images.
    """

    manifests: Mapping[ManifestFormat, Descriptor]
    pin: PinnedSource
    warnings: tuple[str, ...] = ()
    is_index: bool = False
    recipes: tuple[Recipe, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class _PlatformImage:
    """The image of one platform."""

    platform: Platform
    recipe: Recipe
    image: BuiltImage


@dataclass(frozen=True, slots=True)
class _PlatformFailure:
    """Why there is no image of one platform."""

    platform: Platform
    error: ChandleryError

    @property
    def is_lacking(self) -> bool:
        """Whether other platforms may have what this one lacks."""
        return isinstance(self.error, LACKING)

    @property
    def urgency(self) -> int:
        """What a client is told first is lowest: trouble, then a build that goes on, then what lacks."""
        return 2 if self.is_lacking else 1 if isinstance(self.error, BuildPendingError) else 0


class Images:
    """Images of some package sources; enter it to start, leave it to stop what is still being built.

    The data folder gets a log per build, `builds/<id>.log`, the tables that images are planned with
    (`popularity`), and in `tmp`, while a build runs, the links that keep its store paths from Nix's garbage
    collector. `popularity` is the table for package sets that have none of their own.
    """

    def __init__(
        self,
        sources: Sources,
        stores: Stores,
        options: BuildOptions,
        capacity: BuildCapacity,
        metrics: Metrics | None = None,
        popularity: Popularity = _NO_TABLE,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._sources = sources
        self._stores = stores
        self._options = options
        self._limits = capacity.build
        self._collection = WantedCollection(stores.folder)
        self._tables = PopularityTables(stores.folder)
        self._popularity = self._tables.keep(popularity) if popularity else ""
        self._resolver = PackageResolver(stores.nix, stores.index, self._metrics)
        self._permissions = Permissions(self._resolver, sources, stores.index, capacity.queue.running)
        self._known = KnownImages(stores.index, stores.blobs)
        self._pipeline = Pipeline(
            *(stores, self._known, self._resolver, self._permissions, self._tables),
            *(capacity.build, capacity.packing_processes, self._metrics),
        )
        self.queue = BuildQueue(
            capacity.queue, stores.folder / "builds", build=self._pipeline.make, known=self._known.find
        )
        self._evaluations = Evaluations(capacity.queue.running, capacity.queue.admit)
        self._noted_tags: TTLCache[tuple[str, str, str], bool] = TTLCache(_MOST_NOTED_TAGS, _NOTED)
        self._tag_lists = TagLists(
            *(sources, stores.index, self._permissions), recipe=self._recipe_now, evaluate=self._evaluate
        )
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._exit.enter_async_context(self._pipeline)
        await self._exit.enter_async_context(self.queue)
        await self._exit.enter_async_context(self._evaluations)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.aclose()

    async def pull(
        self,
        request: ImageRequest,
        client: str = "",
        deadline: Deadline = NO_DEADLINE,
        *,
        index: bool = False,
        permission: Permission = EVERYTHING,
    ) -> Pulled:
        """Return what a tag names, building what isn't known: an image, or an index for every platform.

        An index is returned only if `index` allows it, for a name that chooses no platform, where there are
        several. `client` is for fairness, and what its `permission` refuses isn't built for it. Raises any
        `ChandleryError`; at the deadline it is `BuildPendingError`, and the build goes on.
        """
        if request.any_platform:
            platforms = self._sources.platforms(request.source)
            if index and len(platforms) > 1:
                return await self._pull_index(request, platforms, client, deadline, permission)
            if request.platform not in platforms:
                request = replace(request, platform=platforms[0])
        found = await self._platform_image(request, client, deadline, permission)
        pin = found.recipe.pin
        warnings = (pin.stale,) if pin.stale else ()
        return Pulled(found.image.manifests, pin, warnings, recipes=(found.recipe,))

    async def image(self, request: ImageRequest) -> BuiltImage:
        """Return the image of a request, for its platform; see `pull`."""
        return (await self._platform_image(request, "", NO_DEADLINE, EVERYTHING)).image

    async def is_current(self, pulled: Pulled, *, whole: bool) -> bool:
        """Return whether `pull` would return the same now; the sources are asked, and nothing is built.

        With `whole` it is also made sure that all blobs are there, and noted that the images are in use. What
        goes within `max_age` of that is missed, and made again when a client comes for it.
        """
        for recipe in pulled.recipes:
            request, before = recipe.request, recipe.pin
            pin = await self._sources.of(request.source).pin(request.reference, request.platform)
            if (pin, pin.stale) != (before, before.stale):
                return False
        if not whole:
            return True
        for recipe in pulled.recipes:
            if await self._known.find(recipe.key) is None:
                return False
            self._metrics.looked_up("image", hits=1)
        listed = pulled.manifests.values() if pulled.is_index else ()
        return all([await self._known.has(each) for each in listed])

    @property
    def max_age(self) -> float:
        """For how many seconds an image that was whole is taken to be so, when it is only described.

        It is never longer than between two notes of its use, of which a collector waits for many (see
        `garbage_collector.use_interval`): so no image that is described looks unused.
        """
        return min(_MAX_AGE, self._stores.index.use_interval)

    async def is_known(self, key: str) -> bool:
        """Return whether the image of a recipe's key is kept and whole; then it is in use."""
        return await self._known.find(key) is not None

    async def remake(self, recipe: Recipe, client: str = "", deadline: Deadline = NO_DEADLINE) -> BuiltImage:
        """Return the image of a recipe that was recorded, building it if it isn't whole; see `pull`.

        A revision that the source has no longer can't be evaluated (`RevisionGoneError`), but what was
        resolved at it may still be remembered, and then the image can be made all the same. So can one whose
        source isn't configured here. Nothing is made up: an image made by other versions of what reaches its
        bytes has other digests.
        """
        known = await self._known.find(recipe.key)
        if known is not None:
            return known
        async with _pending(recipe.request.name, recipe.pin.public_location, deadline):
            pin = await self._sources.at(recipe.pin, recipe.request.platform)
        if pin is None:
            pin = replace(recipe.pin, nix=None)
            log.info("a revision is gone", source=pin.location, revision=pin.revision)
        return await self._carried_out(replace(recipe, pin=pin), client, deadline, EVERYTHING)

    async def take_over(self) -> None:
        """Go on with the builds that an earlier server of this data folder didn't end."""
        for recipe in await self.queue.take_over():
            log.info("a build is taken over", image=recipe.title)
            # The build goes on without us; whoever wants the image joins it, or finds it made.
            with suppress(ChandleryError):
                await self.remake(recipe, TAKEN_OVER, Deadline.after(0.0))

    async def tags(
        self,
        request: ImageRequest,
        client: str = "",
        deadline: Deadline = NO_DEADLINE,
        permission: Permission = EVERYTHING,
    ) -> Sequence[str]:
        """Return the tags by which an image can be pulled with the permission, see `TagLists`.

        What has to be evaluated for that counts for the `client` like a build; see `pull`. Raises
        `PackagesNotFoundError` when it can't have any, and `PullDeniedError`.
        """
        return await self._tag_lists.tags(request, client, deadline, permission)

    async def needs(self, request: ImageRequest, digest: Digest, permission: Permission = EVERYTHING) -> bool:
        """Return whether an image of this name was made that needs a blob, at whatever revision.

        It is one that may be pulled with the permission; where all may be, OCI indexes are for all names.
        """
        index = self._stores.index
        if not permission.rule.restricts:
            return await index.needs(request.name, digest)
        listed = await index.image_index(digest)
        for each in (digest,) if listed is None else manifests_of(listed):
            for tag, recipe in await index.tagged(request.name, each):
                if await self._permissions.permits(permission, request, tag, recipe, evaluate=True):
                    return True
        return False

    async def _pull_index(
        self,
        request: ImageRequest,
        platforms: Sequence[Platform],
        client: str,
        deadline: Deadline,
        permission: Permission,
    ) -> Pulled:
        """Build the images of all platforms, and list those in an index whose packages there are."""
        results = await self._at_one_revision(request, platforms, client, deadline, permission)
        found = [each for each in results if isinstance(each, _PlatformImage)]
        failures = [each for each in results if isinstance(each, _PlatformFailure)]
        if not found or not all(each.is_lacking for each in failures):
            raise min(failures, key=lambda each: each.urgency).error
        for each in failures:
            log.info(
                "a platform is left out",
                image=request.name,
                platform=str(each.platform),
                why=str(each.error),
            )
        manifests = {each: await self._put_index(each, found) for each in ManifestFormat}
        warnings = [
            (result.recipe.pin.stale if isinstance(result, _PlatformImage) else _left_out(result))
            for result in results
        ]
        return Pulled(
            manifests,
            found[0].recipe.pin,
            tuple(dict.fromkeys(filter(None, warnings))),
            is_index=True,
            recipes=tuple(each.recipe for each in found),
        )

    async def _at_one_revision(
        self,
        request: ImageRequest,
        platforms: Sequence[Platform],
        client: str,
        deadline: Deadline,
        permission: Permission,
    ) -> Sequence["_PlatformImage | _PlatformFailure"]:
        """Build the images of all platforms; once more if their source moved in between."""

        async def of_platform(platform: Platform) -> _PlatformImage | _PlatformFailure:
            try:
                return await self._platform_image(
                    replace(request, platform=platform), client, deadline, permission
                )
            except ChandleryError as error:
                return _PlatformFailure(platform, error)

        for _ in range(_ATTEMPTS):
            results = await asyncio.gather(*map(of_platform, platforms))
            pins = [each.recipe.pin for each in results if isinstance(each, _PlatformImage)]
            if len(set(pins)) <= 1:
                return results
        if any(pin.stale for pin in pins):
            # A Debian mirror that can't be asked: version 0.1 had kept a revision for each platform.
            return results
        source = self._sources.of(request.source).text
        raise SourceUnavailableError(source, "it has moved each time that its platforms were pulled")

    async def _put_index(
        self, manifest_format: ManifestFormat, found: Sequence[_PlatformImage]
    ) -> Descriptor:
        """Put an index of images into the blob store, and remember it, unless it is there."""
        listed = [(each.platform, each.image.manifests[manifest_format]) for each in found]
        content = image_index(manifest_format, listed)
        media_type = INDEX_MEDIA_TYPE[manifest_format]
        descriptor = Descriptor(media_type, Digest.of(content), len(content))
        if not await self._known.has(descriptor):
            await self._stores.index.remember_image_index(content)
            await self._stores.blobs.put_bytes(content, media_type)
        return descriptor

    async def _platform_image(
        self, request: ImageRequest, client: str, deadline: Deadline, permission: Permission
    ) -> _PlatformImage:
        """Return the image of one platform at what its source is pinned to now."""
        source = self._sources.of(request.source)
        recipe = await self._recipe_now(request, deadline, permission)
        try:
            image = await self._carried_out(recipe, client, deadline, permission)
        except DownloadError:
            # A mirror drops what a newer index has replaced, so see whether there is one.
            async with _pending(request.name, source.text, deadline):
                await source.refresh(_RETRY_AGE)
            newer = await self._recipe_now(request, deadline, permission)
            if newer.pin == recipe.pin:
                raise
            recipe = newer
            image = await self._carried_out(recipe, client, deadline, permission)
        return _PlatformImage(request.platform, recipe, image)

    async def _recipe_now(
        self, request: ImageRequest, deadline: Deadline, permission: Permission = EVERYTHING
    ) -> Recipe:
        """Return what an image is made from at what its tag means now, if that may be chosen."""
        source = self._sources.of(request.source)
        await self._permissions.check_tag(permission, request)
        async with _pending(request.name, source.text, deadline):
            pin = await source.pin(request.reference, request.platform)
            await self._permissions.check_tag(permission, request, pin)
        return await self._recipe(pin, request)

    async def _evaluate(
        self, recipe: Recipe, client: str, deadline: Deadline, permission: Permission
    ) -> None:
        """See that the packages of a recipe can be resolved, and may be pulled; see `pull`."""
        request = recipe.request
        asked = recipe.pin, request.platform.nix_system, request.all_packages
        with told_to(permission, request):
            if not await self._resolver.remembers(*asked):
                evaluate = partial(self._resolver.resolve, *asked)
                await self._evaluations.wait(asked, evaluate, request.name, client, deadline)
            await self._permissions.check(permission, recipe.pin, request)

    async def _recipe(self, pin: PinnedSource, request: ImageRequest) -> Recipe:
        """Return what an image is made from; where the package set has no table, it is the operator's."""
        popularity = self._popularity
        if pin.popularity:
            try:
                popularity = await asyncio.to_thread(self._tables.keep_file, Path(pin.popularity))
            except (OSError, ValueError) as error:
                # It costs bytes of downloads, and no pull.
                log.warning("a table of popularity can't be read", file=pin.popularity, error=str(error))
        return Recipe(pin, request, self._options, popularity)

    async def _carried_out(
        self, recipe: Recipe, client: str, deadline: Deadline, permission: Permission
    ) -> BuiltImage:
        """Return the image of a recipe, which is known, or built."""
        known = await self._known.find(recipe.key)
        self._metrics.looked_up("image", hits=int(known is not None), misses=int(known is None))
        with told_to(permission, recipe.request):
            image = known or await self._built(recipe, client, deadline, permission)
            if permission is not EVERYTHING:
                await self._permissions.check(permission, recipe.pin, recipe.request)
                await self._note_tag(recipe)
        return image

    async def _built(
        self, recipe: Recipe, client: str, deadline: Deadline, permission: Permission
    ) -> BuiltImage:
        """Have an image built; how that fails is told to a client only if it may have the image."""
        self._check(recipe.request)
        while True:
            try:
                return await self.queue.wait(recipe, client, deadline, permission)
            except PullDeniedError as error:
                if error.user == permission.user:
                    raise
                # It was another client's build, which this one joined too late.
                await self._permissions.check(permission, recipe.pin, recipe.request)
            except ChandleryError:
                await self._permissions.check_remembered(permission, recipe.pin, recipe.request)
                raise

    async def _note_tag(self, recipe: Recipe) -> None:
        """Remember the name and the tag of an image that may have been made for others; once is enough."""
        noted = (recipe.key, recipe.request.name, recipe.request.reference)
        if noted not in self._noted_tags:
            await self._stores.index.remember_tag(recipe)
            self._noted_tags[noted] = True

    def _check(self, request: ImageRequest) -> None:
        """Raise `BuildTooLargeError` or `LowDiskError` if a build shouldn't begin."""
        folder = self._stores.folder
        self._limits.check_packages(request.name, len(request.packages))
        try:
            self._limits.check_free(str(folder), free_bytes(folder))
        except LowDiskError:
            self._collection.want()
            raise


def _left_out(failure: _PlatformFailure) -> str:
    return f"there is no image for {failure.platform}: {failure.error}"


@asynccontextmanager
async def _pending(image: str, source: str, deadline: Deadline) -> AsyncIterator[None]:
    """Wait for a package source no longer than for a build; it goes on looking, for who comes next."""
    try:
        async with asyncio.timeout(deadline.left):
            yield
    except TimeoutError as error:
        raise PinPendingError(image, source) from error
