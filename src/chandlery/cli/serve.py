"""`chandlery serve`: try what can be tried before the first request, then start the workers."""

import asyncio
import ctypes
import os
import resource
import signal
import socket
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import structlog
import typer
from granian import Granian
from granian.constants import Interfaces
from granian.log import LogLevels
from starlette.applications import Starlette

from chandlery.access.client_address import is_loopback
from chandlery.cli.options import Compression, DataDir, MaxLayers, SettingsFile, Source
from chandlery.errors import SettingsError
from chandlery.image.name import LATEST
from chandlery.machine.temporary_folder import TemporaryFolder
from chandlery.nix.stores import AS_ROOT, AS_USER, MIXED, UNMIXED
from chandlery.plan.popularity import Popularity
from chandlery.server.app import create_app
from chandlery.server.parts import (
    HIDDEN,
    SHOWN,
    access_control,
    certificate,
    hides_images,
    open_parts,
    trust_domains,
)
from chandlery.server.tls import OLDEST_PROTOCOL, CertificateCopy
from chandlery.settings.settings import Settings
from chandlery.settings.values import without_secrets
from chandlery.storage.kinds import check_storage
from chandlery.telemetry import logs

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_PR_SET_PDEATHSIG = 1
_MOST_FILES = 65536


def serve(
    host: Annotated[
        str | None, typer.Option(help="The address to listen on. [default: 127.0.0.1]", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="The port to listen on. [default: 8080]", show_default=False)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that answer requests. [default: 1]", show_default=False),
    ] = None,
    data_dir: DataDir = None,
    source: Source = None,
    platforms: Annotated[
        str | None,
        typer.Option(
            help="The platforms of image names that choose none: amd64,arm64. [default: what the source can]",
            show_default=False,
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="A bucket for blobs: s3://, gs:// or az://BUCKET/PREFIX. [default: the data folder]",
            show_default=False,
        ),
    ] = None,
    users_file: Annotated[
        Path | None, typer.Option(help="Who may pull: a file that htpasswd -B writes.", show_default=False)
    ] = None,
    anonymous: Annotated[
        str | None,
        typer.Option(
            help="read: who has not logged in may pull, from other machines too.", show_default=False
        ),
    ] = None,
    max_layers: MaxLayers = None,
    compression: Compression = None,
    log_format: Annotated[
        str | None, typer.Option(help="console for people, json for programs. [default: console]")
    ] = None,
    settings_file: SettingsFile = None,
) -> None:
    """Serve images until Ctrl-C.

    An image's name lists its packages: `docker run -it localhost:8080/shell/git/jq`.
    """
    settings = Settings.load(
        settings_file,
        host=host,
        port=port,
        workers=workers,
        data_dir=data_dir,
        source=source,
        platforms=platforms.split(",") if platforms else None,
        storage=storage,
        users_file=users_file,
        anonymous=anonymous,
        max_layers=max_layers,
        compression=compression,
        log_format=log_format,
    )
    logs.configure(settings.log_format)
    for notice in settings.notices:
        log.warning(notice)
    if hides_images(settings):
        log.warning(f"{HIDDEN}: {SHOWN}")
    _allow_connections()
    _check_address(settings)
    # Whatever can't work is said now, in one line, rather than by a worker that dies.
    copy = certificate(settings)
    popularity = _tried(settings, copy)
    encrypted = copy or is_loopback(settings.host) or settings.public_url.startswith("https:")
    if settings.users_file and not encrypted:
        typer.echo("Passwords come unencrypted: set tls_certificate and tls_key, or public_url.", err=True)
    _serve(settings, copy, popularity)


def _allow_connections() -> None:
    """Let the server have as many files open as it may: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Programs that close all that they might have open take their time where the limit is a billion.
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _tried(settings: Settings, copy: CertificateCopy | None) -> Popularity:
    """Do what `_check` does; at SIGTERM, die of it when the programs have ended that it was waiting for."""

    async def cancelled_at_sigterm() -> Popularity:
        checking = asyncio.ensure_future(_check(settings, copy))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, checking.cancel)
        return await checking

    try:
        return asyncio.run(cancelled_at_sigterm())
    except asyncio.CancelledError:
        os.kill(os.getpid(), signal.SIGTERM)
        raise


def _serve(settings: Settings, copy: CertificateCopy | None, popularity: Popularity) -> None:
    """Say where the server is, and be it until it is stopped."""
    scheme, pem = ("https", copy.file) if copy else ("http", None)
    shown = "localhost" if settings.host in ("127.0.0.1", "0.0.0.0", "::1", "::") else settings.host  # noqa: S104
    source = without_secrets(settings.source)
    typer.echo(f"Chandlery serves {source} at {scheme}://{settings.host}:{settings.port}/. Try:\n")
    typer.echo(f"  docker run -it {shown}:{settings.port}/shell/git/jq\n")
    server = Granian(
        "chandlery.server.app:create_app",
        address=settings.host,
        port=settings.port,
        interface=Interfaces.ASGI,
        workers=settings.workers,
        respawn_failed_workers=True,
        websockets=False,
        workers_kill_timeout=settings.stop_timeout,
        log_level=LogLevels.warning,
        ssl_cert=pem,
        ssl_key=pem,
        ssl_protocol_min=OLDEST_PROTOCOL,
    )
    with ExitStack() as stack:
        shared = None
        if settings.workers > 1:
            shared = stack.enter_context(TemporaryFolder(settings.data_dir / "tmp")).path
        load = partial(_load, settings, os.getpid(), shared, popularity)
        server.serve(target_loader=load, wrap_loader=False)


def _load(settings: Settings, server: int, shared: Path | None, popularity: Popularity) -> Starlette:
    """Make the application in a worker of the server; see `create_app`."""
    # A worker whose server was killed would keep the port: it is to go too (prctl(2)).
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != server:
        raise SystemExit(1)
    logs.configure(settings.log_format)
    return create_app(settings, shared, popularity)


async def _check(settings: Settings, copy: CertificateCopy | None) -> Popularity:
    """Try all that can be tried before the first request; what takes longest comes last.

    Gives the table of popularity: whenever they start, workers of one server have the same.
    """
    if settings.storage:
        await check_storage(settings.storage, settings.data_dir, settings.storage_options)
    async with open_parts(settings) as parts:
        access_control(settings)
        if copy:
            await asyncio.to_thread(copy.update)
        await parts.nix("").check_build()
        if parts.stores.nix.reach_the_kernel:
            log.warning(f"{AS_ROOT}: {AS_USER}")
        if parts.stores.nix.mix(trust_domains(parts.sources)):
            log.warning(f"{MIXED}: {UNMIXED}")
        await parts.sources.of("").pin(LATEST, parts.sources.platforms("")[0])
        return parts.popularity


def _check_address(settings: Settings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise SettingsError(
                f"can't listen on {settings.host} port {settings.port}: {error.strerror}: "
                "stop what listens there, or choose another with --port or --host"
            ) from error
