import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chandlery.oci.digest import Digest
from chandlery.storage.file_store import FileBlobStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileBlobStore]:
    with FileBlobStore(tmp_path) as opened:
        yield opened


async def listed(store: FileBlobStore) -> list[Digest]:
    return [digest async for digest in store.digests()]


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
