"""The nouns of the OCI image-spec, and their canonical JSON.

The same value always gives the same bytes: keys are sorted, nothing is optional by chance, and no clock is
read. Docker's schema 2 differs only in its media types, so one image has two manifests, each with a digest of
its own, over the same config and layers.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

import msgspec

from chandlery.oci.digest import Digest

# Images are functions of their content, so "created" can't be the time of the build. One second after the
# epoch, as file times in the Nix store: some tools take 0 for "not set".
CREATED = "1970-01-01T00:00:01Z"

# Counts up when the same layers get another config or manifest.
DOCUMENTS_VERSION = 2


class ManifestFormat(StrEnum):
    """The two families of media types that clients ask for in Accept."""

    OCI = "oci"
    DOCKER = "docker"


OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_MANIFEST_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER_TAR = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"

MANIFEST_MEDIA_TYPE = {ManifestFormat.OCI: OCI_MANIFEST, ManifestFormat.DOCKER: DOCKER_MANIFEST}
INDEX_MEDIA_TYPE = {ManifestFormat.OCI: OCI_INDEX, ManifestFormat.DOCKER: DOCKER_MANIFEST_LIST}

_DOCKER_LAYER = {OCI_LAYER: DOCKER_LAYER_TAR, f"{OCI_LAYER}+gzip": DOCKER_LAYER_GZIP}

_encoder = msgspec.json.Encoder(order="deterministic")


def canonical_json(value: object) -> bytes:
    """Encode with sorted keys and no spaces."""
    return _encoder.encode(value)


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system and an architecture, named as in Go (image-spec, image-index.md)."""

    os: str
    architecture: str

    @classmethod
    def of_host(cls) -> Self:
        """Return the platform that this machine runs."""
        machine = platform.machine()
        return cls("linux", {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine))

    @property
    def nix_system(self) -> str:
        """Nix's name for it: `x86_64-linux`."""
        cpu = {"amd64": "x86_64", "arm64": "aarch64"}[self.architecture]
        return f"{cpu}-{self.os}"

    def __str__(self) -> str:
        return f"{self.os}/{self.architecture}"


ARCHITECTURES = ("amd64", "arm64")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Where some content is found by its digest (image-spec, descriptor.md); size in bytes."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the descriptor as a manifest holds it."""
        described: dict[str, Any] = {
            "mediaType": self.media_type,
            "digest": str(self.digest),
            "size": self.size,
        }
        if self.annotations:
            described["annotations"] = dict(self.annotations)
        return described


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A layer blob: its descriptor, and the digest of the tar in it."""

    descriptor: Descriptor
    diff_id: Digest


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """One image: its manifest in every format, over the same config and layers."""

    manifests: Mapping[ManifestFormat, Descriptor]
    config: Descriptor
    layers: tuple[PackedLayer, ...]
    store_paths: int  # in its closure
    closure_size: int  # bytes, the sum of nar sizes

    @property
    def descriptors(self) -> tuple[Descriptor, ...]:
        """Every blob that the image needs: manifests, config, layers."""
        return (*self.manifests.values(), self.config, *(layer.descriptor for layer in self.layers))


@dataclass(frozen=True, slots=True)
class ContainerConfig:
    """What a container is started with (image-spec, config.md, the "config" property)."""

    entrypoint: Sequence[str] = ()
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    working_directory: str = ""
    exposed_ports: Sequence[str] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Leave out what is empty, as other image makers do."""
        given = {
            "Entrypoint": list(self.entrypoint),
            "Cmd": list(self.command),
            "Env": [f"{name}={value}" for name, value in sorted(self.environment.items())],
            "User": self.user,
            "WorkingDir": self.working_directory,
            # A set, written as Go encodes one.
            "ExposedPorts": {port: {} for port in sorted(self.exposed_ports)},
            "Labels": dict(self.labels),
        }
        return {name: value for name, value in given.items() if value}


def image_config(
    target: Platform,
    layers: Sequence[tuple[PackedLayer, str]],
    container: ContainerConfig,
) -> bytes:
    """Return an image's config (image-spec, config.md); each layer comes with the text for its history.

    `history` has an entry per layer, because tools that build on top of an image count them.
    """
    return canonical_json(
        {
            "created": CREATED,
            "architecture": target.architecture,
            "os": target.os,
            "config": container.to_json(),
            "rootfs": {"type": "layers", "diff_ids": [str(layer.diff_id) for layer, _ in layers]},
            "history": [{"created": CREATED, "created_by": text} for _, text in layers],
        }
    )


def image_manifest(
    manifest_format: ManifestFormat,
    config: bytes,
    layers: Sequence[Descriptor],
    annotations: Mapping[str, str],
) -> bytes:
    """Return an image's manifest (image-spec, manifest.md, or Docker's image manifest v2, schema 2).

    `layers` have OCI media types. Docker's manifest has no annotations, and no media type for zstd: there the
    layers keep OCI's, as Docker itself writes them.
    """
    docker = manifest_format is ManifestFormat.DOCKER
    config_type = DOCKER_CONFIG if docker else OCI_CONFIG
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_MEDIA_TYPE[manifest_format],
        "config": Descriptor(config_type, Digest.of(config), len(config)).to_json(),
        "layers": [
            {
                **layer.to_json(),
                "mediaType": _DOCKER_LAYER.get(layer.media_type, layer.media_type)
                if docker
                else layer.media_type,
            }
            for layer in layers
        ],
    }
    if annotations and not docker:
        manifest["annotations"] = dict(annotations)
    return canonical_json(manifest)


def image_index(manifest_format: ManifestFormat, manifests: Sequence[tuple[Platform, Descriptor]]) -> bytes:
    """Return an index of one image for several platforms.

    It is that of image-spec (image-index.md), or Docker's manifest list; arm64 has no variant
    (docs/decisions/0016-arm64-has-no-variant.md).
    """
    return canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": INDEX_MEDIA_TYPE[manifest_format],
            "manifests": [
                {
                    **manifest.to_json(),
                    "platform": {"architecture": target.architecture, "os": target.os},
                }
                for target, manifest in manifests
            ],
        }
    )


def manifests_of(index: bytes) -> Sequence[Digest]:
    """Return the manifests that an index lists; `index` is one that `image_index` made."""
    return [Digest.parse(each["digest"]) for each in msgspec.json.decode(index)["manifests"]]
