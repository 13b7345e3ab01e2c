"""An image builder with real Nix and the small package set, for the tests of all that works with images."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chandlery.builds.images import BuildCapacity, Images
from chandlery.builds.recipe import BuildOptions
from chandlery.builds.sqlite.index import SqliteIndex
from chandlery.builds.stores import Stores
from chandlery.image import name as image_name
from chandlery.image.name import LATEST, ImageRequest, NamePrefixes
from chandlery.nix.closure import Closure, StorePath
from chandlery.nix.configuration import host_paths
from chandlery.nix.nix import Nix, NixLimits, NixOptions, Resolution
from chandlery.nix.pinned_source import PinnedSource
from chandlery.nix.stores import NixStores
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, ManifestFormat, PackedLayer, Platform
from chandlery.plan.popularity import Popularity
from chandlery.sources.configured import Sources
from chandlery.sources.debian.index import DebianMirrors
from chandlery.sources.kinds import parse
from chandlery.sources.package_source import PackageSource
from chandlery.storage.file_store import FileBlobStore
from chandlery.storage.leases import Leases
from tests.support import layers
from tests.support.package_sets import SOURCE, Gates

HOST = Platform.of_host()
NAME_PREFIXES = NamePrefixes(HOST)


class WatchedNix(Nix):
    """Nix, and what it was asked to evaluate and to build."""

    def __init__(self, folder: Path, limits: NixLimits, options: NixOptions) -> None:
        super().__init__(folder, limits, options)
        self.realised: list[Sequence[str]] = []
        self.evaluated: list[str] = []
        self.running = 0
        self.most_at_once = 0
        self.collects_garbage = False

    async def resolve(
        self, source: PinnedSource, system: str, attribute_paths: Sequence[str]
    ) -> dict[str, Resolution]:
        self.evaluated += attribute_paths
        return await super().resolve(source, system, attribute_paths)

    async def realise(self, derivations: Sequence[str], *arguments: Any, **options: Any) -> None:
        self.realised.append(derivations)
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            await super().realise(derivations, *arguments, **options)
        finally:
            self.running -= 1

    async def closure(self, roots: Iterable[StorePath]) -> Closure:
        if self.collects_garbage:
            await self.collect_all_garbage()
        return await super().closure(roots)

    async def collect_all_garbage(self) -> None:
        """Collect as somebody does who knows of no gate."""
        await self._run("nix-store", "--gc", timeout=60)


class WatchedBlobs(FileBlobStore):
    """A blob store, and the files that were put into it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.packed: list[Digest] = []

    async def put(self, digest: Digest, file: Path, media_type: str) -> None:
        self.packed.append(digest)
        await super().put(digest, file, media_type)


@dataclass(frozen=True)
class Workshop:
    """Images, and what they are made with."""

    images: Images
    nix: WatchedNix
    blobs: WatchedBlobs
    index: SqliteIndex
    leases: Leases
    gates: Gates
    folder: Path

    @property
    def stores(self) -> Stores:
        return Stores(self.folder, NixStores.of_one(self.nix), self.blobs, self.index, self.leases)

    async def image(self, *parts: str) -> BuiltImage:
        return await self.images.image(a_request(*parts))

    def building(self, *parts: str) -> "asyncio.Task[BuiltImage]":
        return asyncio.create_task(self.image(*parts))

    def config(self, image: BuiltImage) -> Any:
        return json.loads(self.blobs.path(image.config.digest).read_bytes())

    def manifest(self, image: BuiltImage, manifest_format: ManifestFormat = ManifestFormat.OCI) -> Any:
        return json.loads(self.blobs.path(image.manifests[manifest_format].digest).read_bytes())

    def blob(self, layer: PackedLayer) -> Path:
        return self.blobs.path(layer.descriptor.digest)

    def names(self, image: BuiltImage) -> list[str]:
        """Return the names of the store paths in an image, as often as they are there."""
        return [path[33:] for path in self.base_names(image)]

    def base_names(self, image: BuiltImage) -> list[str]:
        return [
            name.split("/")[2]
            for each in image.layers[:-1]
            for name in layers.layer(self.blob(each)).getnames()
            if name.startswith("nix/store/") and name.count("/") == 2
        ]

    def logs(self) -> list[Path]:
        return sorted(self.folder.glob("builds/*.log"))

    def left_over(self) -> list[Path]:
        """Return the files that a build may have while it runs, and the links for Nix's garbage collector."""
        return [path for path in self.folder.glob("tmp/*/*") if path.name != "lock"]


def a_request(*parts: str) -> ImageRequest:
    return image_name.of_parts(parts, LATEST, NAME_PREFIXES)


@asynccontextmanager
async def opened(
    folder: Path,
    *,
    options: BuildOptions | None = None,
    capacity: BuildCapacity | None = None,
    limits: NixLimits | None = None,
    nix_options: NixOptions | None = None,
    blobs_folder: Path | None = None,
    source: PackageSource | None = None,
    popularity: Popularity | None = None,
) -> AsyncIterator[Workshop]:
    source = source or parse(SOURCE, folder, DebianMirrors("", "", ""))
    gates = Gates(folder / "gates", folder)
    nix_options = nix_options or NixOptions(substituters=(), host_paths=tuple(host_paths()))
    nix = WatchedNix(folder / "nix", limits or NixLimits(), nix_options)
    options, capacity = options or BuildOptions(), capacity or BuildCapacity()
    with (
        WatchedBlobs(blobs_folder or folder) as blobs,
        SqliteIndex(folder, use_interval=0.0) as index,
        Leases(folder) as leases,
    ):
        await nix.check()
        stores = Stores(folder, NixStores.of_one(nix), blobs, index, leases)
        sources = Sources.of_one(source)
        table = popularity or Popularity()
        async with Images(sources, stores, options, capacity, popularity=table) as images:
            yield Workshop(images, nix, blobs, index, leases, gates, folder)
