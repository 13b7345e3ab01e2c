"""Queues whose builds do what a test says."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from chandlery.builds.build import Build
from chandlery.builds.build_queue import BuildQueue, Known, QueueLimits
from chandlery.builds.recipe import BuildOptions, Recipe
from chandlery.image.name import ImageRequest
from chandlery.machine.deadline import Deadline
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, Descriptor, Platform

IMAGE = BuiltImage({}, Descriptor("", Digest.of(b""), 0), (), 0, 0)

Work = Callable[[Build], Awaitable[BuiltImage]]


def recipe_of(*packages: str) -> Recipe:
    """Return the recipe of an image of some packages."""
    pin = PinnedSource("path", "/packages", "1" * 64)
    return Recipe(pin, ImageRequest(packages, Platform("linux", "amd64")), BuildOptions())


def name_of(build: Build) -> str:
    return build.recipe.request.name


async def nothing_known(_: str) -> None:
    return None


class WorkQueue(BuildQueue):
    """A queue that is told what to do with each image when it is asked for."""

    def __init__(self, limits: QueueLimits, folder: Path, known: Known = nothing_known) -> None:
        super().__init__(limits, folder, build=self._do, known=known)
        self._works: dict[str, Work] = {}

    async def ask(
        self, image: str, work: Work, client: str = "a", timeout: float | None = None
    ) -> BuiltImage:
        """Wait for an image that `work` makes."""
        self._works[image] = work
        return await self.wait(recipe_of(image), client, Deadline.after(timeout))

    async def _do(self, build: Build) -> BuiltImage:
        return await self._works[name_of(build)](build)
