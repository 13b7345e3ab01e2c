import asyncio
import lzma
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from chandlery.errors import SourceUnavailableError
from chandlery.sources.binary_cache import HttpCache, crawl, open_cache
from tests.support.binary_cache_server import (
    APP,
    GONE,
    INFOS,
    LIB,
    OUTPUT,
    Server,
    narinfo,
    served,
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


async def test_a_cache_on_a_server_is_read(cache: HttpCache, tmp_path: Path) -> None:
    came: list[int] = []
    names = await cache.store_paths()

    assert names == [APP, LIB, OUTPUT, GONE]
    assert await crawl(cache, names, tmp_path / "journal", came.append) == INFOS
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

    assert await crawl(cache, names, tmp_path / "journal") == INFOS
    assert sorted(server.asked_narinfos) == [f"/{APP[:32]}.narinfo", f"/{OUTPUT[:32]}.narinfo"]


async def test_an_interrupted_crawl_keeps_what_came(cache: HttpCache, server: Server, tmp_path: Path) -> None:
    server.failing[f"/{OUTPUT[:32]}.narinfo"] = 99

    with pytest.raises(SourceUnavailableError, match="the answer is 503"):
        await crawl(cache, [APP, LIB, OUTPUT], tmp_path / "journal", connections=1)
    assert len((tmp_path / "journal").read_text().splitlines()) == 2


async def test_a_server_that_fails_is_asked_again(cache: HttpCache, server: Server, tmp_path: Path) -> None:
    server.failing = {f"/{APP[:32]}.narinfo": 2, "/store-paths.xz": 1}
    names = await cache.store_paths()
    assert await crawl(cache, names, tmp_path / "journal") == INFOS


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


async def test_a_folder_is_read(server: Server, tmp_path: Path) -> None:
    for path, content in server.files.items():
        if path.endswith(".narinfo"):
            (tmp_path / path[1:]).write_bytes(content)
    async with open_cache(tmp_path.as_uri()) as cache:
        names = await cache.store_paths()
        assert names == [APP, LIB, OUTPUT]
        assert await crawl(cache, [*names, GONE], tmp_path / "journal") == INFOS
