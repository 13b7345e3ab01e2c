"""From an `ImageRequest` to an image: pin, resolve, realise, plan, pack, remember.

A build belongs to the application, not to the request that started it: the same build never runs twice at
once, and a client that goes away cancels nothing that another one waits for. What a build has made is
remembered only after every blob of it is durable.
"""

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self, TypeVar
from weakref import WeakValueDictionary

import anyio
import anyio.to_process
import structlog

from chandlery.blob_store import BlobStore
from chandlery.build_index import BuildIndex
from chandlery.build_queue import Build, BuildQueue, QueueLimits
from chandlery.closure import Closure, StorePath
from chandlery.compression import COMPRESSIONS
from chandlery.digest import Digest
from chandlery.errors import BuildTooLargeError, DownloadError, StorageFullError
from chandlery.image_name import BASE_PACKAGES, LATEST, SHELL_PACKAGES, ImageRequest
from chandlery.layer_archive import ARCHIVE_VERSION, layer_key, pack_store_paths
from chandlery.layer_plan import PLAN_VERSION, STRATEGIES, LayerGroup
from chandlery.nix import DerivationMissingError, Nix, Resolution
from chandlery.oci import (
    MANIFEST_MEDIA_TYPE,
    OCI_CONFIG,
    BuiltImage,
    ContainerConfig,
    ManifestFormat,
    PackedLayer,
    image_config,
    image_manifest,
)
from chandlery.package_resolver import PackageResolver
from chandlery.package_source import PackageSource, PinnedSource
from chandlery.root_layer import (
    ROOT_LAYER_VERSION,
    MainPackage,
    RootLayer,
    RootLayerOptions,
    pack_changed_root_layer,
    pack_root_layer,
)

T = TypeVar("T")
P = ParamSpec("P")

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# design.md, "The layer plan": container runtimes stop at 127, and people build on top.
MOST_STORE_PATH_LAYERS = 94

# An index younger than this (seconds) isn't fetched again because a download failed.
_RETRY_AGE = 60.0

_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/games",
    "SSL_CERT_FILE": "/etc/ssl/certs/ca-bundle.crt",
}
_SHELL_COMMAND = "/bin/bash"


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How images are made; all of it is in a build's key. `max_layers` counts the root filesystem layer."""

    max_layers: int = 96
    compression: str = "gzip"
    strategy: str = "largest-alone"
    root_layer: RootLayerOptions = field(default_factory=RootLayerOptions)

    def key_parts(self) -> list[str]:
        """Give everything that an image's bytes depend on beside its packages."""
        return [
            str(self.max_layers),
            COMPRESSIONS[self.compression].fingerprint,
            self.strategy,
            str(PLAN_VERSION),
            str(ARCHIVE_VERSION),
            str(ROOT_LAYER_VERSION),
            *self.root_layer.key_parts(),
        ]


@dataclass(frozen=True, slots=True)
class BuildLimits:
    """How much one build may take: packages asked for, bytes of its closure, bytes of disk left free."""

    packages: int = 100
    closure_size: int = 20 << 30
    free_disk: int = 1 << 30

    def check_request(self, request: ImageRequest, folder: Path) -> None:
        """Raise `BuildTooLargeError` or `StorageFullError` if a build shouldn't begin."""
        if len(request.packages) > self.packages:
            raise BuildTooLargeError(request.name, "packages", len(request.packages), self.packages)
        if shutil.disk_usage(folder).free < self.free_disk:
            raise StorageFullError(str(folder))

    def check_closure(self, image: str, closure: Closure) -> None:
        """Raise `BuildTooLargeError` if a closure shouldn't become an image."""
        if closure.nar_size > self.closure_size:
            raise BuildTooLargeError(image, "bytes in its closure", closure.nar_size, self.closure_size)


@dataclass(frozen=True, slots=True)
class BuildCapacity:
    """How many layers are packed at once, over all builds, and what the queue and each build may take."""

    packing_processes: int = 2
    queue: QueueLimits = field(default_factory=QueueLimits)
    build: BuildLimits = field(default_factory=BuildLimits)


class ImageBuilder:
    """Builds images of one package source; enter it to start, leave it to stop what is still being built.

    `folder` gets a log per build, `builds/<id>.log`, and while a build runs the links that keep its store
    paths from Nix's garbage collector.
    """

    def __init__(
        self,
        source: PackageSource,
        nix: Nix,
        blobs: BlobStore,
        index: BuildIndex,
        folder: Path,
        options: BuildOptions,
        capacity: BuildCapacity,
    ) -> None:
        self._source = source
        self._nix = nix
        self._resolver = PackageResolver(nix, index)
        self._blobs = blobs
        self._index = index
        self._options = options
        self._folder = folder
        self._limits = capacity.build
        self._packers = anyio.CapacityLimiter(capacity.packing_processes)
        self._layer_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.queue = BuildQueue(capacity.queue, folder / "builds")

    async def __aenter__(self) -> Self:
        await self.queue.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.queue.__aexit__(kind, error, trace)

    async def image(
        self, request: ImageRequest, client: str = "", timeout: float | None = None
    ) -> BuiltImage:
        """Give the image of a request, building it if it isn't known.

        `client` is who asks, for fairness. Raises any `ChandleryError`; after `timeout` seconds it is
        `BuildPendingError`, and the build goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pin = await self._source.pin(request.reference, request.platform)
        try:
            return await self._image_at(pin, request, client, deadline)
        except DownloadError:
            # A mirror drops what a newer index has replaced, so see whether there is one.
            await self._source.refresh(_RETRY_AGE)
            newer = await self._source.pin(request.reference, request.platform)
            if newer == pin:
                raise
            return await self._image_at(newer, request, client, deadline)

    async def _image_at(
        self, pin: PinnedSource, request: ImageRequest, client: str, deadline: float | None
    ) -> BuiltImage:
        key = self._key(pin, request)
        known = await self._known(key)
        if known is not None:
            await asyncio.to_thread(self._index.remember_use, key)
            return known
        self._limits.check_request(request, self._folder)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        title = f"{request.name} for {request.platform}"
        return await self.queue.wait(key, title, client, partial(self._build, key, pin, request), left)

    async def tags(self, request: ImageRequest) -> Sequence[str]:
        """Give the tags that an image has; `PackagesNotFoundError` when it can't have any."""
        pin = await self._source.pin(LATEST, request.platform)
        await self._resolve(pin, request)
        return sorted({LATEST, pin.tag, *self._index.tags(request.name)})

    def _key(self, pin: PinnedSource, request: ImageRequest) -> str:
        return Digest.of_parts(
            [
                *(pin.kind, pin.location, pin.revision, str(request.platform), str(request.shell)),
                *("options", *self._options.key_parts()),
                *("packages", *request.packages),
                # What these stand for may change with the version of Chandlery.
                *("all packages", *request.all_packages),
            ]
        ).hex

    async def _known(self, key: str) -> BuiltImage | None:
        """Give the image remembered for a key, if all of its blobs are there."""
        image = self._index.image(key)
        if image is None:
            return None
        descriptors = (*image.manifests.values(), image.config, *(layer.descriptor for layer in image.layers))
        for descriptor in descriptors:
            if await self._blobs.stat(descriptor.digest) is None:
                log.warning("a blob of a known image is missing", digest=str(descriptor.digest))
                return None
        return image

    async def _build(self, key: str, pin: PinnedSource, request: ImageRequest, build: Build) -> BuiltImage:
        async with self._protection(build) as roots:
            image = await self._make(pin, request, roots, build)
            await asyncio.to_thread(self._index.remember_image, key, request.name, request.reference, image)
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
        roots = build.log_file.with_suffix(".roots")
        try:
            yield roots
        finally:
            await asyncio.to_thread(shutil.rmtree, roots, ignore_errors=True)

    async def _make(self, pin: PinnedSource, request: ImageRequest, roots: Path, build: Build) -> BuiltImage:
        build.step("resolve")
        resolutions = await self._resolve(pin, request)
        log.info("resolved", build=build.id, packages=len(resolutions))
        build.step("realise")
        try:
            await self._realise(resolutions, roots, build.log_file)
        except DerivationMissingError:
            # Nix's garbage collector took derivations that were resolved earlier.
            resolutions = await self._resolve(pin, request, remembered=False)
            await self._realise(resolutions, roots, build.log_file)
        wanted = _roots(request, resolutions, self._options.root_layer.contents)
        closure = await self._nix.closure(wanted)
        log.info("realised", build=build.id, store_paths=len(closure.nodes), bytes=closure.nar_size)
        self._limits.check_closure(request.name, closure)
        build.step("pack")
        plan = STRATEGIES[self._options.strategy]
        groups = plan(closure, {}, min(self._options.max_layers - 1, MOST_STORE_PATH_LAYERS))
        main = _main_package(request, resolutions)
        async with _first_error_alone(), asyncio.TaskGroup() as tasks:
            root_task = tasks.create_task(self._root_layer(closure, wanted, main, roots, build.log_file))
            # The largest first: one that comes last would keep one processor busy and the others idle.
            by_size = sorted(groups, key=lambda group: -group.nar_size)
            packing = {group: tasks.create_task(self._layer(group)) for group in by_size}
        root = root_task.result()
        layers = [(packing[group].result(), _history(group)) for group in groups]
        layers.append((root.layer, "chandlery: root filesystem"))
        return await self._describe(request, closure, root, layers)

    async def _describe(
        self,
        request: ImageRequest,
        closure: Closure,
        root: RootLayer,
        layers: Sequence[tuple[PackedLayer, str]],
    ) -> BuiltImage:
        """Put the config and both manifests into the blob store."""
        command = _SHELL_COMMAND if request.shell else root.main_program
        container = ContainerConfig((command,) if command else (), _ENVIRONMENT)
        config = image_config(request.platform, layers, container)
        descriptors = [layer.descriptor for layer, _ in layers]
        config_descriptor = await self._blobs.put_bytes(config, OCI_CONFIG)
        manifests = {
            each: await self._blobs.put_bytes(
                image_manifest(each, config, descriptors, {}), MANIFEST_MEDIA_TYPE[each]
            )
            for each in ManifestFormat
        }
        return BuiltImage(
            manifests,
            config_descriptor,
            tuple(layer for layer, _ in layers),
            len(closure.nodes),
            closure.nar_size,
        )

    async def _resolve(
        self, pin: PinnedSource, request: ImageRequest, *, remembered: bool = True
    ) -> Mapping[str, Resolution]:
        return await self._resolver.resolve(
            pin, request.platform.nix_system, request.all_packages, remembered=remembered
        )

    async def _realise(self, resolutions: Mapping[str, Resolution], roots: Path, log_file: Path) -> None:
        derivations = {f"{each.derivation}!{each.output}" for each in resolutions.values()}
        await self._nix.realise(sorted(derivations), roots, log_file)

    async def _layer(self, group: LayerGroup) -> PackedLayer:
        """Give a group's layer, packing it unless it is known; never twice at once."""
        key = layer_key(group.store_paths, COMPRESSIONS[self._options.compression])
        lock = self._layer_locks.setdefault(key, asyncio.Lock())
        async with lock:
            known = self._index.layer(key)
            if known is not None and await self._blobs.stat(known.descriptor.digest) is not None:
                return known
            with self._blobs.temporary_file() as file:
                packed = await self._in_process(
                    pack_store_paths,
                    self._nix.store_root,
                    group.store_paths,
                    self._options.compression,
                    file,
                )
                await self._blobs.put(packed.descriptor.digest, file, packed.descriptor.media_type)
            await asyncio.to_thread(self._index.remember_layer, key, packed)
            log.debug("layer packed", digest=str(packed.descriptor.digest), bytes=packed.descriptor.size)
            return packed

    async def _root_layer(
        self,
        closure: Closure,
        wanted: Sequence[StorePath],
        main: MainPackage | None,
        roots: Path,
        log_file: Path,
    ) -> RootLayer:
        """Pack the root filesystem; it is small, and no two images share it, so it isn't remembered alone."""
        options = self._options.root_layer
        owner = (options.uid, options.gid)
        compression = "none" if options.extra_commands else self._options.compression
        with self._blobs.temporary_file() as file:
            packed = await self._in_process(
                pack_root_layer, self._nix.store_root, closure, wanted, owner, main, compression, file
            )
            if options.extra_commands:
                changed = await self._run_extra_commands(file, roots, log_file)
                layer = await self._in_process(
                    pack_changed_root_layer,
                    self._nix.store_root,
                    changed,
                    owner,
                    self._options.compression,
                    file,
                )
                packed = RootLayer(layer, packed.main_program)
            await self._blobs.put(packed.layer.descriptor.digest, file, packed.layer.descriptor.media_type)
        return packed

    async def _run_extra_commands(self, layer: Path, roots: Path, log_file: Path) -> StorePath:
        """Run the operator's commands over a layer in Nix's sandbox; `BuildError` when they fail."""
        tar = await self._nix.add(layer, roots / "root-filesystem")
        derivation = await self._nix.instantiate(
            "extra_commands.nix", {"layer": str(tar), "script": self._options.root_layer.extra_commands}
        )
        await self._nix.realise([derivation], roots / "extra-commands", log_file)
        return StorePath.parse(os.readlink(roots / "extra-commands" / "result"))  # noqa: PTH115

    async def _in_process(self, function: Callable[P, T], *arguments: P.args, **_: P.kwargs) -> T:
        """Run pure computation where it doesn't keep the server from serving; stopped when cancelled."""
        return await anyio.to_process.run_sync(function, *arguments, cancellable=True, limiter=self._packers)


@asynccontextmanager
async def _first_error_alone() -> AsyncIterator[None]:
    """Take the first error out of a task group's: what else went wrong is what stopping caused."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _most_wanted_first(request: ImageRequest) -> list[str]:
    """Order attribute paths for collisions: what was asked for, then the shell's, then what is always in."""
    shell = SHELL_PACKAGES if request.shell else ()
    return list(dict.fromkeys([*request.packages, *shell, *BASE_PACKAGES]))


def _roots(
    request: ImageRequest, resolutions: Mapping[str, Resolution], contents: Sequence[StorePath]
) -> list[StorePath]:
    """Give the closure's roots, the most wanted first, each once."""
    packages = (resolutions[path].store_path for path in _most_wanted_first(request))
    return list(dict.fromkeys([*contents, *packages]))


def _main_package(request: ImageRequest, resolutions: Mapping[str, Resolution]) -> MainPackage | None:
    if len(request.packages) != 1:
        return None
    resolution = resolutions[request.packages[0]]
    return MainPackage(resolution.store_path, resolution.pname, resolution.main_program)


def _history(group: LayerGroup) -> str:
    """Say what is in a layer, for the image's history."""
    return f"chandlery: {', '.join(path.name for path in group.store_paths)}"
