"""Packing realised closures: Chandlery, what its parts could do at best, GNU tar and pigz, tarfile and gzip.

All pack the same groups of store paths, one layer for each, from files that are in memory already. The parts
are sha256, isal and sha256 over the same tars, which are in memory too: no files are read, written or synced,
and no headers made. The peers make no digests, but for the last, which is one process and one thread.
"""

import gzip
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
import time
from asyncio import TaskGroup
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from chandlery.builds.pipeline import MOST_STORE_PATH_LAYERS
from chandlery.builds.resolver import PackageResolver
from chandlery.image.name import LATEST, NamePrefixes, of_parts
from chandlery.layers.archive import archive, layer_entries, pack_store_paths
from chandlery.layers.compression import COMPRESSIONS
from chandlery.layers.store_reader import StoreReader
from chandlery.machine.process_pool import ProcessPool
from chandlery.nix.closure import Closure
from chandlery.oci.documents import Platform
from chandlery.plan.popularity import Popularity
from chandlery.plan.strategies import STRATEGIES, LayerGroup
from chandlery.server.parts import Parts, open_parts
from chandlery.settings.settings import Settings
from chandlery.storage.file_store import FileBlobStore

_PACKAGES = ("git", "python3", "ffmpeg", "libreoffice-writer")
# It takes half a minute for each of the large ones: for one of them it is enough.
_WITHOUT_SERIAL_PEER = ("ffmpeg",)
# What takes a second or two is done so often.
_TIMES = 3


async def table(data_dir: Path) -> Table:
    """Pack each closure with all of them; sizes are those of the tars."""
    result = Table(
        *("packing", "store paths", "layers", "MB", "Chandlery", "the parts' limit", "of the limit"),
        *("GNU tar + pigz", "tarfile + gzip 6", "times as fast"),
    )
    settings = Settings.load(data_dir=data_dir)
    async with open_parts(settings) as parts, ProcessPool(settings.packing_processes) as packers:
        for package in _PACKAGES:
            closure, groups = await realised(parts, settings, package)
            with tempfile.TemporaryDirectory(dir=data_dir, prefix="bench-") as temporary:
                layers = _Layers(parts.nix("").store_root, groups, settings, Path(temporary))
                tars = layers.tars()
                megabytes = sum(len(block) for blocks in tars for block in blocks) / 1e6
                times = [(await layers.pack(packers), layers.pack_by_parts(tars)) for _ in range(_TIMES)]
                # The best of each, for the machine may have had something else to do.
                ours, limit = map(min, zip(*times, strict=True))
                peers = [layers.pack_by_pigz()]
                if package not in _WITHOUT_SERIAL_PEER:
                    peers.append(layers.pack_by_standard_library())
            result.add_row(
                *(package, str(len(closure.nodes)), str(len(groups)), f"{megabytes:.0f}"),
                *(f"{seconds:.2f} s, {megabytes / seconds:.0f} MB/s" for seconds in (ours, limit)),
                f"{limit / ours:.0%}",
                *(f"{seconds:.1f} s, {megabytes / seconds:.0f} MB/s" for seconds in peers),
                *(f"{peers[1] / ours:.1f}" for _ in peers[1:]),
            )
    return result


async def realised(
    parts: Parts, settings: Settings, *packages: str
) -> tuple[Closure, tuple[LayerGroup, ...]]:
    """Return the closure of some packages, built, and its groups, as an image of the Debian set has them."""
    request = of_parts(packages, LATEST, NamePrefixes(Platform.of_host()))
    pin = await parts.sources.of("").pin(LATEST, request.platform)
    nix = parts.stores.nix.of(pin)
    resolver = PackageResolver(parts.stores.nix, parts.stores.index)
    found = await resolver.resolve(pin, request.platform.nix_system, request.all_packages)
    derivations = [each.derivation for each in found.values()]
    roots = settings.data_dir / "bench.roots" / "-".join(packages)
    await nix.realise(derivations, roots, settings.data_dir / "bench.log")
    closure = await nix.closure(each.store_path for each in found.values())
    popularity = Popularity.parse(Path(pin.popularity).read_bytes()) if pin.popularity else Popularity()
    budget = min(settings.max_layers - 1, MOST_STORE_PATH_LAYERS)
    groups = STRATEGIES[settings.layer_strategy](closure, popularity, budget)
    return closure, tuple(sorted(groups, key=lambda group: -group.nar_size))


@dataclass(frozen=True)
class _Layers:
    """The layers of one image, to be packed in `folder`; every way to pack them gives its seconds."""

    store_root: Path
    groups: Sequence[LayerGroup]
    settings: Settings
    folder: Path

    def tars(self) -> list[list[bytes]]:
        reader = StoreReader(self.store_root)
        return [list(archive(layer_entries(reader, group.store_paths))) for group in self.groups]

    async def pack(self, packers: ProcessPool) -> float:
        """Pack into a blob store, as builds do: all is synced."""

        async def layer(group: LayerGroup) -> None:
            with blobs.temporary_file() as file:
                packed = await packers.run(
                    pack_store_paths, self.store_root, group.store_paths, self.settings.compression, file
                )
                await blobs.put(packed.descriptor.digest, file, packed.descriptor.media_type)

        with FileBlobStore(self.folder / "blobs") as blobs:
            began = time.perf_counter()
            async with TaskGroup() as tasks:
                for group in self.groups:
                    tasks.create_task(layer(group))
            seconds = time.perf_counter() - began
        shutil.rmtree(self.folder / "blobs")
        return seconds

    def pack_by_parts(self, tars: Sequence[Sequence[bytes]]) -> float:
        def layer(blocks: Sequence[bytes]) -> None:
            archive_sha256, blob_sha256 = hashlib.sha256(), hashlib.sha256()
            compressor = COMPRESSIONS[self.settings.compression].compressor()
            for block in blocks:
                archive_sha256.update(block)
                blob_sha256.update(compressor.compress(block))
            blob_sha256.update(compressor.flush())

        began = time.perf_counter()
        with ThreadPoolExecutor(self.settings.packing_processes) as threads:
            list(threads.map(layer, tars))
        return time.perf_counter() - began

    def pack_by_pigz(self) -> float:
        """Use as many threads as Chandlery has processes."""
        pigz = ("pigz", "-6", "--no-name", "--processes", str(self.settings.packing_processes))
        began = time.perf_counter()
        for group in self.groups:
            names = [path.base_name for path in group.store_paths]
            command = ("tar", "--create", "--sort=name", "--directory", str(self.store_root), *names)
            with (
                (self.folder / "peer").open("wb") as blob,
                subprocess.Popen(command, stdout=subprocess.PIPE) as tar,
            ):
                subprocess.run(pigz, stdin=tar.stdout, stdout=blob, check=True)
            assert tar.returncode == 0
        return time.perf_counter() - began

    def pack_by_standard_library(self) -> float:
        file = self.folder / "peer"
        began = time.perf_counter()
        for group in self.groups:
            with (
                gzip.open(file, "wb", compresslevel=6) as stream,
                tarfile.open(fileobj=stream, mode="w|") as tar,
            ):
                for path in group.store_paths:
                    tar.add(self.store_root / path.base_name, f"nix/store/{path.base_name}")
            with file.open("rb") as blob:
                hashlib.file_digest(blob, "sha256")
        return time.perf_counter() - began
