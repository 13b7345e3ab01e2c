"""The certificate that the server shows: a copy of the operator's files, made only of what works.

The server's TLS library (rustls) takes fewer kinds of keys than OpenSSL, and a worker dies of what it can't
read; half a certificate may stand in a file that is just being written. So a worker looks at the files now
and then. When they have changed, a process of its own tries them, with the same library; if that goes well,
they are copied, and the server is asked by SIGHUP for new workers. Each starts beside an old one, which
finishes what it is sending: no connection is cut. What doesn't work changes nothing but the log.
"""

import asyncio
import multiprocessing
import os
import secrets
import signal
import ssl
from contextlib import suppress
from pathlib import Path

import structlog
from granian.constants import Interfaces, SSLProtocols
from granian.log import LogLevels
from granian.server.embed import Server
from starlette.types import Receive, Scope, Send

from chandlery.errors import SettingsError

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

OLDEST_PROTOCOL = SSLProtocols.tls12

# Seconds. A server that can't start fails at once.
_TRIAL = 0.5
_TRIAL_LIMIT = 30.0


class CertificateCopy:
    """One file with a certificate, its chain and its key, made of two others; only its owner may read it."""

    def __init__(self, certificate: Path, key: Path, file: Path) -> None:
        self.file = file
        self._sources = (certificate, key)
        self._refused = b""

    def version(self) -> int | None:
        """Return a number that is another one after each update; None if there is no copy."""
        try:
            return self.file.stat().st_ino
        except FileNotFoundError:
            return None

    def update(self) -> bool:
        """Copy the files if they have changed; tell whether they had.

        Raises `SettingsError` if they don't work, once for each content.
        """
        content = b"\n".join(_read(source) for source in self._sources)
        if content == self._refused or (self.file.exists() and content == self.file.read_bytes()):
            return False
        # Until it is known to be good.
        self._refused = content
        candidate = self.file.with_name(f"{self.file.name}.{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(candidate, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as output:
                output.write(content)
            self._check(candidate)
            candidate.replace(self.file)
        finally:
            candidate.unlink(missing_ok=True)
        self._refused = b""
        return True

    def _check(self, candidate: Path) -> None:
        what = f"the certificate {self._sources[0]} with the key {self._sources[1]}"
        try:
            # An empty password: OpenSSL asks for one at the terminal otherwise.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(candidate, password="")
        except (ssl.SSLError, OSError) as error:
            raise SettingsError(f"{what} can't be used: {error}") from error
        # Not forked: threads of the server may hold locks.
        trial = multiprocessing.get_context("spawn").Process(target=_try, args=(candidate,))
        trial.start()
        trial.join(_TRIAL_LIMIT)
        if trial.exitcode != 0:
            trial.kill()
            raise SettingsError(
                f"{what} can't be used by the server: it takes RSA of 2048 to 4096 bits, ECDSA with P-256 or "
                "P-384, and Ed25519"
            )


class CertificateWatch:
    """What a worker knows of the copy that it shows; one of a server's workers keeps it up to date."""

    def __init__(self, copy: CertificateCopy, interval: float) -> None:
        self._copy = copy
        self._interval = interval
        self._shown = copy.version()

    @property
    def has_successor(self) -> bool:
        """Return whether this worker shows what is outdated, so that another one takes over."""
        return self._copy.version() != self._shown

    async def run(self) -> None:
        """Look at the files every `interval` seconds, for ever."""
        server = os.getppid()
        told = ""
        while True:
            await asyncio.sleep(self._interval)
            try:
                changed = await asyncio.to_thread(self._copy.update)
            except (SettingsError, OSError) as error:
                if told != str(error):
                    log.error("the certificate stays as it was", reason=str(error))
                    told = str(error)
                continue
            if changed:
                log.info("the certificate has changed: new workers take over")
                os.kill(server, signal.SIGHUP)


def _read(source: Path) -> bytes:
    try:
        return source.read_bytes()
    except OSError as error:
        raise SettingsError(f"{source} can't be read: {error.strerror}") from error


def _try(candidate: Path) -> None:
    """Start a server that answers nothing, at a port that nobody knows; the exit code says how that went."""
    # A fault in there is a panic, told at length.
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 2)
    asyncio.run(_serve_for_a_moment(candidate))


async def _serve_for_a_moment(candidate: Path) -> None:
    server = Server(
        _nothing,
        address="127.0.0.1",
        port=0,
        interface=Interfaces.ASGINL,
        log_level=LogLevels.critical,
        ssl_cert=candidate,
        ssl_key=candidate,
        ssl_protocol_min=OLDEST_PROTOCOL,
    )
    with suppress(TimeoutError):
        async with asyncio.timeout(_TRIAL):
            await server.serve()


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    pass
