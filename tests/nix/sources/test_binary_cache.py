import asyncio
import lzma
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from chandlery.errors import SourceUnavailableError
from chandlery.nix.closure import StorePath
from chandlery.nix.nix import Nix, NixLimits, NixOptions
from chandlery.sources.binary_cache import CacheFolder, HttpCache, NarInfo, crawl, open_cache, popularity_of
from tests.support.binary_cache_server import Server, base_name, narinfo, served
from tests.support.nix_package_set import packages, requires_nix, resolve

APP, LIB, OUTPUT, GONE = (
    base_name(0, "app-1.0"),
    base_name(1, "lib-2"),
    base_name(2, "lib-2-dev"),
    base_name(3, "gone-1"),
)


@pytest.fixture
def server() -> Iterator[Server]:
    paths = "".join(f"/nix/store/{name}\n" for name in (LIB, APP, OUTPUT, GONE))
    files = {
        "/store-paths.xz": lzma.compress(paths.encode()),
        "/store-paths": paths.encode(),
        f"/{APP[:32]}.narinfo": narinfo(APP, 10, APP, LIB).encode(),
        f"/{LIB[:32]}.narinfo": narinfo(LIB, 20).encode(),
        f"/{OUTPUT[:32]}.narinfo": narinfo(OUTPUT, 30, LIB).encode(),
    }
    with served(Server(files)) as running:
        yield running


@pytest.fixture
async def cache(server: Server) -> AsyncIterator[HttpCache]:
    async with httpx.AsyncClient() as client:
        yield HttpCache(client, server.url, f"{server.url}/store-paths.xz", pause=0)


EXPECTED = {APP: NarInfo(10, (APP, LIB)), LIB: NarInfo(20, ()), OUTPUT: NarInfo(30, (LIB,))}


async def test_a_cache_on_a_server_is_read(cache: HttpCache, tmp_path: Path) -> None:
    came: list[int] = []
    names = await cache.store_paths()

    assert names == [APP, LIB, OUTPUT, GONE]
    assert await crawl(cache, names, tmp_path / "journal", came.append) == EXPECTED
    assert sum(came) == 4


async def test_a_plain_list_is_read(server: Server) -> None:
    async with open_cache(server.url, f"{server.url}/store-paths") as cache:
        assert await cache.store_paths() == [APP, LIB, OUTPUT, GONE]


async def test_what_came_is_not_asked_for_again(cache: HttpCache, server: Server, tmp_path: Path) -> None:
    names = await cache.store_paths()
    await crawl(cache, [LIB, GONE], tmp_path / "journal")
    # As a kill in the middle of a line leaves it.
    with (tmp_path / "journal").open("a") as journal:
        journal.write(f"{APP} 1")
    server.asked.clear()

    assert await crawl(cache, names, tmp_path / "journal") == EXPECTED
    assert sorted(server.asked_narinfos) == [f"/{APP[:32]}.narinfo", f"/{OUTPUT[:32]}.narinfo"]


async def test_an_interrupted_crawl_keeps_what_came(cache: HttpCache, server: Server, tmp_path: Path) -> None:
    server.failing[f"/{OUTPUT[:32]}.narinfo"] = 99

    with pytest.raises(SourceUnavailableError, match="the answer is 503"):
        await crawl(cache, [APP, LIB, OUTPUT], tmp_path / "journal", connections=1)
    assert len((tmp_path / "journal").read_text().splitlines()) == 2


async def test_a_server_that_fails_is_asked_again(cache: HttpCache, server: Server, tmp_path: Path) -> None:
    server.failing = {f"/{APP[:32]}.narinfo": 2, "/store-paths.xz": 1}
    names = await cache.store_paths()
    assert await crawl(cache, names, tmp_path / "journal") == EXPECTED


async def test_a_cancelled_crawl_ends(cache: HttpCache, server: Server, tmp_path: Path) -> None:
    server.failing[f"/{APP[:32]}.narinfo"] = 10**6
    slow = HttpCache(httpx.AsyncClient(), server.url, "", pause=3600)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await crawl(slow, [APP], tmp_path / "journal")


@pytest.mark.parametrize("content", [b"<html>", b""])
async def test_a_list_of_nothing_is_refused(server: Server, content: bytes) -> None:
    server.files["/store-paths"] = content
    async with open_cache(server.url, f"{server.url}/store-paths") as cache:
        with pytest.raises(SourceUnavailableError, match="lists no store paths"):
            await cache.store_paths()


async def test_a_list_that_is_no_xz_is_refused(cache: HttpCache, server: Server) -> None:
    server.files["/store-paths.xz"] = b"not xz"
    with pytest.raises(SourceUnavailableError):
        await cache.store_paths()


async def test_a_missing_list_is_told(server: Server) -> None:
    async with open_cache(f"{server.url}/nowhere") as cache:
        with pytest.raises(SourceUnavailableError, match="no list of store paths"):
            await cache.store_paths()


async def test_what_is_no_narinfo_is_told(cache: HttpCache, server: Server, tmp_path: Path) -> None:
    server.files[f"/{LIB[:32]}.narinfo"] = b"<html>"
    with pytest.raises(SourceUnavailableError, match="no narinfo file"):
        await crawl(cache, [LIB], tmp_path / "journal")


def test_popularity_of_a_cache_tells_outputs_apart() -> None:
    popularity = popularity_of(EXPECTED, source="here")
    assert dict(popularity) == {"app": 1, "lib": 3, "lib-dev": 1}
    assert popularity.source == "here"


async def test_a_folder_without_narinfo_files_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailableError, match="no narinfo files"):
        await CacheFolder(tmp_path).store_paths()


async def test_a_folder_is_read(server: Server, tmp_path: Path) -> None:
    for path, content in server.files.items():
        if path.endswith(".narinfo"):
            (tmp_path / path[1:]).write_bytes(content)
    async with open_cache(tmp_path.as_uri()) as cache:
        names = await cache.store_paths()
        assert names == [APP, LIB, OUTPUT]
        assert await crawl(cache, [*names, GONE], tmp_path / "journal") == EXPECTED


def copy(store: Path, path: StorePath, cache: Path) -> None:
    command = ["nix", "--extra-experimental-features", "nix-command", "copy", "--no-check-sigs"]
    subprocess.run(
        [*command, "--store", str(store), "--to", cache.as_uri(), path.text], check=True, capture_output=True
    )


@pytest.mark.nix
@requires_nix
async def test_what_nix_copied_is_read(tmp_path: Path) -> None:
    source = packages(
        tmp_path / "set",
        'lib = build "lib-2" "echo lib > $out"; app = build "app-1" "echo ${lib} > $out";',
    )
    store, copied = tmp_path / "store", tmp_path / "cache"
    nix = Nix(store, NixLimits(jobs=1), NixOptions(substituters=()))
    app = await resolve(nix, source, "app")
    await nix.realise([f"{app.derivation}!{app.output}"], tmp_path / "roots", tmp_path / "log")
    closure = await nix.closure([app.store_path])
    copy(store, app.store_path, copied)

    async with open_cache(copied.as_uri()) as cache:
        infos = await crawl(cache, await cache.store_paths(), tmp_path / "journal")

    assert infos == {
        node.path.base_name: NarInfo(node.nar_size, tuple(path.base_name for path in node.references))
        for node in closure.nodes
    }
    assert dict(popularity_of(infos)) == {"app": 1, "lib": 2}
