"""A build while it runs."""

from dataclasses import dataclass
from pathlib import Path

from chandlery.builds.build import Build
from chandlery.builds.recipe import Recipe
from chandlery.nix.nix import Nix
from chandlery.storage.leases import Lease


@dataclass(frozen=True, slots=True)
class Job:
    """A build, and what keeps all that it needs from collectors meanwhile.

    `nix` has the store of its package set, `roots` is a folder of links for Nix's garbage collector, and
    `lease` is for blobs.
    """

    build: Build
    nix: Nix
    roots: Path
    lease: Lease

    @property
    def recipe(self) -> Recipe:
        """What is built."""
        return self.build.recipe
