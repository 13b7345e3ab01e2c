"""The `chandlery` command."""

import asyncio
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import structlog
import typer
from granian import Granian
from granian.constants import Interfaces
from granian.log import LogLevels
from starlette.applications import Starlette

from chandlery import __version__
from chandlery.access.client_address import is_loopback
from chandlery.cli import maintenance as maintenance_commands
from chandlery.cli import plan as plan_commands
from chandlery.cli import settings as settings_commands
from chandlery.cli.options import DataDir, SettingsFile
from chandlery.demo.demo import run as run_demo
from chandlery.errors import ChandleryError, PackagesNotFoundError, SettingsError
from chandlery.image import name as image_name
from chandlery.image.name import LATEST, ImageRequest
from chandlery.layers.root_layer import RootLayerOptions
from chandlery.machine.data_folder import TemporaryFolder
from chandlery.nix.closure import StorePath
from chandlery.nix.nix import Nix
from chandlery.oci import layout as image_output
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, ManifestFormat
from chandlery.plan.popularity import Popularity
from chandlery.server.app import (
    access_control,
    certificate,
    create_app,
    image_builder,
    open_parts,
    vocabulary,
)
from chandlery.server.tls import OLDEST_PROTOCOL, CertificateCopy
from chandlery.settings.settings import Settings
from chandlery.settings.values import without_secrets
from chandlery.storage.blob_store import BlobStore, content_md5, content_of, local_files
from chandlery.storage.object_store import check_storage
from chandlery.telemetry import logs
from chandlery.telemetry.build_timings import WorkTime

_PR_SET_PDEATHSIG = 1

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

app = typer.Typer(
    name="chandlery",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="A container registry whose images are built from Nix packages the moment they are pulled.\n\n"
    "Every option can be set by an environment variable, CHANDLERY_ and the option's name in capitals, or in "
    "the TOML file that --settings or CHANDLERY_SETTINGS names. `chandlery config` prints them all.",
)

Source = Annotated[
    str | None,
    typer.Option(
        help="The package set, such as nixpkgs!nixos-unstable, git!URL!BRANCH or path!FOLDER; "
        "or the name of one in the settings file. [default: debian!bookworm]",
        show_default=False,
    ),
]
MaxLayers = Annotated[
    int | None,
    typer.Option(help="Layers per image, the root filesystem's included. [default: 96]", show_default=False),
]
Compression = Annotated[
    str | None, typer.Option(help="Of layers: none, gzip or zstd. [default: gzip]", show_default=False)
]


def main() -> None:
    """Run the command; what went wrong is told in one line on stderr, with exit code 1."""
    try:
        app()
    except ChandleryError as error:
        _fail(str(error))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
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
    _check_address(settings)
    # Whatever can't work is said now, in one line, rather than by a worker that dies.
    copy = certificate(settings)
    popularity = asyncio.run(_check(settings, copy))
    encrypted = copy or is_loopback(settings.host) or settings.public_url.startswith("https:")
    if settings.users_file and not encrypted:
        typer.echo("Passwords come unencrypted: set tls_certificate and tls_key, or public_url.", err=True)
    _serve(settings, copy, popularity)


@app.command()
def build(
    packages: Annotated[
        list[str], typer.Argument(help="The parts of an image name: shell, arm64, amd64, then packages.")
    ],
    name: Annotated[
        str | None, typer.Option(help="The image's name. [default: its parts]", show_default=False)
    ] = None,
    tag: Annotated[
        str | None, typer.Option(help="The image's tag. [default: the build's own hash]", show_default=False)
    ] = None,
    contents: Annotated[
        list[str] | None,
        typer.Option(help="A store path, folder or file to put in beside the packages; repeatable."),
    ] = None,
    extra_commands: Annotated[
        str, typer.Option(help="Bash, run in Nix's sandbox in the folder that will be / before it is packed.")
    ] = "",
    uid: Annotated[int, typer.Option(min=0, help="Who owns what the last layer holds.")] = 0,
    gid: Annotated[int, typer.Option(min=0, help="The group that owns what the last layer holds.")] = 0,
    max_layers: MaxLayers = None,
    source: Source = None,
    compression: Compression = None,
    data_dir: DataDir = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write the image there: an archive for docker load and skopeo if the name ends in .tar, "
            "else a folder with an OCI layout.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest and where each blob is, and nothing else.")
    ] = False,
    timings: Annotated[
        bool, typer.Option("--timings", help="Tell what took how long: works overlap, so each is told alone.")
    ] = False,
    settings_file: SettingsFile = None,
) -> None:
    """Build one image without a server.

    `chandlery build shell git jq --output image.tar`, then `docker load --input image.tar`.
    """
    settings = Settings.load(
        settings_file, data_dir=data_dir, source=source, max_layers=max_layers, compression=compression
    )
    logs.configure(settings.log_format)
    request = image_name.of_parts(packages, LATEST, vocabulary(settings))
    # Attribute paths may have capitals, names of images don't.
    name = name or request.name.lower()
    image_name.check(name, tag or LATEST)
    wanted = _Wanted(name, tag, contents or [], extra_commands, (uid, gid), output, timings, as_json)
    try:
        built = asyncio.run(_build(settings, request, wanted))
    except PackagesNotFoundError as error:
        if not as_json:
            raise
        typer.echo(msgspec.json.encode({"error": "not_found", "pkgs": error.missing}))
        raise typer.Exit(1) from error
    typer.echo(built.as_json() if as_json else built.as_text())


app.command()(maintenance_commands.scrub)
app.command()(maintenance_commands.collect)
app.command()(maintenance_commands.status)
app.command()(plan_commands.plan)
app.command()(plan_commands.popularity)
app.command()(settings_commands.config)
app.command()(settings_commands.doctor)


@app.command()
def demo(source: Source = None) -> None:
    """Start a registry, pull an image from it, and run its programs: a test of everything at once.

    What it starts it stops, and what it makes it removes.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As Ctrl-C: what was started is stopped on the way out.
        signal.signal(number, signal.default_int_handler)
    run_demo(source)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What `chandlery build` was asked for, beside the packages."""

    name: str
    tag: str | None
    contents: Sequence[str]
    extra_commands: str
    owner: tuple[int, int]
    output: Path | None
    timings: bool
    md5: bool


@dataclass(frozen=True, slots=True)
class _Built:
    """What `chandlery build` made, its OCI manifest and its config, and where its blobs are."""

    reference: str
    image: BuiltImage
    blobs: BlobStore
    manifest: bytes
    md5: Mapping[Digest, str]
    timings: Sequence[WorkTime] | None

    def as_json(self) -> bytes:
        """Give the contract of one build: the manifest, and place and MD5 (base64) of config and layers.

        The place is a `path`, or the `url` of an object in a bucket. With timings, these come too.
        """
        place = "path" if self.blobs.on_this_disk else "url"
        return msgspec.json.encode(
            {
                "manifest": msgspec.Raw(self.manifest),
                "layerLocations": {
                    digest.hex: {place: self.blobs.location(digest), "md5": checksum}
                    for digest, checksum in sorted(self.md5.items())
                },
                **({} if self.timings is None else {"timings": self.timings}),
            }
        )

    def as_text(self) -> str:
        """Give a summary for people."""
        size = sum(layer.descriptor.size for layer in self.image.layers)
        return (
            f"{self.reference}\n"
            f"  {self.image.manifests[ManifestFormat.OCI].digest}\n"
            f"  {self.image.store_paths} store paths, {self.image.closure_size / 1e6:.1f} MB\n"
            f"  {len(self.image.layers)} layers, {size / 1e6:.1f} MB" + self._told()
        )

    def _told(self) -> str:
        if self.timings is None:
            return ""
        if not self.timings:
            return "\n\nNothing had to be made."
        rows = [
            f"  {time.work:<8} {time.busy:7.2f} s  from {time.begin:.2f} to {time.end:.2f} s"
            for time in self.timings
        ]
        return "\n\n" + "\n".join(rows)


async def _build(settings: Settings, request: ImageRequest, wanted: _Wanted) -> _Built:
    async with open_parts(settings) as parts:
        with TemporaryFolder(settings.data_dir / "tmp") as temporary:
            contents = [await _store_path(parts.nix, text, temporary.path) for text in wanted.contents]
            root_layer = RootLayerOptions(*wanted.owner, tuple(contents), wanted.extra_commands)
            # Nobody renews pins in the background here, so whoever waits waits for that too.
            await parts.sources.refresh(request.source)
            async with image_builder(settings, parts, root_layer) as builder:
                image = await builder.image(request)
                builds = builder.queue.builds()
        tag = wanted.tag or image.manifests[ManifestFormat.OCI].digest.hex[:32]
        reference = f"{wanted.name}:{tag}"
        manifest = image.manifests[ManifestFormat.OCI]
        if wanted.output is not None:
            needed = (manifest, image.config, *(layer.descriptor for layer in image.layers))
            async with local_files(parts.blobs, [each.digest for each in needed]) as files:
                image_output.write(image, request.platform, reference, files, wanted.output)
        described = [image.config, *(layer.descriptor for layer in image.layers)] if wanted.md5 else []
        md5 = {each.digest: await content_md5(parts.blobs, each.digest) for each in described}
        content = await content_of(parts.blobs, manifest.digest)
        timings = [time for build in builds for time in build.timings.times()] if wanted.timings else None
        return _Built(reference, image, parts.blobs, content, md5, timings)


async def _store_path(nix: Nix, text: str, roots: Path) -> StorePath:
    """Give the store path that `--contents` names, or make one of a file or folder."""
    path = Path(text)
    if path.parent == Path("/nix/store"):
        try:
            store_path = StorePath.parse(text)
        except ValueError as error:
            raise SettingsError(f"--contents {text}: {error}") from error
        await nix.protect(store_path, roots)
        return store_path
    if not path.exists():
        raise SettingsError(f"--contents {text}: there is no such file or folder")
    return await nix.add(path, roots)


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
        await parts.nix.check_build()
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


def _fail(message: str) -> NoReturn:
    typer.echo(f"chandlery: {message}", err=True)
    sys.exit(1)
