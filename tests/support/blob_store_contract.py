"""What every blob store keeps; a store's tests subclass this and give a `store` fixture."""

import httpx
import pytest

from chandlery.errors import BlobNotFoundError
from chandlery.oci.digest import Digest
from chandlery.oci.documents import Descriptor
from chandlery.storage.blob_store import BlobInfo, BlobStore, content_of, local_files
from chandlery.storage.byte_range import ByteRange

# More than one block of any store, and no whole number of blocks.
CONTENT = bytes(range(251)) * 20_000
MEDIA_TYPE = "application/octet-stream"


async def read(store: BlobStore, digest: Digest, byte_range: ByteRange | None = None) -> bytes:
    return b"".join([part async for part in store.read(digest, byte_range)])


async def put(store: BlobStore, content: bytes) -> Digest:
    digest = Digest.of(content)
    with store.temporary_file() as file:
        file.write_bytes(content)
        await store.put(digest, file, MEDIA_TYPE)
    return digest


class BlobStoreContract:
    @pytest.fixture
    def store(self) -> BlobStore:
        raise NotImplementedError

    async def test_a_blob_comes_back_as_it_was_put(self, store: BlobStore) -> None:
        digest = await put(store, CONTENT)
        assert await store.stat(digest) == BlobInfo(len(CONTENT))
        assert await read(store, digest) == CONTENT

    async def test_the_path_if_any_is_a_file_with_the_blob(self, store: BlobStore) -> None:
        path = store.path(await put(store, CONTENT))
        assert path is None or path.read_bytes() == CONTENT

    async def test_the_url_if_any_has_the_blob_and_its_ranges(self, store: BlobStore) -> None:
        digest = await put(store, CONTENT)
        if url := await store.url(digest, 60.0):
            async with httpx.AsyncClient() as client:
                assert (await client.get(url)).content == CONTENT
                part = await client.get(url, headers={"range": "bytes=10-1099999"})
            assert (part.status_code, part.content) == (206, CONTENT[10:1_100_000])

    async def test_a_store_that_works_passes_its_check(self, store: BlobStore) -> None:
        await store.check()
        assert await store.inventory() == {}

    async def test_every_blob_has_a_file_for_a_while(self, store: BlobStore) -> None:
        digests = [await put(store, content) for content in (CONTENT, b"")]
        async with local_files(store, digests) as files:
            assert [files[digest].read_bytes() for digest in digests] == [CONTENT, b""]
        assert await content_of(store, digests[0]) == CONTENT

    async def test_an_empty_blob_is_a_blob(self, store: BlobStore) -> None:
        digest = await put(store, b"")
        assert await store.stat(digest) == BlobInfo(0)
        assert await read(store, digest) == b""

    @pytest.mark.parametrize(
        ("start", "stop"), [(0, 1), (10, 1_100_000), (len(CONTENT) - 5, len(CONTENT)), (0, len(CONTENT))]
    )
    async def test_a_range_is_a_slice(self, store: BlobStore, start: int, stop: int) -> None:
        digest = await put(store, CONTENT)
        assert await read(store, digest, ByteRange(start, stop)) == CONTENT[start:stop]

    async def test_a_blob_that_is_not_there(self, store: BlobStore) -> None:
        digest = Digest.of(b"never put")
        assert await store.stat(digest) is None
        with pytest.raises(BlobNotFoundError):
            await read(store, digest)

    async def test_bytes_are_put_under_their_digest(self, store: BlobStore) -> None:
        descriptor = await store.put_bytes(b"{}", "application/json")
        assert descriptor == Descriptor("application/json", Digest.of(b"{}"), 2)
        assert await read(store, descriptor.digest) == b"{}"

    async def test_a_put_takes_the_file_over(self, store: BlobStore) -> None:
        with store.temporary_file() as file:
            file.write_bytes(CONTENT)
            await store.put(Digest.of(CONTENT), file, MEDIA_TYPE)
            assert not file.exists()

    async def test_a_second_put_takes_the_file_over_too_and_changes_nothing(self, store: BlobStore) -> None:
        digest = await put(store, CONTENT)
        with store.temporary_file() as file:
            file.write_bytes(b"not the content, but there is a blob already")
            await store.put(digest, file, MEDIA_TYPE)
            assert not file.exists()
        assert await read(store, digest) == CONTENT

    async def test_a_file_that_is_not_put_is_removed(self, store: BlobStore) -> None:
        with store.temporary_file() as file:
            file.write_bytes(CONTENT)
        assert not file.exists()

    async def test_two_temporary_files_are_two(self, store: BlobStore) -> None:
        with store.temporary_file() as first, store.temporary_file() as second:
            assert first != second

    async def test_a_deleted_blob_is_gone_and_can_be_put_again(self, store: BlobStore) -> None:
        digest = await put(store, CONTENT)
        await store.delete(digest)
        await store.delete(digest)
        assert await store.stat(digest) is None
        await put(store, CONTENT)
        assert await read(store, digest) == CONTENT

    async def test_all_digests_are_listed_in_order(self, store: BlobStore) -> None:
        put_digests = [await put(store, b"blob %d" % number) for number in range(20)]
        assert [digest async for digest in store.digests()] == sorted(put_digests)

    async def test_the_inventory_has_every_blob_with_its_size(self, store: BlobStore) -> None:
        assert await store.inventory() == {}
        digests = [await put(store, b"x" * size) for size in (0, 1, 1000)]
        assert await store.inventory() == dict(zip(digests, map(BlobInfo, (0, 1, 1000)), strict=True))
