"""Which kinds of blob stores there are; the scheme in the setting `storage` tells which is meant.

Without a scheme, in an empty text, blobs are files in the data folder.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio.to_process

from chandlery.storage.blob_store import BlobStore
from chandlery.storage.bucket import Bucket
from chandlery.storage.file_store import FileBlobStore
from chandlery.storage.object_store import ObjectBlobStore


@dataclass(frozen=True, slots=True)
class StorageKind:
    """How a kind is written, and what opens it: its text, options, the data folder, whether it redirects.

    `normalised` returns the one spelling of a text; `ValueError` if it is not of this kind.
    """

    form: str
    normalised: Callable[[str], str]
    open: Callable[[str, Mapping[str, str], Path, bool], AbstractContextManager[BlobStore]]


@contextmanager
def _bucket(text: str, options: Mapping[str, str], folder: Path, redirects: bool) -> Iterator[BlobStore]:
    with ObjectBlobStore(Bucket.parse(text), options, folder, redirects=redirects) as objects:
        yield objects


def _normalised_bucket(text: str) -> str:
    return str(Bucket.parse(text))


KINDS: Mapping[str, StorageKind] = {
    "s3": StorageKind("s3://BUCKET/PREFIX", _normalised_bucket, _bucket),
    "gs": StorageKind("gs://BUCKET/PREFIX", _normalised_bucket, _bucket),
    "az": StorageKind("az://CONTAINER/PREFIX", _normalised_bucket, _bucket),
}


def normalised(storage: str) -> str:
    """Return the one spelling of a text; `ValueError` says how to write one that is of no kind."""
    kind = KINDS.get(storage.partition("://")[0]) if storage else None
    if storage and kind is None:
        *others, last = (each.form for each in KINDS.values())
        raise ValueError(f"write it as {', '.join(others)} or {last}")
    return kind.normalised(storage) if kind else ""


@contextmanager
def open_blob_store(
    storage: str, folder: Path, options: Mapping[str, str], *, redirects: bool = True
) -> Iterator[BlobStore]:
    """Open the store that the settings name; its temporary files are in `folder`, the data folder.

    Raises `StorageError` about the folder, and `SettingsError` about the options. A bucket isn't asked
    anything; that is what `check` does.
    """
    if not storage:
        with FileBlobStore(folder) as files:
            yield files
        return
    with KINDS[storage.partition("://")[0]].open(storage, options, folder, redirects) as store:
        yield store


async def check_storage(storage: str, folder: Path, options: Mapping[str, str]) -> None:
    """Check what `open_blob_store` opens, in a process of its own; see `BlobStore.check`.

    A server's workers are forked, and then obstore waits for ever if it has worked before: its threads stay
    behind.
    """
    await anyio.to_process.run_sync(_check_storage, storage, folder, options)


def _check_storage(storage: str, folder: Path, options: Mapping[str, str]) -> None:
    with open_blob_store(storage, folder, options) as blobs:
        asyncio.run(blobs.check())
