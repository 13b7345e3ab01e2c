"""From an image's origin to the image: resolve, realise, plan, pack, describe.

What is made again is the same to the byte, and what is known isn't made again: attribute paths that were
resolved, layers that were packed. Every blob that the image will need is leased before it is looked for or
put, so that no collector takes one before the build index has the image.
"""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec
import structlog

from chandlery.builds.build import Build
from chandlery.builds.index import BuildIndex
from chandlery.builds.popularity_tables import PopularityTables
from chandlery.builds.recipe import ImageOrigin
from chandlery.builds.resolver import PackageResolver
from chandlery.builds.speculative_packing import EarlyLayers, Expected
from chandlery.errors import BuildTooLargeError, RevisionGoneError, StorageFullError
from chandlery.image.name import ImageRequest
from chandlery.image.profile import Profile
from chandlery.layers.archive import layer_key, pack_store_paths
from chandlery.layers.compression import COMPRESSIONS
from chandlery.layers.main_program import MainPackage
from chandlery.layers.root_layer import RootLayer, pack_changed_root_layer, pack_root_layer
from chandlery.machine.process_pool import PackingProcesses
from chandlery.nix.closure import Closure, StorePath
from chandlery.nix.nix import Nix, Resolution
from chandlery.nix.output import DerivationMissingError
from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    MANIFEST_MEDIA_TYPE,
    OCI_CONFIG,
    BuiltImage,
    ContainerConfig,
    Descriptor,
    ManifestFormat,
    PackedLayer,
    image_config,
    image_manifest,
)
from chandlery.plan.strategies import STRATEGIES, LayerGroup
from chandlery.storage.blob_store import BlobStore
from chandlery.storage.leases import Lease
from chandlery.telemetry.build_timings import Work
from chandlery.telemetry.metrics import Metrics

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# design.md, "The layer plan": container runtimes stop at 127, and people build on top.
MOST_STORE_PATH_LAYERS = 94

# How often a build begins anew because Nix's garbage collector took what was resolved before it was built.
_ATTEMPTS = 4

_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/games",
    "SSL_CERT_FILE": "/etc/ssl/certs/ca-bundle.crt",
}


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
class Job:
    """One build while it runs; `roots` (a folder of links) and `lease` keep what it needs from collectors."""

    origin: ImageOrigin
    build: Build
    roots: Path
    lease: Lease


class ImageMaker:
    """Makes images of any origin that Nix can evaluate, or could once.

    Whoever has it enters its `packers` before, and leaves them after the last image was made.
    """

    def __init__(
        self,
        nix: Nix,
        blobs: BlobStore,
        index: BuildIndex,
        tables: PopularityTables,
        limits: BuildLimits,
        packing_processes: int,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._nix = nix
        self._resolver = PackageResolver(nix, index, self._metrics)
        self._blobs = blobs
        self._index = index
        self._tables = tables
        self._limits = limits
        self.packers = PackingProcesses(packing_processes)
        self._layer_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def make(self, job: Job) -> BuiltImage:
        """Make an image; its blobs are durable and leased when this returns. Raises any `ChandleryError`."""
        origin = job.origin
        plan = await self._plan(origin)
        async with EarlyLayers(plan, partial(self._layer, job)) as early:
            resolutions = await self._resolved_and_built(job, early)
            wanted = _roots(origin.request, resolutions, origin.options.root_layer.contents)
            closure = await self._nix.closure(wanted)
            log.info(
                "realised",
                build=job.build.id,
                store_paths=len(closure.nodes),
                bytes=closure.nar_size,
                early_layers=early.begun,
            )
            self._limits.check_closure(origin.request.name, closure)
            job.build.step("pack")
            groups = await asyncio.to_thread(plan, closure)
            known = await self._known_layers(job, groups)
            main = _main_package(origin.request, resolutions)
            # The largest first: one that comes last would keep one processor busy and the others idle.
            by_size = sorted(groups, key=lambda group: -group.nar_size)
            async with _first_error_alone(), asyncio.TaskGroup() as tasks:
                root_task = tasks.create_task(self._root_layer(job, closure, wanted, main))
                packing = {
                    group: tasks.create_task(early.layer(group)) for group in by_size if group not in known
                }
        packed = known | {group: task.result() for group, task in packing.items()}
        root = root_task.result()
        layers = [(packed[group], _history(group)) for group in groups]
        layers.append((root.layer, "chandlery: root filesystem"))
        return await self._describe(job, closure, root, layers, _labels(origin, resolutions))

    async def resolve(self, origin: ImageOrigin, *, remembered: bool = True) -> Mapping[str, Resolution]:
        """Find the derivations of an image's packages; see `PackageResolver.resolve`."""
        request = origin.request
        return await self._resolver.resolve(
            origin.pin, request.platform.nix_system, request.all_packages, remembered=remembered
        )

    async def has(self, descriptor: Descriptor) -> bool:
        """Tell whether a blob is there; one that has another size is removed, so that it is made again."""
        info = await self._blobs.stat(descriptor.digest)
        if info is not None and info.size != descriptor.size:
            log.warning("a blob is damaged", digest=str(descriptor.digest), bytes=info.size)
            await self._blobs.delete(descriptor.digest)
            return False
        return info is not None

    async def _plan(self, origin: ImageOrigin) -> Callable[[Closure], Sequence[LayerGroup]]:
        """Give what groups a closure, as the image's options and its table of popularity have it."""
        try:
            popularity = await asyncio.to_thread(self._tables.table, origin.popularity)
        except KeyError as error:
            # With another the image would be another.
            raise RevisionGoneError(f"{origin.pin.kind}!{origin.pin.location}", origin.pin.tag) from error
        strategy = STRATEGIES[origin.options.strategy]
        budget = min(origin.options.max_layers - 1, MOST_STORE_PATH_LAYERS)
        return lambda closure: strategy(closure, popularity, budget)

    async def _resolved_and_built(self, job: Job, early: EarlyLayers) -> Mapping[str, Resolution]:
        """Resolve the packages and build them; what was resolved once may have been collected since."""
        attempt = 0
        async with self._nix.beginning() as passage:
            while True:
                attempt += 1
                job.build.step("resolve")
                with job.build.timings.during(Work.RESOLVE):
                    resolutions = await self.resolve(job.origin, remembered=attempt == 1)
                log.info("resolved", build=job.build.id, packages=len(resolutions))
                job.build.step("realise")
                wanted = sorted({each.store_path for each in resolutions.values()})
                if await self._nix.protect_known(wanted, job.roots / "known"):
                    return resolutions
                passage.realising()
                try:
                    await self._realise(job, resolutions, early)
                except DerivationMissingError as error:
                    if attempt == _ATTEMPTS:
                        raise
                    log.info("resolving again", build=job.build.id, reason=str(error))
                else:
                    return resolutions

    async def _realise(self, job: Job, resolutions: Mapping[str, Resolution], early: EarlyLayers) -> None:
        """Build all packages, as what one derivation needs.

        Nix 2.8 keeps the locks of what it was asked for to its end, even if another Nix has built it: two
        that were asked for the same packages can wait for each other for ever. What is only needed it lets
        go.
        """
        needed = sorted({(each.derivation, each.output) for each in resolutions.values()})
        described = [{"derivation": derivation, "output": output} for derivation, output in needed]
        arguments = {
            "name": _store_name(f"image-{job.origin.request.name}"),
            "derivations": msgspec.json.encode(described).decode(),
        }
        together = await self._nix.instantiate("together.nix", arguments, job.roots)
        own = job.origin.pin.kind == "debian"
        async with early.watching(self._expected(resolutions, own=own)):
            await self._nix.realise(
                [together], job.roots, job.build.log_file, own=own, timings=job.build.timings
            )

    def _expected(self, resolutions: Mapping[str, Resolution], *, own: bool) -> Expected:
        """Give what tells which store paths an image will have, and what of them is there."""
        derivations = sorted({each.derivation for each in resolutions.values()})
        wanted = sorted({each.store_path for each in resolutions.values()})

        async def made() -> tuple[Closure, frozenset[StorePath]] | None:
            # Packages of the Debian set need all that they are made of.
            return await self._nix.made_by(derivations)

        async def finished() -> tuple[Closure, frozenset[StorePath]] | None:
            closure = await self._nix.known_closure(wanted)
            return None if closure is None else (closure, frozenset(node.path for node in closure.nodes))

        return made if own else finished

    async def _known_layers(self, job: Job, groups: Sequence[LayerGroup]) -> dict[LayerGroup, PackedLayer]:
        """Give the layers that were packed before, and are there."""
        compression = COMPRESSIONS[job.origin.options.compression]
        recorded = {group: self._index.layer(layer_key(group.store_paths, compression)) for group in groups}
        found = {group: layer for group, layer in recorded.items() if layer is not None}
        await job.lease.take(*(layer.descriptor.digest for layer in found.values()))
        there = await asyncio.gather(*(self.has(layer.descriptor) for layer in found.values()))
        known = {
            group: layer for (group, layer), is_there in zip(found.items(), there, strict=True) if is_there
        }
        self._metrics.looked_up("layer", hits=len(known))
        return known

    async def _layer(self, job: Job, group: LayerGroup) -> PackedLayer:
        """Give a group's layer, packing it unless it is known; never twice at once."""
        compression = job.origin.options.compression
        key = layer_key(group.store_paths, COMPRESSIONS[compression])
        lock = self._layer_locks.setdefault(key, asyncio.Lock())
        async with lock:
            known = self._index.layer(key)
            if known is not None:
                await job.lease.take(known.descriptor.digest)
                if await self.has(known.descriptor):
                    self._metrics.looked_up("layer", hits=1)
                    return known
            self._metrics.looked_up("layer", misses=1)
            with self._blobs.temporary_file() as file:
                with job.build.timings.during(Work.PACK):
                    packed = await self.packers.run(
                        pack_store_paths, self._nix.store_root, group.store_paths, compression, file
                    )
                await self._put(job, packed, file)
            await asyncio.to_thread(self._index.remember_layer, key, packed)
            log.debug("layer packed", digest=str(packed.descriptor.digest), bytes=packed.descriptor.size)
            return packed

    async def _root_layer(
        self, job: Job, closure: Closure, wanted: Sequence[StorePath], main: MainPackage | None
    ) -> RootLayer:
        """Pack the root filesystem; it is small, and no two images share it, so it isn't remembered alone."""
        options = job.origin.options.root_layer
        owner, account = (options.uid, options.gid), job.origin.request.profile.account
        final = job.origin.options.compression
        first = "none" if options.extra_commands else final
        store = self._nix.store_root
        with self._blobs.temporary_file() as file:
            with job.build.timings.during(Work.PACK):
                packed = await self.packers.run(
                    pack_root_layer, store, closure, wanted, owner, account, main, first, file
                )
            if options.extra_commands:
                changed = await self._run_extra_commands(job, file)
                layer = await self.packers.run(
                    pack_changed_root_layer, store, changed, owner, account, final, file
                )
                packed = RootLayer(layer, packed.main_program)
            await self._put(job, packed.layer, file)
        return packed

    async def _run_extra_commands(self, job: Job, layer: Path) -> StorePath:
        """Run the operator's commands over a layer in Nix's sandbox; `BuildError` when they fail."""
        tar = await self._nix.add(layer, job.roots / "root-filesystem")
        script = job.origin.options.root_layer.extra_commands
        roots = job.roots / "extra-commands"
        arguments = {"layer": str(tar), "script": script}
        derivation = await self._nix.instantiate("extra_commands.nix", arguments, roots)
        await self._nix.realise([derivation], roots, job.build.log_file)
        return StorePath.parse(str((roots / "result").readlink()))

    async def _describe(
        self,
        job: Job,
        closure: Closure,
        root: RootLayer,
        layers: Sequence[tuple[PackedLayer, str]],
        labels: Mapping[str, str],
    ) -> BuiltImage:
        """Put the config and both manifests into the blob store."""
        request = job.origin.request
        container = _container(request.profile, root.main_program, labels)
        config = image_config(request.platform, layers, container)
        descriptors = [layer.descriptor for layer, _ in layers]
        contents = {each: image_manifest(each, config, descriptors, labels) for each in ManifestFormat}
        await job.lease.take(*map(Digest.of, (config, *contents.values())))
        config_descriptor = await self._blobs.put_bytes(config, OCI_CONFIG)
        manifests = {
            each: await self._blobs.put_bytes(content, MANIFEST_MEDIA_TYPE[each])
            for each, content in contents.items()
        }
        return BuiltImage(
            manifests,
            config_descriptor,
            tuple(layer for layer, _ in layers),
            len(closure.nodes),
            closure.nar_size,
        )

    async def _put(self, job: Job, layer: PackedLayer, file: Path) -> None:
        await job.lease.take(layer.descriptor.digest)
        with job.build.timings.during(Work.STORE):
            await self._blobs.put(layer.descriptor.digest, file, layer.descriptor.media_type)
        self._metrics.packed(layer.descriptor.size)


@asynccontextmanager
async def _first_error_alone() -> AsyncIterator[None]:
    """Take the first error out of a task group's: what else went wrong is what stopping caused."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _roots(
    request: ImageRequest, resolutions: Mapping[str, Resolution], contents: Sequence[StorePath]
) -> list[StorePath]:
    """Give the closure's roots, the most wanted first, each once."""
    packages = (resolutions[path].store_path for path in request.most_wanted_first)
    return list(dict.fromkeys([*contents, *packages]))


def _main_package(request: ImageRequest, resolutions: Mapping[str, Resolution]) -> MainPackage | None:
    if len(request.packages) != 1:
        return None
    resolution = resolutions[request.packages[0]]
    return MainPackage(resolution.store_path, resolution.pname, resolution.main_program)


def _container(profile: Profile, program: str | None, labels: Mapping[str, str]) -> ContainerConfig:
    """Say what a container is started with; what a profile says counts more than what is found."""
    command = profile.command
    if program and not command and not profile.entrypoint:
        command = (program,)
    return ContainerConfig(
        profile.entrypoint,
        command,
        {**_ENVIRONMENT, **profile.environment},
        profile.user_and_group,
        profile.working_directory,
        [port if "/" in port else f"{port}/tcp" for port in profile.exposed_ports],
        {**labels, **profile.labels},
    )


def _labels(origin: ImageOrigin, resolutions: Mapping[str, Resolution]) -> Mapping[str, str]:
    """Say what the image is, and of which revision (image-spec, annotations.md).

    All of it comes from the packages and the pin, so that it is the same on every machine.
    """
    pin, request = origin.pin, origin.request
    found = [resolutions[path] for path in request.packages]
    labels = {
        "title": request.title,
        "description": ", ".join(f"{each.pname} {each.version}".strip() for each in found),
        "version": found[0].version if len(found) == 1 else "",
        "source": pin.public_location,
        "revision": pin.revision,
    }
    return {f"org.opencontainers.image.{name}": value for name, value in labels.items() if value}


def _store_name(text: str) -> str:
    """Make a name that a store path may have (Nix manual, "Store Path")."""
    return re.sub(r"[^0-9a-zA-Z+._?=-]", "-", text)[:200]


def _history(group: LayerGroup) -> str:
    """Say what is in a layer, for the image's history."""
    return f"chandlery: {', '.join(path.name for path in group.store_paths)}"
