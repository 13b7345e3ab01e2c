import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from chandlery.errors import StorageError, StorageFullError
from chandlery.oci.digest import Digest
from chandlery.storage.file_store import FileBlobStore
from tests.support.blob_store_contract import CONTENT, MEDIA_TYPE, BlobStoreContract, put
from tests.support.memory_blob_store import MemoryBlobStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileBlobStore]:
    with FileBlobStore(tmp_path) as opened:
        yield opened


class TestFileBlobStore(BlobStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[FileBlobStore]:
        with FileBlobStore(tmp_path) as opened:
            yield opened


class TestMemoryBlobStore(BlobStoreContract):
    @pytest.fixture
    def store(self) -> MemoryBlobStore:
        return MemoryBlobStore()


async def listed(store: FileBlobStore) -> list[Digest]:
    return [digest async for digest in store.digests()]


async def test_the_layout_on_disk_is_the_documented_one(store: FileBlobStore, tmp_path: Path) -> None:
    digest = await put(store, CONTENT)
    assert (tmp_path / "blobs" / "sha256" / digest.hex[:2] / digest.hex).read_bytes() == CONTENT


def inode(path: Path) -> int:
    return path.stat().st_ino


async def test_a_blob_is_moved_into_its_place_and_never_copied(store: FileBlobStore) -> None:
    digest = Digest.of(CONTENT)
    with store.temporary_file() as file:
        file.write_bytes(CONTENT)
        written = inode(file)
        await store.put(digest, file, MEDIA_TYPE)
    assert inode(store.path(digest)) == written


async def test_blobs_outlive_the_process(tmp_path: Path) -> None:
    with FileBlobStore(tmp_path) as store:
        digest = await put(store, CONTENT)
    with FileBlobStore(tmp_path) as store:
        assert await store.stat(digest) is not None


async def test_many_puts_of_one_blob_at_once_agree(store: FileBlobStore) -> None:
    digests = await asyncio.gather(*(put(store, CONTENT) for _ in range(20)))
    assert set(digests) == {Digest.of(CONTENT)}
    assert await listed(store) == [Digest.of(CONTENT)]


def test_a_folder_that_can_not_be_written_is_one_clear_line() -> None:
    # Not even root can make a folder in sysfs.
    with pytest.raises(StorageError, match=r"^/sys/chandlery: .*choose another data folder$"):
        FileBlobStore(Path("/sys/chandlery"))


def test_a_file_in_the_place_of_the_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(StorageError, match=r"data.*choose another data folder$"):
        FileBlobStore(tmp_path / "data")


async def test_a_blob_that_can_not_be_moved_into_place_is_a_storage_error(
    store: FileBlobStore, tmp_path: Path
) -> None:
    digest = Digest.of(CONTENT)
    (tmp_path / "blobs" / "sha256" / digest.hex[:2]).rmdir()
    with store.temporary_file() as file:
        file.write_bytes(CONTENT)
        with pytest.raises(StorageError):
            await store.put(digest, file, MEDIA_TYPE)
        assert not file.exists()


def test_a_full_disk_while_a_file_is_written_says_so(store: FileBlobStore) -> None:
    with pytest.raises(StorageFullError), store.temporary_file():
        Path("/dev/full").write_bytes(b"no room")
