"""A build while it runs."""

from dataclasses import dataclass
from pathlib import Path

from chandlery.builds.build import Build
from chandlery.builds.recipe import Recipe
from chandlery.storage.leases import Lease


@dataclass(frozen=True, slots=True)
class Job:
    """A build, and what keeps all that it needs from collectors meanwhile.

    `roots` is a folder of links for Nix's garbage collector, `lease` is for blobs.
    """

    build: Build
    roots: Path
    lease: Lease

    @property
    def recipe(self) -> Recipe:
        """What is built."""
        return self.build.recipe
