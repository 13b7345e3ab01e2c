"""A package set at one revision: what a moving source (a channel, a branch, a folder) is pinned to. No I/O.

Everything after the pin works with a `PinnedSource`, so every build has a key.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from chandlery.errors import RevisionGoneError

# How much of a revision a tag shows: enough to be unique, short enough to type.
REVISION_TAG_LENGTH = 16

NIXPKGS = "https://github.com/NixOS/nixpkgs"

# The trust domain of what Chandlery's own expressions describe.
OWN_DOMAIN = ""

_LOCAL = re.compile(r"(?:path:|(?:git\+|tarball\+)?file:(?://)?)?(/[^?]*)(?:\?.*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class PinnedSource:
    """A package set at one revision.

    `kind` and `location` say which source it is (a URL has no credentials), `variant` is a digest of the
    config and overlays that it is evaluated with (empty without any), and `revision` is what it held. `nix`
    is what `nix/expressions/package_set.nix` needs to know beyond that, such as where the lock is: it is no
    part of the identity. It is None if the source doesn't have that revision any more: what was resolved at
    it stays valid, and nothing new can be evaluated. `popularity` names a file that never changes, with the
    package set's own table (see `Popularity`); mostly it is empty. So is `stale`, which says why a newer
    one could not be asked for.
    """

    kind: str
    location: str
    revision: str
    variant: str = ""
    nix: Mapping[str, Any] | None = field(default_factory=dict, compare=False, hash=False)
    popularity: str = field(default="", compare=False, hash=False, kw_only=True)
    stale: str = field(default="", compare=False, hash=False, kw_only=True)

    @property
    def text(self) -> str:
        """The source as the settings write it."""
        return f"{self.kind}!{self.location}"

    @property
    def builders_are_own(self) -> bool:
        """Whether its builders are Chandlery's own, so that they may see what they need of this machine."""
        return self.kind == "debian"

    @property
    def trust_domain(self) -> str:
        """Who can change what it builds; see `trust_domain`."""
        return trust_domain(self.kind, self.location)

    @property
    def is_pure(self) -> bool:
        """Whether it is evaluated purely, from the Nix store, and reads no file that isn't there."""
        return self.kind == "flake"

    @property
    def tag(self) -> str:
        """The tag that always means this revision."""
        return self.revision[:REVISION_TAG_LENGTH]

    @property
    def key_parts(self) -> tuple[str, str, str, str]:
        """Return what the package set depends on."""
        return self.kind, self.location, self.revision, self.variant

    @property
    def public_location(self) -> str:
        """Where the package set comes from, as an image tells it: the same on every machine that has it.

        Of a folder of this machine it is only the name.
        """
        if self.kind == "nixpkgs":
            return NIXPKGS
        local = _LOCAL.fullmatch(self.location)
        if local:
            return f"{self.kind}!{PurePath(local[1]).name}"
        return self.location if "://" in self.location else f"{self.kind}!{self.location}"

    def to_nix(self) -> dict[str, Any]:
        """Return the argument `source` of `nix/expressions/package_set.nix`.

        Raises `RevisionGoneError` if the source doesn't have the revision any more.
        """
        if self.nix is None:
            raise RevisionGoneError(self.text, self.tag)
        return {"kind": self.kind, "location": self.location, **self.nix}


def trust_domain(kind: str, location: str) -> str:
    """Return a text that two sources share only if whoever can change the one can change the other.

    All suites of the Debian set are one: its builders are Chandlery's, and run nothing of what they unpack.
    """
    return OWN_DOMAIN if kind == "debian" else f"{kind}!{location}"
