"""Fetching over http and https, and from files, from an address that is a template in the settings.

Credentials in an address (`https://user:password@host/`) are sent to that host alone, and are in no message;
nor are queries, which may hold tokens. Redirects are followed, but never from https to http. Proxies and
certificates are those of the usual variables (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE).
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx

from chandlery.errors import ChandleryError

_PIECE = 1 << 18

T = TypeVar("T")


class DownloadFailedError(ChandleryError):
    """Something could not be fetched; the text names its address. It is `missing` if a server says so.

    `transient` tells that the same may succeed a moment later.
    """

    def __init__(self, address: str, reason: str, *, missing: bool = False, transient: bool = False) -> None:
        super().__init__(f"{address}: {reason}")
        self.address = address
        self.reason = reason
        self.missing = missing
        self.transient = transient


@dataclass(frozen=True, slots=True)
class DownloadLimits:
    """In seconds: to connect, without a byte, and in all; and the pauses before it is tried once more."""

    connect: float = 10.0
    silence: float = 30.0
    total: float = 1800.0
    pauses: Sequence[float] = (1.0, 5.0)


@dataclass(frozen=True, slots=True)
class Address:
    """Where something is fetched: a URL without credentials, or a file."""

    url: str = ""
    file: Path | None = None
    user: str | None = None
    password: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read http:, https: and file: URLs and absolute paths; `ValueError` for anything else."""
        if text.startswith("/"):
            return cls(file=Path(text))
        parts = urlsplit(text)
        if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
            return cls(file=Path(unquote(parts.path)))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("write https://..., http://..., file:///... or an absolute path")
        host = parts.netloc.rpartition("@")[2]
        url = urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
        try:
            httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError("it is not a valid URL") from error
        return cls(
            url,
            user=None if parts.username is None else unquote(parts.username),
            password=unquote(parts.password or ""),
        )

    def __str__(self) -> str:
        if self.file is not None:
            return str(self.file)
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))


async def fetch(
    address: Address, consume: Callable[[Callable[[], bytes]], T], limits: DownloadLimits | None = None
) -> T:
    """Let `consume` read what is at an address, in a thread; give what it gives.

    It gets a function that gives the next bytes, and none at the end. When this is cancelled, that function
    raises, and `consume` has ended when this ends. Raises `DownloadFailedError`, and what `consume` raises.
    """
    limits = limits or DownloadLimits()
    if address.file is not None:
        return await asyncio.to_thread(_consume_file, address, address.file, consume)
    try:
        async with asyncio.timeout(limits.total), _response(address, limits) as response:
            return await _consume_pieces(response.aiter_raw(_PIECE), consume)
    except TimeoutError as error:
        reason = f"not everything came within {limits.total:g} s"
        raise DownloadFailedError(str(address), reason, transient=True) from error
    except httpx.HTTPError as error:
        raise DownloadFailedError(str(address), _reason(error, limits), transient=True) from error


async def fetch_text(address: Address, size: int, limits: DownloadLimits | None = None) -> str:
    """Return a small text; one of more than `size` bytes is cut off there."""

    def consume(read: Callable[[], bytes]) -> bytes:
        text = b""
        while len(text) < size and (piece := read()):
            text += piece
        return text[:size]

    return (await fetch(address, consume, limits)).decode(errors="replace")


async def retried(attempt: Callable[[], Awaitable[T]], pauses: Sequence[float]) -> T:
    """Try again after each of these pauses (seconds), as long as that may help."""
    for pause in pauses:
        try:
            return await attempt()
        except DownloadFailedError as error:
            if not error.transient:
                raise
        await asyncio.sleep(pause)
    return await attempt()


@asynccontextmanager
async def _response(address: Address, limits: DownloadLimits) -> AsyncIterator[httpx.Response]:
    """Ask, and give the response if it has what was asked for."""
    # It takes a tenth of a second of work.
    certificates = await asyncio.to_thread(_certificates)
    secure = False

    async def refuse_downgrade(request: httpx.Request) -> None:
        nonlocal secure
        if secure and request.url.scheme != "https":
            raise DownloadFailedError(str(address), "it redirects from https to http, which isn't followed")
        secure = request.url.scheme == "https"

    async with (
        _client(address, limits, certificates, refuse_downgrade) as client,
        client.stream(
            "GET", address.url, auth=None if address.user is None else (address.user, address.password)
        ) as response,
    ):
        status = response.status_code
        if status != httpx.codes.OK:
            raise DownloadFailedError(
                str(address),
                f"the answer is {status} {response.reason_phrase}".rstrip(),
                missing=status in (httpx.codes.NOT_FOUND, httpx.codes.GONE),
                transient=status >= 500 or status in (408, 425, 429),
            )
        yield response


def _certificates() -> ssl.SSLContext:
    context = httpx.create_ssl_context()
    # Those that httpx brings know nothing of an operator's own.
    context.load_default_certs()
    return context


def _client(
    address: Address,
    limits: DownloadLimits,
    certificates: ssl.SSLContext,
    on_request: Callable[[httpx.Request], Awaitable[None]],
) -> httpx.AsyncClient:
    try:
        return httpx.AsyncClient(
            follow_redirects=True,
            max_redirects=10,
            timeout=httpx.Timeout(limits.silence, connect=limits.connect),
            verify=certificates,
            event_hooks={"request": [on_request]},
            # What is asked for is compressed already, and is wanted as it is.
            headers={"Accept-Encoding": "identity"},
        )
    except ValueError as error:
        # Its text may have a password.
        raise DownloadFailedError(str(address), "a proxy of the environment has no valid URL") from error


async def _consume_pieces(pieces: AsyncIterator[bytes], consume: Callable[[Callable[[], bytes]], T]) -> T:
    loop = asyncio.get_running_loop()
    stopped = False
    receiving: asyncio.Task[bytes] | None = None

    async def receive() -> bytes:
        nonlocal receiving
        if stopped:
            raise asyncio.CancelledError
        receiving = asyncio.current_task()
        try:
            return await anext(pieces, b"")
        finally:
            receiving = None

    def read() -> bytes:
        return asyncio.run_coroutine_threadsafe(receive(), loop).result()

    consuming = asyncio.create_task(asyncio.to_thread(consume, read))
    try:
        return await asyncio.shield(consuming)
    finally:
        # A thread can't be cancelled; but it reads.
        stopped = True
        if receiving is not None:
            receiving.cancel()
        await asyncio.wait([consuming])
        if not consuming.cancelled():
            consuming.exception()


def _consume_file(address: Address, path: Path, consume: Callable[[Callable[[], bytes]], T]) -> T:
    try:
        file = path.open("rb")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise DownloadFailedError(str(address), error.strerror or str(error), missing=missing) from error

    def read() -> bytes:
        try:
            return file.read(_PIECE)
        except OSError as error:
            raise DownloadFailedError(str(address), error.strerror or str(error)) from error

    with file:
        return consume(read)


def _reason(error: httpx.HTTPError, limits: DownloadLimits) -> str:
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection within {limits.connect:g} s"
    if isinstance(error, httpx.TimeoutException):
        return f"nothing came for {limits.silence:g} s"
    return str(error) or type(error).__name__
