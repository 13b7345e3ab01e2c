"""The Nix stores of a data folder: what doesn't trust each other doesn't share one.

A builder runs as the user that owns the store, so it can change what it is given to build with, and with it
whatever is packed or built from that later. Hence each trust domain (`PinnedSource.trust_domain`) has a store
of its own; decision 11 says at what cost. In the machine's store it is build users that keep builders apart,
if there are any.

    nix/                      the store of the Debian set, and its etc/nix.conf, which counts for all
    nix-stores/<kind>-<key>/  the stores of other sources; those of sources that are gone are still collected
"""

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from chandlery.nix.configuration import NixLimits, NixOptions, builds_as_others
from chandlery.nix.nix import Nix
from chandlery.nix.pinned_source import OWN_DOMAIN, PinnedSource

# What is to be said where `mix` is true, and what to do.
MIXED = "builders of one package set could change what is in another's images: Nix has no build users here"
UNMIXED = 'set nix_store = "own", or let Nix have build users'

# What is to be said where root builds in a store of its own, and what to do: root owns /proc/sys in every
# user namespace.
AS_ROOT = "builders of root's Nix could write settings of the kernel (/proc/sys), and so reach this machine"
AS_USER = "run the server as an ordinary user"

_OWN = "nix"
_OTHERS = "nix-stores"


class NixStores:
    """Stores of Chandlery's own in the data folder `folder`; made when they are first used."""

    def __init__(self, folder: Path, limits: NixLimits, options: NixOptions | None = None) -> None:
        self._folder = folder
        self._limits = limits
        self._options = options
        self._stores: dict[Path, Nix] = {}
        self._one: Nix | None = None

    @classmethod
    def of_one(cls, nix: Nix) -> "NixStores":
        """Return one store for all: the machine's, or that of a server with one source."""
        stores = cls(Path(), NixLimits())
        stores._one = nix
        return stores

    @property
    def own(self) -> Nix:
        """The store of what Chandlery's own expressions describe: the Debian set."""
        return self.at(OWN_DOMAIN)

    def of(self, pin: PinnedSource) -> Nix:
        """Return the store that a package set is built in."""
        return self.at(pin.trust_domain)

    def at(self, domain: str) -> Nix:
        """Return the store of a trust domain."""
        return self._one or self._at(store_folder(self._folder, domain))

    def existing(self) -> Sequence[Nix]:
        """Return the stores that are there, of whatever sources; the machine's always is."""
        return [self._one] if self._one else [self._at(each) for each in store_folders(self._folder)]

    def mix(self, domains: Collection[str]) -> bool:
        """Return whether the builders of one of these trust domains could change what is another's."""
        shared = self._one is not None and len(set(domains)) > 1
        return shared and not builds_as_others()

    @property
    def reach_the_kernel(self) -> bool:
        """Return whether builders have root's rights where the kernel asks only who they are."""
        return self._one is None and os.geteuid() == 0

    def _at(self, folder: Path) -> Nix:
        if folder not in self._stores:
            configuration = self._folder / _OWN / "etc"
            self._stores[folder] = Nix(folder, self._limits, self._options, configuration)
        return self._stores[folder]


def store_folder(folder: Path, domain: str) -> Path:
    """Return where the store of a trust domain is in a data folder."""
    if domain == OWN_DOMAIN:
        return folder / _OWN
    key = hashlib.sha256(domain.encode(errors="surrogateescape")).hexdigest()[:16]
    return folder / _OTHERS / f"{domain.partition('!')[0]}-{key}"


def store_folders(folder: Path) -> list[Path]:
    """Return the stores that are in a data folder."""
    found = [folder / _OWN, *sorted((folder / _OTHERS).glob("*-*"))]
    return [each for each in found if (each / "nix").is_dir()]
