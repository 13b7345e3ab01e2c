"""What an image is made from, and nothing is left out: the same origin gives the same image, at any time.

An image's key is a hash of its origin and of the versions of all that reaches its bytes. The index keeps the
origin of every image, so that a blob that was lost or collected can be made again years later. What can't be
told from an origin is whether its source still has that revision; see `ImageBuilder.remake`.
"""

from dataclasses import dataclass, field

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
        """Give everything that an image's bytes depend on beside its packages."""
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
class ImageOrigin:
    """Where the packages come from, which of them, and how the image is made of them.

    `popularity` is the identity of the table that its layers are planned with; it is empty for none.
    """

    pin: PinnedSource
    request: ImageRequest
    options: BuildOptions
    popularity: str = ""

    @property
    def key(self) -> str:
        """The image's key in the build index; the tag that was asked for is no part of it."""
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
