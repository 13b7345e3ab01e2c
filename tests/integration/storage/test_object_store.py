import asyncio
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import obstore
import pytest

from chandlery.errors import BlobNotFoundError, SettingsError, StorageError
from chandlery.oci.digest import Digest
from chandlery.settings.settings import Settings
from chandlery.storage.bucket import Bucket
from chandlery.storage.byte_range import ByteRange
from chandlery.storage.file_store import FileBlobStore
from chandlery.storage.kinds import open_blob_store
from chandlery.storage.object_store import ObjectBlobStore
from tests.support.blob_store_contract import CONTENT, MEDIA_TYPE, BlobStoreContract, put, read
from tests.support.swift_server import KEY, Swift, swift


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swift]:
    with swift(tmp_path_factory.mktemp("swift")) as started:
        yield started


@pytest.fixture
def bucket(server: Swift) -> Bucket:
    return Bucket("s3", server.make_bucket(), "some/prefix")


@pytest.fixture
def store(server: Swift, bucket: Bucket, tmp_path: Path) -> Iterator[ObjectBlobStore]:
    with ObjectBlobStore(bucket, server.options, tmp_path) as opened:
        yield opened


class TestObjectBlobStore(BlobStoreContract):
    @pytest.fixture
    def store(self, server: Swift, bucket: Bucket, tmp_path: Path) -> Iterator[ObjectBlobStore]:
        with ObjectBlobStore(bucket, server.options, tmp_path) as opened:
            yield opened


def key(digest: Digest) -> str:
    return f"some/prefix/blobs/sha256/{digest.hex[:2]}/{digest.hex}"


async def test_keys_are_the_documented_ones_and_objects_have_the_media_type(
    server: Swift, bucket: Bucket, store: ObjectBlobStore
) -> None:
    digest = await put(store, CONTENT)
    assert server.keys(bucket.name) == {key(digest): len(CONTENT)}
    assert store.location(digest) == f"s3://{bucket.name}/{key(digest)}"
    found = await obstore.get_async(server.store(bucket.name), key(digest))
    assert found.attributes == {"Content-Type": MEDIA_TYPE}


async def test_objects_that_are_no_blobs_are_left_alone(
    server: Swift, bucket: Bucket, store: ObjectBlobStore
) -> None:
    for foreign in ("other", "some/prefix/blobs/sha256/00/other", "some/prefix/blobs/sha256/ab/" + "c" * 64):
        await obstore.put_async(server.store(bucket.name), foreign, b"foreign")
    assert await store.inventory() == {}


async def test_a_large_blob_goes_up_in_parts_and_comes_back(store: ObjectBlobStore) -> None:
    content = os.urandom(20 << 20)
    digest = await put(store, content)
    assert Digest.of(await read(store, digest)) == digest
    middle = ByteRange((8 << 20) - 5, (8 << 20) + 5)
    assert await read(store, digest, middle) == content[middle.start : middle.stop]


async def test_many_puts_of_one_blob_at_once_agree(store: ObjectBlobStore) -> None:
    assert set(await asyncio.gather(*(put(store, CONTENT) for _ in range(8)))) == {Digest.of(CONTENT)}
    assert list(await store.inventory()) == [Digest.of(CONTENT)]


PUT_500_MB = """
import asyncio, resource, sys
from pathlib import Path
from chandlery.storage.bucket import Bucket
from chandlery.oci.digest import Digest
from chandlery.storage.object_store import ObjectBlobStore

async def main(bucket, endpoint, user, key, folder):
    options = {"endpoint": endpoint, "access_key_id": user, "secret_access_key": key}
    with ObjectBlobStore(Bucket.parse(bucket), options, Path(folder)) as store:
        await store.check()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with store.temporary_file() as file:
            with file.open("wb") as opened:
                opened.truncate(500 << 20)
            await store.put(Digest("0" * 64), file, "application/octet-stream")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

asyncio.run(main(*sys.argv[1:]))
"""


def test_memory_is_bounded_while_a_large_blob_is_put(server: Swift, bucket: Bucket, tmp_path: Path) -> None:
    arguments = [str(bucket), *server.options.values(), str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, "-c", PUT_500_MB, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert int(ran.stdout) < 100_000, "kB"


async def test_a_blob_that_was_seen_is_remembered_for_a_moment(
    server: Swift, bucket: Bucket, tmp_path: Path
) -> None:
    with ObjectBlobStore(bucket, server.options, tmp_path, memory=0.5) as store:
        digest = await put(store, CONTENT)
        await obstore.delete_async(server.store(bucket.name), key(digest))
        assert await store.stat(digest) is not None
        await asyncio.sleep(0.5)
        assert await store.stat(digest) is None


async def test_a_blob_that_could_not_be_read_is_not_remembered(
    server: Swift, bucket: Bucket, store: ObjectBlobStore
) -> None:
    digest = await put(store, CONTENT)
    await obstore.delete_async(server.store(bucket.name), key(digest))
    with pytest.raises(BlobNotFoundError):
        await read(store, digest)
    assert await store.stat(digest) is None


async def test_a_put_does_not_count_on_what_is_remembered(
    server: Swift, bucket: Bucket, store: ObjectBlobStore
) -> None:
    digest = await put(store, CONTENT)
    await obstore.delete_async(server.store(bucket.name), key(digest))
    await put(store, CONTENT)
    assert await read(store, digest) == CONTENT


async def test_a_url_is_signed_for_so_long_and_for_reading_only(
    store: ObjectBlobStore, bucket: Bucket
) -> None:
    digest = await put(store, CONTENT)
    url = await store.url(digest, 1200.0)
    assert url is not None
    assert urlsplit(url).path == f"/{bucket.name}/{key(digest)}"
    assert parse_qs(urlsplit(url).query)["X-Amz-Expires"] == ["1200"]
    assert KEY not in url
    async with httpx.AsyncClient() as client:
        assert (await client.delete(url)).status_code == 403
        assert (await client.get(url.replace(digest.hex, "0" * 64))).status_code == 403


async def test_no_url_is_given_if_clients_are_to_come_here(
    server: Swift, bucket: Bucket, tmp_path: Path
) -> None:
    with ObjectBlobStore(bucket, server.options, tmp_path, redirects=False) as store:
        assert await store.url(await put(store, CONTENT), 60.0) is None


async def test_without_a_key_that_signs_clients_come_here(tmp_path: Path) -> None:
    options = {"account_name": "account", "bearer_token": "token", "use_emulator": "true"}
    with ObjectBlobStore(Bucket("az", "container"), options, tmp_path) as store:
        assert await store.url(Digest.of(CONTENT), 60.0) is None


async def test_azure_signs_with_the_account_key(tmp_path: Path) -> None:
    options = {"account_name": "account", "account_key": "c2VjcmV0"}
    with ObjectBlobStore(Bucket("az", "container", "prefix"), options, tmp_path) as store:
        url = await store.url(Digest.of(CONTENT), 60.0)
    assert url is not None
    expected = "https://account.blob.core.windows.net/container/prefix/blobs/sha256/"
    assert url.startswith(expected)


@pytest.fixture
def service_account(tmp_path: Path) -> Path:
    argv = ["openssl", "genpkey", "-algorithm", "RSA"]
    key = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    account = {"client_email": "chandlery@example.com", "private_key": key, "private_key_id": "1"}
    file = tmp_path / "account.json"
    file.write_text(json.dumps({"type": "service_account", **account}))
    return file


async def test_google_signs_with_the_key_of_a_service_account(tmp_path: Path, service_account: Path) -> None:
    options = {"service_account": str(service_account)}
    with ObjectBlobStore(Bucket("gs", "bucket", "prefix"), options, tmp_path) as store:
        url = await store.url(Digest.of(CONTENT), 60.0)
    assert url is not None
    assert url.startswith("https://storage.googleapis.com/bucket/prefix/blobs/sha256/")


async def failure_of_check(bucket: str, options: dict[str, str], folder: Path) -> str:
    with (
        ObjectBlobStore(Bucket.parse(bucket), options, folder) as store,
        pytest.raises(StorageError) as caught,
    ):
        await store.check()
    message = str(caught.value)
    assert message.startswith(f"{bucket}: ")
    assert "\n" not in message
    assert KEY not in message
    assert "Signature=" not in message
    return message


async def test_wrong_credentials_are_told(server: Swift, bucket: Bucket, tmp_path: Path) -> None:
    message = await failure_of_check(str(bucket), {**server.options, "secret_access_key": "wrong"}, tmp_path)
    assert "refuses these credentials" in message
    assert "403 SignatureDoesNotMatch" in message
    assert "AWS_SECRET_ACCESS_KEY" in message


async def test_a_missing_bucket_is_told(server: Swift, tmp_path: Path) -> None:
    message = await failure_of_check("s3://nowhere/prefix", server.options, tmp_path)
    assert "there is no such bucket at 127.0.0.1" in message


async def test_a_store_that_can_not_be_reached_is_told(tmp_path: Path) -> None:
    options = {"endpoint": "http://127.0.0.1:1", "access_key_id": "a", "secret_access_key": KEY}
    message = await failure_of_check("s3://bucket", options, tmp_path)
    assert "127.0.0.1:1 can't be reached" in message


async def test_options_that_nobody_knows_are_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"s3://bucket: storage_options.*'colour'"):
        ObjectBlobStore(Bucket("s3", "bucket"), {"colour": "red"}, tmp_path)


class Unwell:
    """An S3 server that behaves in one wrong way."""

    def __init__(self) -> None:
        self.requests = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            self.requests += 1
            await self.answer(writer)
            await writer.drain()
        finally:
            writer.close()

    async def answer(self, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError


class Throttling(Unwell):
    async def answer(self, writer: asyncio.StreamWriter) -> None:
        body = b"<Error><Code>SlowDown</Code></Error>"
        writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


class Silent(Unwell):
    async def answer(self, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)


class BreakingOff(Unwell):
    async def answer(self, writer: asyncio.StreamWriter) -> None:
        if self.requests == 1:
            writer.write(
                b"HTTP/1.1 200 OK\r\nETag: x\r\nLast-Modified: Tue, 24 Nov 2026 07:35:15 GMT\r\n"
                b"Content-Length: 5000000\r\n\r\n" + bytes(3_000_000)
            )


@pytest.fixture
async def unwell(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectBlobStore]:
    behaviour: Unwell = request.param()
    async with await asyncio.start_server(behaviour.handle, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        options = {"endpoint": f"http://127.0.0.1:{port}", "access_key_id": "a", "secret_access_key": KEY}
        options["read_timeout"] = "200ms"
        with ObjectBlobStore(Bucket("s3", "bucket"), options, tmp_path) as store:
            yield store


@pytest.mark.parametrize("unwell", [Throttling], indirect=True)
async def test_a_store_that_throttles_is_told(unwell: ObjectBlobStore) -> None:
    with pytest.raises(StorageError, match=r"^s3://bucket: .* asks for fewer requests \(503 SlowDown\)"):
        await unwell.check()


@pytest.mark.parametrize("unwell", [Silent], indirect=True)
async def test_a_silent_store_is_told(unwell: ObjectBlobStore) -> None:
    with pytest.raises(StorageError, match=r"^s3://bucket: .* doesn't answer in time"):
        await unwell.check()


@pytest.mark.parametrize("unwell", [BreakingOff], indirect=True)
async def test_a_store_that_dies_while_a_blob_is_read_is_told(
    unwell: ObjectBlobStore,
) -> None:
    blocks = unwell.read(Digest.of(CONTENT))
    first = await anext(blocks)
    assert 0 < len(first) < 5_000_000
    with pytest.raises(StorageError, match=r"^s3://bucket: .* can't be reached, or broke off"):
        await read_on(blocks)


async def read_on(blocks: AsyncIterator[bytes]) -> int:
    return sum([len(block) async for block in blocks])


async def test_a_store_that_dies_while_a_blob_is_put_leaves_no_blob(tmp_path: Path) -> None:
    with swift(tmp_path / "swift") as own:
        bucket = Bucket("s3", own.make_bucket())
        with ObjectBlobStore(bucket, own.options, tmp_path / "data") as store:
            content = os.urandom(64 << 20)
            with store.temporary_file() as file:
                file.write_bytes(content)
                putting = asyncio.create_task(store.put(Digest.of(content), file, MEDIA_TYPE))
                async with asyncio.timeout(20):
                    # The first parts are there: Swift keeps them in a bucket beside this one.
                    while not any((tmp_path / "swift").glob("devices/disk/objects/*/*/*/*.data")):  # noqa: ASYNC110
                        await asyncio.sleep(0.005)
                await asyncio.to_thread(own.stop)
                with pytest.raises(StorageError, match=rf"^{bucket}: "):
                    await putting
                assert not file.exists()
            await asyncio.to_thread(own.start)
            assert await store.stat(Digest.of(content)) is None
            assert await put(store, content) == Digest.of(content)
            assert await read(store, Digest.of(content)) == content


def test_the_settings_name_a_bucket_and_how_to_reach_it(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('storage = "s3://bucket/"\n[storage_options]\nallow_http = true\n')
    settings = Settings.load(**tomllib.loads(file.read_text()))
    assert settings.storage == "s3://bucket"
    assert settings.storage_options == {"allow_http": "true"}
    with pytest.raises(SettingsError, match=r"^storage: .*s3://BUCKET/PREFIX"):
        Settings.load(storage="/srv/blobs")
    secret = Settings.load(storage_options={"secret_access_key": KEY})
    assert KEY not in repr(secret)


def test_without_a_bucket_blobs_are_files(tmp_path: Path) -> None:
    with open_blob_store("", tmp_path, {}) as files:
        assert isinstance(files, FileBlobStore)
    with open_blob_store("s3://bucket", tmp_path, {}) as objects:
        assert isinstance(objects, ObjectBlobStore)
        assert not objects.on_this_disk
