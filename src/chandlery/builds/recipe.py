"""What an image is made from, and nothing is left out: the same recipe gives the same image, at any time.

A recipe is data. It can be written down as JSON and read back, on this machine or another one, and carried
out there. An image's key is a hash of its recipe and of the versions of all that reaches its bytes. The index
keeps the recipe of every image, so that a blob that was lost or collected can be made again years later. What
a recipe can't tell is whether its source still has that revision; see `Images.remake`.
"""

from dataclasses import dataclass, field
from typing import Self

import msgspec

from chandlery.image.name import ImageRequest
from chandlery.layers.archive import ARCHIVE_VERSION
from chandlery.layers.compression import COMPRESSIONS
from chandlery.layers.root_layer import ROOT_LAYER_VERSION, RootLayerOptions
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.digest import Digest
from chandlery.oci.documents import DOCUMENTS_VERSION
from chandlery.plan.strategies import DEFAULT_STRATEGY, PLAN_VERSION


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How images are made; `max_layers` counts the root filesystem layer."""

    max_layers: int = 96
    compression: str = "gzip"
    strategy: str = DEFAULT_STRATEGY
    root_layer: RootLayerOptions = field(default_factory=RootLayerOptions)

    def key_parts(self) -> list[str]:
        """Return everything that an image's bytes depend on beside its packages."""
        return [
            str(self.max_layers),
            COMPRESSIONS[self.compression].fingerprint,
            self.strategy,
            str(PLAN_VERSION),
            str(ARCHIVE_VERSION),
            str(ROOT_LAYER_VERSION),
            str(DOCUMENTS_VERSION),
            *self.root_layer.key_parts(),
        ]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Where the packages come from, which of them, and how the image is made of them.

    `popularity` is the identity of the table that its layers are planned with; it is empty for none.
    """

    pin: PinnedSource
    request: ImageRequest
    options: BuildOptions
    popularity: str = ""

    @property
    def key(self) -> str:
        """The image's key in the index, 64 hexadecimal digits; the tag that was asked for isn't in it."""
        pin, request = self.pin, self.request
        return Digest.of_parts(
            [
                *(*pin.key_parts, str(request.platform), request.title),
                *("options", *self.options.key_parts()),
                *("popularity", self.popularity),
                *("profile", *request.profile.key_parts()),
                *("packages", *request.packages),
                # What these stand for may change with the version of Chandlery.
                *("all packages", *request.all_packages),
            ]
        ).hex

    @property
    def title(self) -> str:
        """What people call the image: its name, and for which platform it is."""
        return f"{self.request.name} for {self.request.platform}"

    def to_json(self) -> bytes:
        """Return the recipe as JSON, all of it."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Read a recipe that `to_json` wrote; `ValueError` says what is wrong with another."""
        try:
            return msgspec.json.decode(content, type=cls)
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not UTF-8: {error}") from error
