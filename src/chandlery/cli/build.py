"""`chandlery build`: one image without a server."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from chandlery.cli.options import Compression, DataDir, MaxLayers, SettingsFile, Source
from chandlery.errors import PackagesNotFoundError, SettingsError
from chandlery.image import name as image_name
from chandlery.image.name import LATEST, ImageRequest
from chandlery.layers.root_layer import RootLayerOptions
from chandlery.machine.temporary_folder import TemporaryFolder
from chandlery.nix.closure import StorePath
from chandlery.nix.nix import Nix
from chandlery.oci import layout as image_output
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, ManifestFormat
from chandlery.server.parts import name_prefixes, open_images, open_parts
from chandlery.settings.settings import Settings
from chandlery.storage.blob_store import BlobStore, content_md5, content_of, local_files
from chandlery.telemetry import logs
from chandlery.telemetry.build_timings import WorkTime


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
    request = image_name.of_parts(packages, LATEST, name_prefixes(settings))
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
        """Return the contract of one build: the manifest, and place and MD5 (base64) of config and layers.

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
        """Return a summary for people."""
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
            nix = parts.nix(request.source)
            contents = [await _store_path(nix, text, temporary.path) for text in wanted.contents]
            root_layer = RootLayerOptions(*wanted.owner, tuple(contents), wanted.extra_commands)
            # Nobody renews pins in the background here, so whoever waits waits for that too.
            await parts.sources.refresh(request.source)
            async with open_images(settings, parts, root_layer) as images:
                image = await images.image(request)
                builds = images.queue.builds()
        tag = wanted.tag or image.manifests[ManifestFormat.OCI].digest.hex[:32]
        reference = f"{wanted.name}:{tag}"
        manifest = image.manifests[ManifestFormat.OCI]
        if wanted.output is not None:
            needed = (manifest, image.config, *(layer.descriptor for layer in image.layers))
            async with local_files(parts.stores.blobs, [each.digest for each in needed]) as files:
                image_output.write(image, request.platform, reference, files, wanted.output)
        described = [image.config, *(layer.descriptor for layer in image.layers)] if wanted.md5 else []
        md5 = {each.digest: await content_md5(parts.stores.blobs, each.digest) for each in described}
        content = await content_of(parts.stores.blobs, manifest.digest)
        timings = [time for build in builds for time in build.timings.times()] if wanted.timings else None
        return _Built(reference, image, parts.stores.blobs, content, md5, timings)


async def _store_path(nix: Nix, text: str, roots: Path) -> StorePath:
    """Return the store path that `--contents` names, or make one of a file or folder."""
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
