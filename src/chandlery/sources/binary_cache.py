"""What a binary cache knows of its store paths: names, sizes and references, from its narinfo files.

A channel of nixpkgs has 100,000 store paths and more, each with a file of its own: many are fetched at a
time, and what came is kept in a journal, so that a crawl that was interrupted goes on where it was.
"""

import asyncio
import lzma
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol
from urllib.parse import unquote, urlsplit

import httpx

from chandlery.errors import SourceUnavailableError
from chandlery.nix.closure import StorePath
from chandlery.plan.package_clusters import measure
from chandlery.plan.package_graph import PackageGraph
from chandlery.plan.popularity import Popularity, output_name

CONNECTIONS = 64
_ATTEMPTS = 4
_TIMEOUT = 30.0
# Seconds, and twice as many with each attempt.
_PAUSE = 0.5
_MISSING = "-"


@dataclass(frozen=True, slots=True)
class NarInfo:
    """What counts here of a narinfo file: the nar size in bytes, and base names of references."""

    nar_size: int
    references: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "NarInfo":
        """Read a narinfo file; `ValueError` if it is none."""
        fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
        if "NarSize" not in fields:
            raise ValueError("it has no NarSize")
        return cls(int(fields["NarSize"]), tuple(fields.get("References", "").split()))


class BinaryCache(Protocol):
    """A place of narinfo files."""

    async def store_paths(self) -> list[str]:
        """List base names, sorted; `SourceUnavailableError` if there is no list."""
        ...

    async def narinfo(self, base_name: str) -> str | None:
        """Read one file; None if there is none."""
        ...


class CacheFolder:
    """A cache in a folder, as `nix copy --to file:///...` makes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def store_paths(self) -> list[str]:
        """Read the names from the files themselves, which are named by hashes alone."""
        try:
            files = sorted(self._folder.glob("*.narinfo"))
            lines = [line for file in files for line in file.read_text().splitlines()]
        except OSError as error:
            raise SourceUnavailableError(str(self._folder), str(error)) from error
        paths = (line.removeprefix("StorePath: ") for line in lines if line.startswith("StorePath: "))
        found = _base_names(paths)
        if not found:
            raise SourceUnavailableError(str(self._folder), "it has no narinfo files")
        return found

    async def narinfo(self, base_name: str) -> str | None:
        """Read one file."""
        file = self._folder / f"{base_name[:32]}.narinfo"
        return file.read_text() if file.exists() else None


class HttpCache:
    """A cache on a server, and the address of the list of its store paths (lines; xz if it ends in .xz)."""

    def __init__(
        self, client: httpx.AsyncClient, address: str, list_address: str, pause: float = _PAUSE
    ) -> None:
        self._client = client
        self._address = address.rstrip("/")
        self._list = list_address
        self._pause = pause

    async def store_paths(self) -> list[str]:
        """Fetch the list."""
        response = await self._get(self._list)
        if response is None:
            raise SourceUnavailableError(self._list, "there is no list of store paths")
        try:
            content = lzma.decompress(response.content) if self._list.endswith(".xz") else response.content
        except lzma.LZMAError as error:
            raise SourceUnavailableError(self._list, str(error)) from error
        found = _base_names(content.decode(errors="replace").split())
        if not found:
            raise SourceUnavailableError(self._list, "it lists no store paths")
        return found

    async def narinfo(self, base_name: str) -> str | None:
        """Fetch one file."""
        response = await self._get(f"{self._address}/{base_name[:32]}.narinfo")
        return response.text if response else None

    async def _get(self, address: str) -> httpx.Response | None:
        for attempt in range(_ATTEMPTS):
            try:
                response = await self._client.get(address)
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            else:
                # S3, and so cache.nixos.org, says 403 of what isn't there.
                if response.status_code in (httpx.codes.NOT_FOUND, httpx.codes.FORBIDDEN):
                    return None
                if response.is_success:
                    return response
                reason = f"the answer is {response.status_code}"
                if not response.is_server_error and response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                    break
            if attempt + 1 < _ATTEMPTS:
                await asyncio.sleep(self._pause * 2**attempt)
        raise SourceUnavailableError(address, reason)


@asynccontextmanager
async def open_cache(address: str, list_address: str = "") -> AsyncIterator[BinaryCache]:
    """Open a cache: an http(s) or file URL. Without a list's address it is the cache's own store-paths.xz."""
    url = urlsplit(address)
    if url.scheme == "file":
        yield CacheFolder(Path(unquote(url.path)))
        return
    limits = httpx.Limits(max_connections=CONNECTIONS)
    async with httpx.AsyncClient(limits=limits, timeout=_TIMEOUT, follow_redirects=True) as client:
        yield HttpCache(client, address, list_address or f"{address.rstrip('/')}/store-paths.xz")


async def crawl(
    cache: BinaryCache,
    base_names: Collection[str],
    journal: Path,
    advance: Callable[[int], None] = lambda _: None,
    connections: int = CONNECTIONS,
) -> dict[str, NarInfo]:
    """Read the narinfo of each store path that the journal lacks; `advance` is told how many came.

    What the cache hasn't is left out. The journal grows line by line; one that a kill cut off doesn't count.
    """
    known = _read_journal(journal)
    advance(sum(name in known for name in base_names))
    waiting = iter([name for name in base_names if name not in known])
    with journal.open("a", encoding="utf-8") as file:
        workers = [_worker(cache, waiting, known, file, advance) for _ in range(connections)]
        try:
            async with asyncio.TaskGroup() as tasks:
                for worker in workers:
                    tasks.create_task(worker)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
    return {name: found for name in base_names if (found := known[name]) is not None}


async def _worker(
    cache: BinaryCache,
    waiting: Iterator[str],
    known: dict[str, NarInfo | None],
    journal: IO[str],
    advance: Callable[[int], None],
) -> None:
    for name in waiting:
        text = await cache.narinfo(name)
        try:
            found = NarInfo.parse(text) if text is not None else None
        except ValueError as error:
            raise SourceUnavailableError(f"{name[:32]}.narinfo", f"no narinfo file: {error}") from error
        known[name] = found
        what = " ".join([str(found.nar_size), *found.references]) if found else _MISSING
        journal.write(f"{name} {what}\n")
        journal.flush()
        advance(1)


def popularity_of(
    infos: Mapping[str, NarInfo], always: Collection[str] = (), often: Collection[str] = (), source: str = ""
) -> Popularity:
    """Measure a crawled cache (`package_groups.measure`); a package's outputs are packages of their own."""
    graph = PackageGraph.of(
        {name: (output_name(name[33:]), info.nar_size, info.references) for name, info in infos.items()}
    )
    return measure(graph, always, often, source)


def _base_names(paths: Iterable[str]) -> list[str]:
    found = set()
    for path in paths:
        try:
            found.add(StorePath.parse(path).base_name)
        except ValueError:
            continue
    return sorted(found)


def _read_journal(journal: Path) -> dict[str, NarInfo | None]:
    if not journal.exists():
        return {}
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        journal.write_bytes(whole)
    known: dict[str, NarInfo | None] = {}
    for line in whole.decode().splitlines():
        name, size, *references = line.split(" ")
        known[name] = None if size == _MISSING else NarInfo(int(size), tuple(references))
    return known
