"""From a recipe to the image: resolve, realise, plan, pack, describe, remember.

What is made again is the same to the byte, and what is known isn't made again: attribute paths that were
resolved, layers that were packed. Every blob that the image will need is leased before it is looked for or
put, so that no collector takes one before the build index has the image.
"""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import structlog

from chandlery.builds import description
from chandlery.builds.build import Build
from chandlery.builds.growth_watch import GrowthWatch
from chandlery.builds.job import Job
from chandlery.builds.known_images import KnownImages
from chandlery.builds.layer_packer import LayerPacker
from chandlery.builds.limits import BuildLimits, certain_size
from chandlery.builds.permissions import Permissions
from chandlery.builds.popularity_tables import PopularityTables
from chandlery.builds.recipe import Recipe
from chandlery.builds.resolver import PackageResolver
from chandlery.builds.speculative_packing import NixProgress, SpeculativePacking, bytes_there
from chandlery.builds.stores import Stores
from chandlery.builds.wanted_collection import WantedCollection
from chandlery.errors import BuildTooLargeError, RevisionGoneError, StorageFullError
from chandlery.image.name import ImageRequest
from chandlery.layers.main_program import main_package
from chandlery.layers.root_layer import RootLayer, pack_changed_root_layer, pack_root_layer
from chandlery.machine.free_disk import free_bytes, stopped_by
from chandlery.machine.process_pool import ProcessPool
from chandlery.machine.temporary_folder import TemporaryFolder
from chandlery.nix.closure import Closure, StorePath
from chandlery.nix.nix import Resolution
from chandlery.nix.output import DerivationMissingError, FetchPlan
from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    MANIFEST_MEDIA_TYPE,
    OCI_CONFIG,
    BuiltImage,
    ManifestFormat,
    PackedLayer,
    image_config,
    image_manifest,
)
from chandlery.plan.layer_group import LayerGroup
from chandlery.plan.strategies import STRATEGIES
from chandlery.sources.kinds import estimated_size
from chandlery.telemetry.build_timings import Work
from chandlery.telemetry.metrics import Metrics

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Container runtimes stop at 127 layers, and people build on top of images (docs/layering.md).
MOST_STORE_PATH_LAYERS = 94

# How often a build begins anew because Nix's garbage collector took what was resolved before it was built.
_ATTEMPTS = 4

Plan = Callable[[Closure], Sequence[LayerGroup]]


class Pipeline:
    """Carries out recipes that Nix can evaluate, or could once; enter it before, leave it after the last one.

    At most `processes` layers are packed at once, over all builds.
    """

    def __init__(
        self,
        stores: Stores,
        known: KnownImages,
        resolver: PackageResolver,
        permissions: Permissions,
        tables: PopularityTables,
        limits: BuildLimits,
        processes: int,
        metrics: Metrics,
    ) -> None:
        self._stores = stores
        self._known = known
        self._resolver = resolver
        self._permissions = permissions
        self._tables = tables
        self._limits = limits
        self._growth = GrowthWatch(limits)
        self._collection = WantedCollection(stores.folder)
        self._pool = ProcessPool(processes)
        self._packer = LayerPacker(stores, known, self._pool, metrics)
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._temporary = self._exit.enter_context(TemporaryFolder(self._stores.folder / "tmp"))
        await self._exit.enter_async_context(self._pool)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.aclose()

    async def make(self, build: Build) -> BuiltImage:
        """Make the image of a build's recipe; it is durable and remembered when this returns.

        Raises any `ChandleryError`.
        """
        before = await self._stores.index.use_image(build.key)
        try:
            async with self._protected(build) as job:
                image = await self._make(job)
                if before is not None:
                    _check_is_the_same(before, image, build)
                # Only then does the lease end: from now on it is the index that keeps the blobs.
                await self._stores.index.remember_image(build.recipe, image)
        except (BuildTooLargeError, StorageFullError):
            # Nothing protects any more what it has left in Nix's store.
            self._collection.want()
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
    async def _protected(self, build: Build) -> AsyncIterator[Job]:
        """Keep what a build needs from collectors, of Nix and of blobs, until it ends."""
        roots = self._temporary.path / build.id
        try:
            async with self._stores.leases.lease() as lease:
                yield Job(build, self._stores.nix.of(build.recipe.pin), roots, lease)
        finally:
            await asyncio.to_thread(shutil.rmtree, roots, ignore_errors=True)

    async def _make(self, job: Job) -> BuiltImage:
        recipe = job.recipe
        plan = await self._plan(recipe)
        async with SpeculativePacking(job, self._packer, plan) as early:
            resolutions = await self._resolve_and_realise(job, early)
            roots = _closure_roots(recipe.request, resolutions, recipe.options.root_layer.contents)
            closure = await job.nix.closure(roots)
            log.info(
                "realised",
                build=job.build.id,
                store_paths=len(closure.nodes),
                bytes=closure.nar_size,
                early_layers=early.begun,
            )
            self._limits.check_closure(recipe.request.name, closure.nar_size)
            job.build.step("pack")
            groups = await asyncio.to_thread(plan, closure)
            known = await self._packer.known(job, groups)
            # The largest first: one that comes last would keep one processor busy and the others idle.
            by_size = sorted(groups, key=lambda group: -group.nar_size)
            async with _first_error_alone(), asyncio.TaskGroup() as tasks:
                root_task = tasks.create_task(self._root_layer(job, closure, roots, resolutions))
                packing = {
                    group: tasks.create_task(early.layer(group)) for group in by_size if group not in known
                }
        packed = known | {group: task.result() for group, task in packing.items()}
        root = root_task.result()
        if root.collisions:
            await asyncio.to_thread(_tell_collisions, job.build, root.collisions)
        layers = [(packed[group], description.history(group)) for group in groups]
        layers.append((root.layer, description.ROOT_FILESYSTEM_HISTORY))
        return await self._describe(job, closure, root, layers, description.labels(recipe, resolutions))

    async def _plan(self, recipe: Recipe) -> Plan:
        """Return what groups a closure, as the image's options and its table of popularity have it."""
        try:
            popularity = await asyncio.to_thread(self._tables.table, recipe.popularity)
        except KeyError as error:
            # With another the image would be another.
            raise RevisionGoneError(recipe.pin.text, recipe.pin.tag) from error
        strategy = STRATEGIES[recipe.options.strategy]
        budget = min(recipe.options.max_layers - 1, MOST_STORE_PATH_LAYERS)
        return lambda closure: strategy(closure, popularity, budget)

    async def _resolve_and_realise(self, job: Job, early: SpeculativePacking) -> Mapping[str, Resolution]:
        """Resolve the packages and build them; what was resolved once may have been collected since."""
        attempt, request = 0, job.recipe.request
        async with job.nix.beginning() as lock:
            while True:
                attempt += 1
                job.build.step("resolve")
                with job.build.timings.during(Work.RESOLVE):
                    resolutions = await self._resolver.resolve(
                        job.recipe.pin,
                        request.platform.nix_system,
                        request.all_packages,
                        remembered=attempt == 1,
                    )
                log.info("resolved", build=job.build.id, packages=len(resolutions))
                await self._permissions.require_one(job.build.permissions, job.recipe.pin, request)
                job.build.step("realise")
                wanted = sorted({each.store_path for each in resolutions.values()})
                if await job.nix.protect_known(wanted, job.roots / "known"):
                    return resolutions
                lock.realising()
                try:
                    await self._realise(job, resolutions, early)
                except DerivationMissingError as error:
                    if attempt == _ATTEMPTS:
                        raise
                    log.info("resolving again", build=job.build.id, reason=str(error))
                else:
                    return resolutions

    async def _realise(
        self, job: Job, resolutions: Mapping[str, Resolution], early: SpeculativePacking
    ) -> None:
        """Build all packages, as what one derivation needs.

        Nix 2.8 keeps the locks of what it was asked for to its end, even if another Nix has built it: two
        that were asked for the same packages can wait for each other for ever. What is only needed it lets
        go.
        """
        nix, own = job.nix, job.recipe.pin.builders_are_own
        needed = sorted({(each.derivation, each.output) for each in resolutions.values()})
        described = [{"derivation": derivation, "output": output} for derivation, output in needed]
        arguments = {
            "name": _store_name(f"image-{job.recipe.request.name}"),
            "derivations": msgspec.json.encode(described).decode(),
        }
        together = await nix.instantiate("together.nix", arguments, job.roots)
        image, progress = job.recipe.request.name, NixProgress(nix, tuple(resolutions.values()), own)
        since = await nix.newest()
        await self._check_estimate(job, resolutions, progress)
        async with (
            nix.scratch() as scratch,
            early.watching(progress),
            stopped_by(self._growth.watch(image, nix, together, since, scratch, progress)),
        ):
            await nix.realise(
                [together],
                job.roots,
                job.build.log_file,
                own=own,
                timings=job.build.timings,
                on_plan=lambda plan: self._check_plan(job, plan),
                scratch=scratch,
            )

    async def _check_estimate(
        self, job: Job, resolutions: Mapping[str, Resolution], progress: NixProgress
    ) -> None:
        """Refuse an image that is certain to be too large, where the package set estimates its size."""
        names = {each.pname for each in resolutions.values()}
        estimated = await asyncio.to_thread(estimated_size, job.recipe.pin, names)
        if estimated is None:
            return
        self._limits.check_estimate(job.recipe.request.name, estimated)
        self._check_free(job, max(0, certain_size(estimated) - await bytes_there(progress)))

    def _check_plan(self, job: Job, plan: FetchPlan) -> None:
        """Refuse an image before its packages are fetched from binary caches."""
        self._limits.check_plan(job.recipe.request.name, plan)
        self._check_free(job, plan.unpacked)

    def _check_free(self, job: Job, needed: int) -> None:
        folder = job.nix.store_root
        self._limits.check_free(str(folder), free_bytes(folder), needed)

    async def _root_layer(
        self,
        job: Job,
        closure: Closure,
        roots: Sequence[StorePath],
        resolutions: Mapping[str, Resolution],
    ) -> RootLayer:
        """Pack the root filesystem; it is small, and no two images share it, so it isn't remembered alone."""
        request, options = job.recipe.request, job.recipe.options.root_layer
        owner, account = (options.uid, options.gid), request.profile.account
        final = job.recipe.options.compression
        first = "none" if options.extra_commands else final
        main = main_package(request, resolutions)
        store = job.nix.store_root
        with self._stores.blobs.temporary_file() as file:
            with job.build.timings.during(Work.PACK):
                packed = await self._pool.run(
                    pack_root_layer, store, closure, roots, owner, account, main, first, file
                )
            if options.extra_commands:
                changed = await self._run_extra_commands(job, file)
                layer = await self._pool.run(
                    pack_changed_root_layer, store, changed, owner, account, final, file
                )
                packed = replace(packed, layer=layer)
            await self._packer.put(job, packed.layer, file)
        return packed

    async def _run_extra_commands(self, job: Job, layer: Path) -> StorePath:
        """Run the operator's commands over a layer in Nix's sandbox; `BuildError` when they fail."""
        nix, roots = job.nix, job.roots / "extra-commands"
        tar = await nix.add(layer, job.roots / "root-filesystem")
        script = job.recipe.options.root_layer.extra_commands
        arguments = {"layer": str(tar), "script": script}
        derivation = await nix.instantiate("extra_commands.nix", arguments, roots)
        await nix.realise([derivation], roots, job.build.log_file)
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
        blobs, request = self._stores.blobs, job.recipe.request
        container = description.container(request.profile, root.main_program, labels)
        config = image_config(request.platform, layers, container)
        descriptors = [layer.descriptor for layer, _ in layers]
        contents = {each: image_manifest(each, config, descriptors, labels) for each in ManifestFormat}
        await job.lease.take(*map(Digest.of, (config, *contents.values())))
        config_descriptor = await blobs.put_bytes(config, OCI_CONFIG)
        manifests = {
            each: await blobs.put_bytes(content, MANIFEST_MEDIA_TYPE[each])
            for each, content in contents.items()
        }
        return BuiltImage(
            manifests,
            config_descriptor,
            tuple(layer for layer, _ in layers),
            len(closure.nodes),
            closure.nar_size,
        )


@asynccontextmanager
async def _first_error_alone() -> AsyncIterator[None]:
    """Take the first error out of a task group's: what else went wrong is what stopping caused."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _check_is_the_same(before: BuiltImage, now: BuiltImage, build: Build) -> None:
    """Log what differs if a recipe that was carried out before has given another image: it should not."""
    if before.manifests == now.manifests:
        return
    pairs = [pair for pair in zip(before.layers, now.layers, strict=False) if pair[0] != pair[1]]
    log.error(
        "the same recipe has given another image",
        build=build.id,
        image=build.image,
        layers=[len(before.layers), len(now.layers)],
        # Where the diff_id is the same it is the compressor that gave other bytes.
        differ=[
            {
                "diff_id": [str(layer.diff_id) for layer in pair],
                "bytes": [layer.descriptor.size for layer in pair],
            }
            for pair in pairs
        ],
    )


def _tell_collisions(build: Build, collisions: Sequence[str]) -> None:
    """Say in the server's log and in the build's which packages have the same paths."""
    log.info("packages collide", build=build.id, image=build.image, collisions=list(collisions))
    # As Nix's own output: a log for which there is no space is lost, and the build is not.
    with suppress(OSError), build.log_file.open("a") as file:
        file.writelines(f"chandlery: {each}\n" for each in collisions)


def _closure_roots(
    request: ImageRequest, resolutions: Mapping[str, Resolution], contents: Sequence[StorePath]
) -> list[StorePath]:
    """Return the closure's roots, the most wanted first, each once."""
    packages = (resolutions[path].store_path for path in request.most_wanted_first)
    return list(dict.fromkeys([*contents, *packages]))


def _store_name(text: str) -> str:
    """Return a name that a store path may have (Nix manual, "Store Path")."""
    return re.sub(r"[^0-9a-zA-Z+._?=-]", "-", text)[:200]
