import json
import os
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chandlery.errors import StorageError
from chandlery.oci import layout as image_output
from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    MANIFEST_MEDIA_TYPE,
    OCI_CONFIG,
    OCI_LAYER,
    BuiltImage,
    ContainerConfig,
    Descriptor,
    ManifestFormat,
    PackedLayer,
    Platform,
    image_config,
    image_manifest,
)

ARM64 = Platform("linux", "arm64")
REFERENCE = "example.com:5000/shell/git:2.39"
Read = Callable[[str], bytes]


@dataclass(frozen=True)
class SomeImage:
    """An image of two layers that say nothing, and its blobs as files."""

    image: BuiltImage
    blobs: Mapping[Digest, Path]

    def write(self, output: Path) -> None:
        image_output.write(self.image, ARM64, REFERENCE, self.blobs, output)


@pytest.fixture
def some(tmp_path: Path) -> SomeImage:
    folder = tmp_path / "blobs"
    folder.mkdir()
    blobs: dict[Digest, Path] = {}

    def put(content: bytes, media_type: str) -> Descriptor:
        digest = Digest.of(content)
        blobs[digest] = folder / digest.hex
        blobs[digest].write_bytes(content)
        return Descriptor(media_type, digest, len(content))

    layers = [
        PackedLayer(put(text * 1000, f"{OCI_LAYER}+gzip"), Digest.of(text)) for text in (b"one", b"two")
    ]
    config = image_config(ARM64, [(layer, "") for layer in layers], ContainerConfig())
    manifest = image_manifest(ManifestFormat.OCI, config, [layer.descriptor for layer in layers], {})
    manifests = {ManifestFormat.OCI: put(manifest, MANIFEST_MEDIA_TYPE[ManifestFormat.OCI])}
    return SomeImage(BuiltImage(manifests, put(config, OCI_CONFIG), tuple(layers), 2, 2000), blobs)


@pytest.fixture(params=["folder", "image.tar"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def files(output: Path) -> dict[str, bytes]:
    """Return what is in a folder or an archive, by name."""
    if output.is_dir():
        found = (path for path in output.rglob("*") if path.is_file())
        return {str(path.relative_to(output)): path.read_bytes() for path in found}
    with tarfile.open(output) as archive:
        members = {member.name: archive.extractfile(member) for member in archive}
        return {name: file.read() for name, file in members.items() if file}


def document(output: Path, name: str) -> Any:
    return json.loads(files(output)[name])


def test_every_blob_is_in_the_layout_by_its_digest(some: SomeImage, output: Path) -> None:
    some.write(output)
    blobs = {name: content for name, content in files(output).items() if name.startswith("blobs/")}
    assert set(blobs) == {f"blobs/sha256/{digest.hex}" for digest in some.blobs}
    assert all(Digest.of(content).hex == name.rpartition("/")[2] for name, content in blobs.items())


def test_the_index_names_the_manifest_its_platform_and_the_tag(some: SomeImage, output: Path) -> None:
    some.write(output)
    assert document(output, "oci-layout") == {"imageLayoutVersion": "1.0.0"}
    [described] = document(output, "index.json")["manifests"]
    manifest = some.image.manifests[ManifestFormat.OCI]
    assert (described["digest"], described["size"]) == (str(manifest.digest), manifest.size)
    assert described["platform"] == {"os": "linux", "architecture": "arm64"}
    # image-spec, image-layout.md: org.opencontainers.image.ref.name is what comes after the colon here.
    assert described["annotations"]["org.opencontainers.image.ref.name"] == "2.39"


def test_docker_load_finds_name_config_and_layers(some: SomeImage, output: Path) -> None:
    some.write(output)
    [described] = document(output, "manifest.json")
    assert described["RepoTags"] == [REFERENCE]
    named = [described["Config"], *described["Layers"]]
    digests = [some.image.config.digest, *(layer.descriptor.digest for layer in some.image.layers)]
    assert [Digest.of(files(output)[name]) for name in named] == digests


def test_the_same_image_gives_the_same_archive(some: SomeImage, tmp_path: Path) -> None:
    first, second = tmp_path / "first.tar", tmp_path / "second.tar"
    some.write(first)
    for blob in some.blobs.values():
        os.utime(blob, (0, 0))
        blob.chmod(0o600)
    some.write(second)
    assert first.read_bytes() == second.read_bytes()


def test_an_archive_that_is_there_is_replaced(some: SomeImage, tmp_path: Path) -> None:
    output = tmp_path / "image.tar"
    output.write_text("old")
    some.write(output)
    assert tarfile.is_tarfile(output)


def test_a_folder_with_something_in_it_is_left_alone(some: SomeImage, tmp_path: Path) -> None:
    output = tmp_path / "folder"
    output.mkdir()
    (output / "precious").touch()
    with pytest.raises(StorageError, match="folder can't be written: Directory not empty"):
        some.write(output)
    assert [path.name for path in output.iterdir()] == ["precious"]


def test_a_write_that_fails_leaves_what_was_there(some: SomeImage, output: Path, tmp_path: Path) -> None:
    next(iter(some.blobs.values())).unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match="can't be written: No such file"):
        some.write(output)
    assert sorted(tmp_path.iterdir()) == before
