"""What one column of the build index holds of an image, and of its recipe: made and read here.

Images have most of what describes them in common. What is stored once has an id: blobs, and the context of
a recipe, which is all of it but its packages and its reference. The rest is the image's record, some bytes of
MessagePack.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TypeVar

import msgspec
import structlog

from chandlery.builds.recipe import Recipe
from chandlery.oci.documents import BuiltImage, Descriptor, ManifestFormat, PackedLayer

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

T = TypeVar("T")

# The place of a format in here is its number in records.
_FORMATS = (ManifestFormat.OCI, ManifestFormat.DOCKER)


class UnreadableRecordError(Exception):
    """A record isn't what was written."""


class ImageRecord(msgspec.Struct, array_like=True, frozen=True):
    """What an image is beside its key, its name and the context of its recipe.

    `steps` are the ids of its manifests, config and layers, in this order, each as the difference to the one
    before: blobs that were new at once have ids in a row, so most steps are small. The ids 7, 8, 9, 3 are the
    steps 7, 1, 1, -6. `exact` is the image as JSON, if it describes a blob in another way than an
    image before it; mostly it is empty.
    """

    packages: tuple[str, ...]
    reference: str
    formats: tuple[int, ...]
    steps: tuple[int, ...]
    store_paths: int
    closure_size: int
    exact: bytes = b""

    @classmethod
    def of(cls, recipe: Recipe, image: BuiltImage, blobs: Sequence[int], *, exact: bool) -> "ImageRecord":
        """Make the record of an image; `blobs` are the ids of its descriptors, in their order."""
        return cls(
            recipe.request.packages,
            recipe.request.reference,
            tuple(map(_FORMATS.index, image.manifests)),
            (blobs[0], *(after - before for before, after in pairwise(blobs))),
            image.store_paths,
            image.closure_size,
            msgspec.json.encode(image) if exact else b"",
        )

    @classmethod
    def decode(cls, encoded: bytes) -> "ImageRecord":
        """Read a record; raises `UnreadableRecordError`."""
        try:
            return _decoder.decode(encoded)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UnreadableRecordError(str(error)) from error

    def encode(self) -> bytes:
        """Return the record as it is stored."""
        return msgspec.msgpack.encode(self)

    @property
    def blobs(self) -> list[int]:
        """The ids of the image's blobs, in the order of its descriptors."""
        return list(accumulate(self.steps))

    @property
    def manifests(self) -> list[int]:
        """The ids of the image's manifests."""
        return self.blobs[: len(self.formats)]

    def image(self, described: Sequence[Descriptor | PackedLayer]) -> BuiltImage:
        """Return the image; `described` are its manifests, config and layers, in this order."""
        if self.exact:
            return decoded(self.exact, BuiltImage)
        number = len(self.formats)
        descriptors = [each for each in described[: number + 1] if isinstance(each, Descriptor)]
        layers = tuple(each for each in described[number + 1 :] if isinstance(each, PackedLayer))
        if len(descriptors) + len(layers) != len(self.steps) or not set(self.formats) <= {0, 1}:
            raise UnreadableRecordError("it isn't made of manifests, a config and layers")
        *manifests, config = descriptors
        formats = [_FORMATS[each] for each in self.formats]
        return BuiltImage(
            dict(zip(formats, manifests, strict=True)), config, layers, self.store_paths, self.closure_size
        )

    def recipe(self, context: bytes) -> Recipe:
        """Return the recipe; raises `UnreadableRecordError`."""
        recipe = decoded(context, Recipe)
        request = replace(recipe.request, packages=self.packages, reference=self.reference)
        return replace(recipe, request=request)


_decoder = msgspec.msgpack.Decoder(ImageRecord)


def context_of(recipe: Recipe) -> bytes:
    """Return what a recipe has in common with others: where packages come from, and how images are made."""
    return msgspec.json.encode(replace(recipe, request=replace(recipe.request, packages=(), reference="")))


def decoded(encoded: bytes, kind: type[T]) -> T:
    """Read JSON; raises `UnreadableRecordError`."""
    try:
        return msgspec.json.decode(encoded, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnreadableRecordError(str(error)) from error


@contextmanager
def skipping_unreadable(**what: str) -> Iterator[None]:
    """Leave a record out that can't be read, and log it."""
    try:
        yield
    except UnreadableRecordError as error:
        log.warning("a record of the build index can't be read", reason=str(error), **what)
