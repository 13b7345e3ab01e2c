"""From an `ImageRequest` to an image: pin it, see whether it is known, build it once, remember it.

A build belongs to the application, not to the request that started it: the same build never runs twice at
once, and a client that goes away cancels nothing that another one waits for. What a build has made is
remembered only after every blob of it is durable, and with it what it was made from, so that it can be made
again. How an image is made is told in `builds.pipeline`.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from chandlery.builds.build import Build
from chandlery.builds.build_queue import TAKEN_OVER, BuildQueue, QueueLimits
from chandlery.builds.index import BuildIndex
from chandlery.builds.pipeline import BuildLimits, ImageMaker, Job
from chandlery.builds.popularity_tables import PopularityTables
from chandlery.builds.recipe import BuildOptions, ImageOrigin
from chandlery.builds.unfinished import UnfinishedBuilds
from chandlery.errors import (
    BuildError,
    BuildPendingError,
    BuildTooLargeError,
    ChandleryError,
    DownloadError,
    EvaluationError,
    NotFoundError,
    PinPendingError,
    UnsupportedEntryError,
)
from chandlery.image.name import LATEST, ImageRequest
from chandlery.machine.temporary_folder import TemporaryFolder
from chandlery.nix.nix import Nix
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    INDEX_MEDIA_TYPE,
    BuiltImage,
    Descriptor,
    ManifestFormat,
    Platform,
    image_index,
)
from chandlery.plan.popularity import Popularity
from chandlery.sources.configured import Sources
from chandlery.storage.blob_store import BlobStore
from chandlery.storage.leases import Leases
from chandlery.telemetry.metrics import Metrics

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# An index younger than this (seconds) isn't fetched again because a download failed.
_RETRY_AGE = 60.0

# See `ImageBuilder.moment`.
_MOMENT = 1.0

_NO_TABLE = Popularity()


@dataclass(frozen=True, slots=True)
class BuildCapacity:
    """How many layers are packed at once, over all builds, and what the queue and each build may take."""

    packing_processes: int = 2
    queue: QueueLimits = field(default_factory=QueueLimits)
    build: BuildLimits = field(default_factory=BuildLimits)


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a tag names: the manifest or the index in every format, and the pin that it was made at.

    `warnings` are for the person who pulls: why it isn't the newest, or not for every platform. `origins` are
    those of its images.
    """

    manifests: Mapping[ManifestFormat, Descriptor]
    pin: PinnedSource
    warnings: tuple[str, ...] = ()
    is_index: bool = False
    origins: tuple[ImageOrigin, ...] = field(default=(), compare=False)


# What a platform lacks that other platforms may have: it is left out of an index then.
_LACKING = (NotFoundError, EvaluationError, BuildError, BuildTooLargeError, UnsupportedEntryError)


def _most_urgent(errors: Sequence[BaseException]) -> BaseException:
    """Choose of what went wrong: a mistake before trouble, and that before a build and what lacks."""

    def urgency(error: BaseException) -> int:
        if not isinstance(error, ChandleryError):
            return 0
        return 3 if isinstance(error, _LACKING) else 2 if isinstance(error, BuildPendingError) else 1

    return min(errors, key=urgency)


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


@asynccontextmanager
async def _pending(image: str, source: str, timeout: float | None) -> AsyncIterator[None]:
    """Wait for a package source no longer than for a build; it goes on looking, for who comes next."""
    try:
        async with asyncio.timeout(timeout):
            yield
    except TimeoutError as error:
        raise PinPendingError(image, source) from error


class ImageBuilder:
    """Builds images of some package sources; enter it to start, leave it to stop what is still being built.

    `folder` gets a log per build, `builds/<id>.log`, the tables that images are planned with (`popularity`),
    and in `tmp`, while a build runs, the links that keep its store paths from Nix's garbage collector.
    `popularity` is the table for package sets that have none of their own.
    """

    def __init__(
        self,
        sources: Sources,
        nix: Nix,
        blobs: BlobStore,
        index: BuildIndex,
        leases: Leases,
        folder: Path,
        options: BuildOptions,
        capacity: BuildCapacity,
        metrics: Metrics | None = None,
        popularity: Popularity = _NO_TABLE,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._sources = sources
        self._blobs = blobs
        self._index = index
        self._leases = leases
        self._options = options
        self._folder = folder
        self._limits = capacity.build
        self._tables = PopularityTables(folder)
        self._popularity = self._tables.keep(popularity) if popularity else ""
        self._maker = ImageMaker(
            nix, blobs, index, self._tables, capacity.build, capacity.packing_processes, self._metrics
        )
        # Listing tags evaluates, too, and nobody queues for it.
        self._listing = asyncio.Semaphore(capacity.queue.running)
        self._exit = AsyncExitStack()
        self.queue = BuildQueue(capacity.queue, folder / "builds")
        self._unfinished = UnfinishedBuilds(folder / "builds", self.queue.claims)

    async def __aenter__(self) -> Self:
        self._temporary = self._exit.enter_context(TemporaryFolder(self._folder / "tmp"))
        await self._exit.enter_async_context(self._maker.packers)
        await self._exit.enter_async_context(self.queue)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.aclose()

    async def image(
        self, request: ImageRequest, client: str = "", timeout: float | None = None
    ) -> BuiltImage:
        """Give the image of a request, for its platform; see `pull`."""
        image, _ = await self._pinned_image(request, client, timeout)
        return image

    async def pull(
        self, request: ImageRequest, client: str = "", timeout: float | None = None, *, index: bool = False
    ) -> Pulled:
        """Give what a tag names, building what isn't known: an image, or with `index` one for every platform.

        An index is given only for a name that chooses no platform, where there are several. `client` is who
        asks, for fairness. Raises any `ChandleryError`; after `timeout` seconds it is `BuildPendingError`,
        and the build goes on.
        """
        if request.any_platform:
            platforms = self._sources.platforms(request.source)
            if index and len(platforms) > 1:
                return await self._pull_index(request, platforms, client, timeout)
            if request.platform not in platforms:
                request = replace(request, platform=platforms[0])
        image, origin = await self._pinned_image(request, client, timeout)
        pin = origin.pin
        return Pulled(image.manifests, pin, (pin.stale,) if pin.stale else (), origins=(origin,))

    async def is_current(self, pulled: Pulled, *, whole: bool) -> bool:
        """Tell whether `pull` would give the same now; the sources are asked, and nothing is built.

        With `whole` it is also made sure that all blobs are there, and noted that the images are in use. What
        goes within `moment` of that is missed, and made again when a client comes for it.
        """
        for origin in pulled.origins:
            request, before = origin.request, origin.pin
            pin = await self._sources.of(request.source).pin(request.reference, request.platform)
            if (pin, pin.stale) != (before, before.stale):
                return False
        if not whole:
            return True
        for origin in pulled.origins:
            if await self.known(origin.key) is None:
                return False
            self._metrics.looked_up("image", hits=1)
        listed = pulled.manifests.values() if pulled.is_index else ()
        return all([await self._maker.has(each) for each in listed])

    @property
    def moment(self) -> float:
        """For how many seconds an image that was whole is taken to be so, when it is only described.

        It is never longer than between two notes of its use, of which a collector waits for many (see
        `garbage_collector.use_interval`): so no image that is described looks unused.
        """
        return min(_MOMENT, self._index.use_interval)

    async def _pull_index(
        self, request: ImageRequest, platforms: Sequence[Platform], client: str, timeout: float | None
    ) -> Pulled:
        """Build the images of all platforms, and list those in an index whose packages there are."""
        results = await asyncio.gather(
            *(
                self._pinned_image(replace(request, platform=platform), client, timeout)
                for platform in platforms
            ),
            return_exceptions=True,
        )
        images: list[tuple[Platform, BuiltImage]] = []
        origins: list[ImageOrigin] = []
        warnings: list[str] = []
        errors = [result for result in results if isinstance(result, BaseException)]
        for platform, result in zip(platforms, results, strict=True):
            if not isinstance(result, BaseException):
                image, origin = result
                images.append((platform, image))
                origins.append(origin)
                warnings += [origin.pin.stale] if origin.pin.stale else []
            elif not isinstance(result, _LACKING) or len(errors) == len(results):
                raise _most_urgent(errors)
            else:
                log.info(
                    "a platform is left out", image=request.name, platform=str(platform), why=str(result)
                )
                warnings.append(f"there is no image for {platform}: {result}")
        manifests = {}
        for each in ManifestFormat:
            content = image_index(each, [(platform, image.manifests[each]) for platform, image in images])
            manifests[each] = Descriptor(INDEX_MEDIA_TYPE[each], Digest.of(content), len(content))
            if not await self._maker.has(manifests[each]):
                await asyncio.to_thread(self._index.remember_image_index, content)
                await self._blobs.put_bytes(content, INDEX_MEDIA_TYPE[each])
        told = tuple(dict.fromkeys(warnings))
        return Pulled(manifests, origins[0].pin, told, is_index=True, origins=tuple(origins))

    async def _pinned_image(
        self, request: ImageRequest, client: str, timeout: float | None
    ) -> tuple[BuiltImage, ImageOrigin]:
        deadline = _deadline(timeout)
        source = self._sources.of(request.source)
        async with _pending(request.name, source.text, timeout):
            pin = await source.pin(request.reference, request.platform)
        origin = await self._origin(pin, request)
        try:
            return await self._image_of(origin, client, deadline), origin
        except DownloadError:
            # A mirror drops what a newer index has replaced, so see whether there is one.
            async with _pending(request.name, source.text, _left(deadline)):
                await source.refresh(_RETRY_AGE)
                newer = await source.pin(request.reference, request.platform)
            if newer == pin:
                raise
            origin = await self._origin(newer, request)
            return await self._image_of(origin, client, deadline), origin

    async def remake(self, origin: ImageOrigin, client: str = "", timeout: float | None = None) -> BuiltImage:
        """Give the image of an origin that was recorded, building it if it isn't whole; see `image`.

        A revision that the source has no longer can't be evaluated (`RevisionGoneError`), but what was
        resolved at it may still be remembered, and then the image can be made all the same. So can one whose
        source isn't this builder's. Nothing is made up: an image made by other versions of what reaches its
        bytes has other digests.
        """
        deadline = _deadline(timeout)
        known = await self.known(origin.key)
        if known is not None:
            return known
        async with _pending(origin.request.name, origin.pin.public_location, timeout):
            pin = await self._sources.at(origin.pin, origin.request.platform)
        if pin is None:
            pin = replace(origin.pin, nix=None)
            log.info("a revision is gone", source=pin.location, revision=pin.revision)
        return await self._image_of(replace(origin, pin=pin), client, deadline)

    async def take_over(self) -> None:
        """Go on with the builds that an earlier server of this data folder didn't end."""
        for origin in self._unfinished.take_over():
            log.info("a build is taken over", image=origin.title)
            # The build goes on without us; whoever wants the image joins it, or finds it made.
            with suppress(ChandleryError):
                await self.remake(origin, client=TAKEN_OVER, timeout=0.0)

    async def tags(self, request: ImageRequest) -> Sequence[str]:
        """Give the tags that an image has; `PackagesNotFoundError` when it can't have any."""
        pin = await self._sources.of(request.source).pin(LATEST, request.platform)
        async with self._listing:
            await self._maker.resolve(ImageOrigin(pin, request, self._options))
        return sorted({LATEST, pin.tag, *self._index.tags(request.name)})

    async def needs(self, request: ImageRequest, digest: Digest) -> bool:
        """Tell whether an image of this name was made that needs a blob, at whatever revision."""
        return await asyncio.to_thread(self._index.needs, request.name, digest)

    async def _origin(self, pin: PinnedSource, request: ImageRequest) -> ImageOrigin:
        """Say what an image is made from; where the package set has no table, it is the operator's."""
        popularity = self._popularity
        if pin.popularity:
            try:
                popularity = await asyncio.to_thread(self._tables.keep_file, Path(pin.popularity))
            except (OSError, ValueError) as error:
                # It costs bytes of downloads, and no pull.
                log.warning("a table of popularity can't be read", file=pin.popularity, error=str(error))
        return ImageOrigin(pin, request, self._options, popularity)

    async def _image_of(self, origin: ImageOrigin, client: str, deadline: float | None) -> BuiltImage:
        known = await self.known(origin.key)
        if known is not None:
            self._metrics.looked_up("image", hits=1)
            return known
        self._metrics.looked_up("image", misses=1)
        self._limits.check_request(origin.request, self._folder)
        work, look = partial(self._build, origin), partial(self.known, origin.key)
        return await self.queue.wait(origin.key, origin.title, client, work, _left(deadline), look)

    async def known(self, key: str) -> BuiltImage | None:
        """Give the image of a key, if it is kept and whole: then it is in use, and no collector takes it."""
        image, whole = await asyncio.to_thread(self._look, key)
        if image is None or whole:
            return image
        # Together, as each takes a round trip if the blobs are in a bucket.
        there = await asyncio.gather(*map(self._maker.has, image.descriptors))
        if not all(there):
            log.warning("a known image lacks blobs", missing=there.count(False))
            return None
        return image

    def _look(self, key: str) -> tuple[BuiltImage | None, bool]:
        """Give the image of a key if it is kept, and whether its blobs are there, seen as files."""
        # In this order: a collector takes an image before its use is remembered, or not at all.
        image = self._index.image(key) if self._index.remember_use(key) else None
        return image, image is not None and all(map(self._is_file, image.descriptors))

    def _is_file(self, descriptor: Descriptor) -> bool:
        path = self._blobs.path(descriptor.digest)
        try:
            return path is not None and path.stat().st_size == descriptor.size
        except OSError:
            return False

    async def _build(self, origin: ImageOrigin, build: Build) -> BuiltImage:
        try:
            with self._unfinished.begun(origin):
                async with self._protection(build) as roots, self._leases.lease() as lease:
                    image = await self._maker.make(Job(origin, build, roots, lease))
                    # Only then does the lease end: from now on it is the index that keeps the blobs.
                    await asyncio.to_thread(self._index.remember_image, origin, image)
        except asyncio.CancelledError:
            if not self.queue.stopping:
                self._unfinished.forget(origin)
            raise
        log.info(
            "build finished",
            build=build.id,
            seconds=round(build.seconds, 3),
            layers=len(image.layers),
            store_paths=image.store_paths,
            bytes=sum(layer.descriptor.size for layer in image.layers),
        )
        return image

    @asynccontextmanager
    async def _protection(self, build: Build) -> AsyncIterator[Path]:
        """Give a folder for links that keep store paths from Nix's garbage collector until the build ends."""
        roots = self._temporary.path / build.id
        try:
            yield roots
        finally:
            await asyncio.to_thread(shutil.rmtree, roots, ignore_errors=True)
