"""A source of one image, which answers every name, for tests of the API."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from chandlery.access.rules import EVERYTHING, Permission
from chandlery.builds.images import Pulled
from chandlery.errors import BuildPendingError
from chandlery.image.name import ImageRequest, NamePrefixes
from chandlery.machine.deadline import Deadline
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    MANIFEST_MEDIA_TYPE,
    OCI_CONFIG,
    OCI_LAYER,
    BuiltImage,
    Descriptor,
    ManifestFormat,
    Platform,
    image_manifest,
)
from chandlery.storage.blob_store import BlobStore

HOST = NamePrefixes(Platform("linux", "amd64"))


PIN = PinnedSource("debian", "bookworm", "ab" * 32)


LAYER = bytes(range(256)) * 8192


MISSING = Digest.of(b"never put")


@dataclass
class OneImage:
    """Every tag of every name is one image, unless there is an error to raise."""

    image_: BuiltImage
    error: Exception | None = None
    known_tags: Sequence[str] = ("latest",)
    index: Mapping[ManifestFormat, Descriptor] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    needed_by: set[str] | None = None
    max_age: float = 0.0
    requests: list[ImageRequest] = field(default_factory=list)
    clients: list[tuple[str, float]] = field(default_factory=list)

    async def pull(
        self,
        request: ImageRequest,
        client: str,
        deadline: Deadline,
        *,
        index: bool,
        permission: Permission = EVERYTHING,
    ) -> Pulled:
        self.requests.append(request)
        self.clients.append((client, deadline.left or 0.0))
        if self.error:
            raise self.error
        if index and self.index:
            return Pulled(self.index, PIN, is_index=True)
        return Pulled(self.image_.manifests, PIN, self.warnings)

    async def tags(
        self, request: ImageRequest, client: str, deadline: Deadline, permission: Permission = EVERYTHING
    ) -> Sequence[str]:
        self.requests.append(request)
        self.clients.append((client, deadline.left or 0.0))
        if isinstance(self.error, BuildPendingError):
            raise self.error
        return self.known_tags

    async def needs(self, request: ImageRequest, digest: Digest, permission: Permission = EVERYTHING) -> bool:
        return self.needed_by is None or request.name in self.needed_by

    async def is_current(self, pulled: Pulled, *, whole: bool) -> bool:
        if self.error:
            raise self.error
        return pulled.manifests in (self.image_.manifests, self.index)


async def one_image(blobs: BlobStore) -> BuiltImage:
    layer = await blobs.put_bytes(LAYER, OCI_LAYER)
    config = await blobs.put_bytes(b'{"architecture":"amd64"}', OCI_CONFIG)
    manifests = {
        manifest_format: await blobs.put_bytes(
            image_manifest(manifest_format, b'{"architecture":"amd64"}', [layer], {}), media_type
        )
        for manifest_format, media_type in MANIFEST_MEDIA_TYPE.items()
    }
    return BuiltImage(manifests, config, (), 1, 1)


def oci_error(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    (error,) = response.json()["errors"]
    assert set(error) == {"code", "message", "detail"}
    assert isinstance(error, dict)
    return error
