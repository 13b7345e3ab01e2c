import asyncio
import subprocess
import sys
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


# The disk has room for the folders and for 4 MB.
FILL_THE_DISK = """
import asyncio, os, sys
from pathlib import Path
from chandlery.storage.file_store import FileBlobStore
from chandlery.errors import StorageFullError

async def main():
    with FileBlobStore(Path(sys.argv[1])) as store:
        small = await store.put_bytes(b"small", "text/plain")
        try:
            await store.put_bytes(os.urandom(8 << 20), "text/plain")
        except StorageFullError as error:
            print(error)
        print([str(digest) async for digest in store.digests()] == [str(small.digest)])
        print(b"".join([part async for part in store.read(small.digest)]))
        print([path.name for path in Path(sys.argv[1], "tmp").glob("*/*")])

asyncio.run(main())
"""


def test_a_full_disk_fails_that_put_and_leaves_nothing_behind(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=6m tmpfs "$0" && exec "$1" -c "$2" "$0"'
    isolated = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount]
    ran = subprocess.run(
        [*isolated, str(tmp_path), sys.executable, FILL_THE_DISK], capture_output=True, text=True, check=False
    )
    if "unshare" in ran.stderr or "mount:" in ran.stderr:
        pytest.skip(f"no file system can be mounted here: {ran.stderr}")
    message, blobs_are_whole, small, left = ran.stdout.splitlines()
    assert "no space left" in message
    assert (blobs_are_whole, small, left) == ("True", "b'small'", "['lock']")


def test_a_full_disk_while_a_file_is_written_says_so(store: FileBlobStore) -> None:
    with pytest.raises(StorageFullError), store.temporary_file():
        Path("/dev/full").write_bytes(b"no room")


PUT_FOR_EVER = """
import asyncio, itertools, os, sys
from pathlib import Path
from chandlery.storage.file_store import FileBlobStore

async def main():
    store = FileBlobStore(Path(sys.argv[1]))
    for number in itertools.count():
        descriptor = await store.put_bytes(os.urandom(300_000), "text/plain")
        print(descriptor.digest, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("after", [1, 7, 20])
def test_after_kill_every_blob_is_whole_and_the_rest_is_swept(tmp_path: Path, after: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PUT_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline().strip() for _ in range(after)]
        process.kill()
    with FileBlobStore(tmp_path) as store:
        found = asyncio.run(listed(store))
        assert set(said) <= set(map(str, found))
        assert [Digest.of(store.path(digest).read_bytes()) for digest in found] == found
        assert len([path for path in (tmp_path / "tmp").iterdir() if path.is_dir()]) == 1
