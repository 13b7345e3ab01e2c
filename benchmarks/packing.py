"""Packing a realised closure: Chandlery, beside the standard library's tarfile and gzip, one by one."""

import gzip
import hashlib
import tarfile
import time
from pathlib import Path

import anyio
import anyio.to_process
from rich.table import Table

from chandlery.app import Parts, open_parts
from chandlery.closure import Closure
from chandlery.image_name import LATEST, Vocabulary, of_parts
from chandlery.layer_archive import pack_store_paths
from chandlery.layer_plan import STRATEGIES, LayerGroup
from chandlery.oci import Platform
from chandlery.package_resolver import PackageResolver
from chandlery.settings import Settings

_PACKAGES = ("git", "python3", "ffmpeg")
_LAYERS = 94


async def table(data_dir: Path) -> Table:
    """Pack each closure both ways, from files that are in memory already; sizes are nar sizes."""
    result = Table("packing", "store paths", "MB", "Chandlery", "tarfile + gzip", "times as fast")
    settings = Settings.load(data_dir=data_dir)
    async with open_parts(settings) as parts:
        for package in _PACKAGES:
            closure = await _realised(parts, package, data_dir)
            groups = STRATEGIES[settings.layer_strategy](closure, {}, _LAYERS)
            await _chandlery(parts, groups, settings, data_dir)
            began = time.perf_counter()
            await _chandlery(parts, groups, settings, data_dir)
            ours = time.perf_counter() - began
            began = time.perf_counter()
            _standard_library(parts.nix.store_root, groups, data_dir)
            theirs = time.perf_counter() - began
            megabytes = closure.nar_size / 1e6
            result.add_row(
                package,
                str(len(closure.nodes)),
                f"{megabytes:.0f}",
                f"{ours:.1f} s, {megabytes / ours:.0f} MB/s",
                f"{theirs:.1f} s, {megabytes / theirs:.0f} MB/s",
                f"{theirs / ours:.1f}",
            )
    return result


async def _realised(parts: Parts, package: str, data_dir: Path) -> Closure:
    request = of_parts([package], LATEST, Vocabulary(Platform.of_host()))
    pin = await parts.sources.of("").pin(LATEST, request.platform)
    resolver = PackageResolver(parts.nix, parts.index)
    found = await resolver.resolve(pin, request.platform.nix_system, request.all_packages)
    derivations = [each.derivation for each in found.values()]
    await parts.nix.realise(derivations, data_dir / "bench.roots" / package, data_dir / "bench.log")
    return await parts.nix.closure(each.store_path for each in found.values())


async def _chandlery(parts: Parts, groups: tuple[LayerGroup, ...], settings: Settings, folder: Path) -> None:
    limiter = anyio.CapacityLimiter(settings.packing_processes)
    ordered = sorted(groups, key=lambda group: -group.nar_size)

    async def one(number: int, group: LayerGroup) -> None:
        file = folder / f"bench-{number}"
        await anyio.to_process.run_sync(
            pack_store_paths,
            parts.nix.store_root,
            group.store_paths,
            settings.compression,
            file,
            limiter=limiter,
        )
        file.unlink()

    async with anyio.create_task_group() as tasks:
        for number, group in enumerate(ordered):
            tasks.start_soon(one, number, group)


def _standard_library(store_root: Path, groups: tuple[LayerGroup, ...], folder: Path) -> None:
    file = folder / "bench-peer"
    for group in groups:
        with gzip.open(file, "wb", compresslevel=6) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
            for path in group.store_paths:
                tar.add(store_root / path.base_name, f"nix/store/{path.base_name}")
        with file.open("rb") as blob:
            hashlib.file_digest(blob, "sha256")
    file.unlink()
