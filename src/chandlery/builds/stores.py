"""What builds work with, opened: Nix, blobs, the index, leases, and the data folder that they share."""

from dataclasses import dataclass
from pathlib import Path

from chandlery.builds.index import BuildIndex
from chandlery.nix.stores import NixStores
from chandlery.storage.blob_store import BlobStore
from chandlery.storage.leases import Leases


@dataclass(frozen=True, slots=True)
class Stores:
    """The stores of one data folder, `folder`."""

    folder: Path
    nix: NixStores
    blobs: BlobStore
    index: BuildIndex
    leases: Leases
