"""A built image as files: an OCI layout in a folder, or in one archive that `docker load` takes too."""

import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

from chandlery.errors import StorageError
from chandlery.oci.digest import Digest
from chandlery.oci.documents import OCI_INDEX, BuiltImage, ManifestFormat, Platform, canonical_json

_LAYOUT_FILE = canonical_json({"imageLayoutVersion": "1.0.0"})


def write(
    image: BuiltImage, target: Platform, reference: str, blobs: Mapping[Digest, Path], output: Path
) -> None:
    """Write an image to `output`: an archive if its name ends in `.tar`, else a folder.

    `reference` is the name and tag by which `docker load` will know it; `blobs` are the image's, as files. It
    is made aside and renamed, so that what is at `output` is whole; a folder must be new or empty. Raises
    `StorageError`.
    """
    aside = output.absolute().parent / f".{output.name}.{os.getpid()}"
    try:
        if output.suffix == ".tar":
            _write_archive(aside, _files(image, target, reference, blobs))
        else:
            _write_folder(aside, _files(image, target, reference, blobs))
        aside.rename(output)
    except OSError as error:
        raise StorageError(f"{output} can't be written: {error.strerror or error}") from error
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


def _files(
    image: BuiltImage, target: Platform, reference: str, blobs: Mapping[Digest, Path]
) -> Iterator[tuple[str, bytes | Path]]:
    """Yield the files of an OCI image layout (image-spec, image-layout.md), and Docker's `manifest.json`."""
    manifest = image.manifests[ManifestFormat.OCI]
    tag = reference.rpartition(":")[2]
    described = {
        **manifest.to_json(),
        "platform": {"os": target.os, "architecture": target.architecture},
        "annotations": {"org.opencontainers.image.ref.name": tag, "io.containerd.image.name": reference},
    }
    yield "oci-layout", _LAYOUT_FILE
    yield "index.json", canonical_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [described]})
    layers = [_blob_name(layer.descriptor.digest) for layer in image.layers]
    # What `docker save` writes and every version of `docker load` reads.
    docker = [{"Config": _blob_name(image.config.digest), "RepoTags": [reference], "Layers": layers}]
    yield "manifest.json", canonical_json(docker)
    for digest, file in sorted(blobs.items()):
        yield _blob_name(digest), file


def _blob_name(digest: Digest) -> str:
    return f"blobs/sha256/{digest.hex}"


def _write_folder(folder: Path, files: Iterator[tuple[str, bytes | Path]]) -> None:
    for name, content in files:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            place.write_bytes(content)
        else:
            shutil.copyfile(content, place)


def _write_archive(archive: Path, files: Iterator[tuple[str, bytes | Path]]) -> None:
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.mtime = 1
            if isinstance(content, bytes):
                entry.size = len(content)
                tar.addfile(entry, BytesIO(content))
            else:
                entry.size = content.stat().st_size
                with content.open("rb") as file:
                    tar.addfile(entry, file)
