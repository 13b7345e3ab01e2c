"""What was built: recipe key -> image, and what else the next build need not find out again.

An index is a memory, never the truth. Losing it costs time and nothing else, so nothing here is worth failing
a pull for: what can't be read is a miss, and what can't be written is logged and forgotten. The other way
round it must not lie: remember something only when every blob of it is durable.

An image is kept, or it was collected: then its blobs may be gone, and its recipe is remembered still, so that
it can be made again when a client asks for one of its digests. What collectors ask decides what is deleted,
so those methods raise `StorageError` where others find nothing.

The questions are grouped by purpose. Keys are sha256 digests in hexadecimal digits. All methods are safe to
repeat, and an answer may be older than what another process has just remembered: so an index may be a file of
this machine (`builds.sqlite.index`) or records that several machines share.
`tests/support/build_index_contract.py` says what every index keeps.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from chandlery.builds.recipe import Recipe
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, PackedLayer

# Recipes that are looked at for one name.
MOST_TAGGED = 1000


@dataclass(frozen=True, slots=True)
class RecordedBlob:
    """A blob as an image in the index needs it: its size in bytes, and whether that image is kept."""

    key: str
    size: int
    is_manifest: bool
    kept: bool


@dataclass(frozen=True, slots=True)
class RecordedImage:
    """An image that is kept, and when it was last used, in seconds since the epoch."""

    key: str
    name: str
    last_used: float


class ImageRecords(Protocol):
    """For serving images by name."""

    @property
    def use_interval(self) -> float:
        """Seconds between two records of an image's use; what is used in between looks used."""
        ...

    async def use_image(self, key: str) -> BuiltImage | None:
        """Return the image of a recipe's key, if it is kept, and remember that it is in use now.

        Its blobs may have been lost since. A collector takes an image before its use is remembered, or not
        at all.
        """
        ...

    async def image(self, key: str) -> BuiltImage | None:
        """Return the image of a recipe's key, if it is kept; to ask for it is no use of it."""
        ...

    async def remember_image(self, recipe: Recipe, image: BuiltImage) -> None:
        """Remember an image whose blobs are all durable, its recipe, its name and its tags."""
        ...

    async def image_index(self, digest: Digest) -> bytes | None:
        """Return an OCI index that a tag once named; the images that it lists are made again if need be."""
        ...

    async def remember_image_index(self, content: bytes) -> None:
        """Remember an OCI index of images that are in this index."""
        ...

    async def needs(self, name: str, digest: Digest) -> bool:
        """Return whether an image of this name needs a blob; an OCI index is for all, its images aren't.

        An image has every name that it was remembered by: a recipe's key leaves the source's name out.
        """
        ...

    async def tags(self, name: str) -> list[str]:
        """Return the tags that a repository name was built with, sorted, of images that are remembered."""
        ...

    async def remember_tag(self, recipe: Recipe) -> None:
        """Remember that an image is known by the name and the reference of this recipe, too."""
        ...

    async def tagged(self, name: str, digest: Digest | None = None) -> list[tuple[str, Recipe]]:
        """Return the tags that a name was built with, each with the recipes of its images, the newest first.

        With a `digest`, of images that need that blob. No more than `MOST_TAGGED` are returned.
        """
        ...

    async def revisions(self, limit: int) -> list[str]:
        """Return the revisions of sources that images were made at, of the images used last first."""
        ...


class LayerRecords(Protocol):
    """For packing layers."""

    async def layers(self, keys: Collection[str]) -> dict[str, PackedLayer]:
        """Return the layers that were packed for these keys; what isn't known is left out."""
        ...

    async def remember_layer(self, key: str, layer: PackedLayer) -> None:
        """Remember a layer whose blob is durable."""
        ...


class ResolutionRecords(Protocol):
    """For resolving attribute paths."""

    async def resolutions(self, pin: str, attribute_paths: Iterable[str]) -> dict[str, bytes]:
        """Return what is known of these attribute paths at a pin; what isn't known is left out."""
        ...

    async def remember_resolutions(self, pin: str, records: Mapping[str, bytes]) -> None:
        """Remember what attribute paths give at a pin, all of them or none."""
        ...


class BlobRecords(Protocol):
    """For serving blobs by digest, and making lost ones again."""

    async def blob(self, digest: Digest) -> RecordedBlob | None:
        """Return what is known of a blob, from the image that was used last of those that need it.

        An image that is kept comes before all that were collected.
        """
        ...

    async def remember_use(self, key: str) -> bool:
        """Remember that the image of this key is in use now; False if it isn't kept."""
        ...

    async def recipes(self, digest: Digest, limit: int) -> list[Recipe]:
        """Return the recipes of images that need a blob, at most `limit`, in the order of `blob`."""
        ...


class CollectorRecords(Protocol):
    """For collectors and checks: what is kept, and what may go.

    The questions raise `StorageError`; what can't be written is logged, and nothing is forgotten.
    """

    async def least_recently_used(self, used_before: float = float("inf")) -> list[RecordedImage]:
        """Return the images that are kept and were last used before a time, the oldest use first."""
        ...

    async def blobs_of(self, key: str) -> dict[Digest, int]:
        """Return the blobs that an image needs, with their sizes in bytes."""
        ...

    async def references(self) -> Counter[Digest]:
        """Return for every blob how many of the images that are kept need it."""
        ...

    async def needed(self, digests: Iterable[Digest]) -> set[Digest]:
        """Return those of some blobs that an image needs that is kept."""
        ...

    async def forget_image(self, key: str, used_before: float) -> bool:
        """Keep an image no longer, unless it was used since a time; return whether it was kept till now."""
        ...

    async def forget_layers(self, digests: Iterable[Digest]) -> None:
        """Forget layers whose blobs were deleted."""
        ...

    async def forget_recipes(self, remembered: int) -> None:
        """Forget images that were collected and OCI indexes, all but the last `remembered` of each.

        Of images these are the ones used last, of OCI indexes those remembered last.
        """
        ...


class BuildIndex(ImageRecords, LayerRecords, ResolutionRecords, BlobRecords, CollectorRecords, Protocol):
    """All of it."""
