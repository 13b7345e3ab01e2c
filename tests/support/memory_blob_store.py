"""A blob store for tests: in memory, without files to send; it keeps `blob_store_contract`."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from chandlery.errors import BlobNotFoundError
from chandlery.oci.digest import Digest
from chandlery.oci.documents import Descriptor
from chandlery.storage.blob_store import BlobInfo
from chandlery.storage.byte_range import ByteRange


class MemoryBlobStore:
    on_this_disk = True

    def __init__(self) -> None:
        self.blobs: dict[Digest, bytes] = {}

    async def stat(self, digest: Digest) -> BlobInfo | None:
        return BlobInfo(len(self.blobs[digest])) if digest in self.blobs else None

    async def check(self) -> None:
        pass

    def path(self, digest: Digest) -> Path | None:
        return None

    def location(self, digest: Digest) -> str:
        return f"memory of {digest}"

    async def url(self, digest: Digest, lifetime: float) -> str | None:
        return None

    async def read(self, digest: Digest, byte_range: ByteRange | None = None) -> AsyncIterator[bytes]:
        if digest not in self.blobs:
            raise BlobNotFoundError(str(digest))
        content = self.blobs[digest]
        yield content[byte_range.start : byte_range.stop] if byte_range else content

    @contextmanager
    def temporary_file(self) -> Iterator[Path]:
        with TemporaryDirectory() as folder:
            yield Path(folder) / "blob"

    async def put(self, digest: Digest, file: Path, media_type: str) -> None:
        self._take(digest, file)

    async def put_bytes(self, content: bytes, media_type: str) -> Descriptor:
        digest = Digest.of(content)
        self.blobs[digest] = content
        return Descriptor(media_type, digest, len(content))

    async def delete(self, digest: Digest) -> None:
        self.blobs.pop(digest, None)

    async def digests(self) -> AsyncIterator[Digest]:
        for digest in sorted(self.blobs):
            yield digest

    async def inventory(self) -> Mapping[Digest, BlobInfo]:
        return {digest: BlobInfo(len(content)) for digest, content in self.blobs.items()}

    async def sweep(self) -> None:
        pass

    def _take(self, digest: Digest, file: Path) -> None:
        self.blobs.setdefault(digest, file.read_bytes())
        file.unlink()
