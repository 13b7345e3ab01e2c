"""What Debian packages say of each other: what they need, conflict with and replace (Debian Policy, 7).

A store path with the root layout has in `nix-support/relations` what its packages' control files say: a
paragraph for each, with some of the fields Package, Version, Provides, Conflicts and Replaces.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from debian.debian_support import Version

# Debian Policy 7.1: name, :qualifier, (operator version).
_RELATION = re.compile(r"([a-z0-9][a-z0-9+.-]*)(?::[a-z0-9-]+)?\s*(?:\(\s*(<<|<=|=|>=|>>)\s*([^)\s]+)\s*\))?")


@dataclass(frozen=True, slots=True)
class Relation:
    """One alternative of a dependency: a package, and the versions of it that will do."""

    package: str
    operator: str = ""
    version: str = ""

    def accepts(self, version: str) -> bool:
        """Compare as dpkg does (deb-version(7)); what can be no version is none that will do."""
        if not self.operator:
            return True
        try:
            have, want = _version(version), _version(self.version)
        except ValueError:
            return False
        return {
            "<<": have < want,
            "<=": have <= want,
            "=": have == want,
            ">=": have >= want,
            ">>": have > want,
        }[self.operator]

    def is_met_by(self, provided: "Relation") -> bool:
        """Return whether a `Provides` meets this one; without a version it meets none (deb-control(5))."""
        if self.package != provided.package:
            return False
        return not self.operator or bool(provided.version and self.accepts(provided.version))


@dataclass(frozen=True, slots=True)
class RelatedPackage:
    """A package, and what it says of others."""

    name: str
    version: str = ""
    provides: tuple[Relation, ...] = ()
    conflicts: tuple[Relation, ...] = ()
    replaces: tuple[Relation, ...] = ()

    @classmethod
    def parse(cls, content: bytes) -> Iterator[Self]:
        """Read a `nix-support/relations` file; what can't be a relation is left out."""
        for paragraph in content.decode(errors="replace").split("\n\n"):
            # A line that begins with a space goes on with the field before (deb822(5)).
            lines = re.sub(r"\n[ \t]+", " ", paragraph).split("\n")
            fields = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
            if fields.get("Package"):
                provides, conflicts, replaces = (
                    tuple(one for either in parse_relations(fields.get(name, "")) for one in either)
                    for name in ("Provides", "Conflicts", "Replaces")
                )
                yield cls(fields["Package"], fields.get("Version", ""), provides, conflicts, replaces)

    def conflicts_with(self, other: "RelatedPackage") -> bool:
        """Return whether the other one, or what it provides, may not be installed beside this one."""
        return any(
            (relation.package == other.name and relation.accepts(other.version))
            or any(map(relation.is_met_by, other.provides))
            for relation in self.conflicts
        )

    def does_replace(self, other: "RelatedPackage") -> bool:
        """Return whether this one has the file that both have; what the other one provides doesn't count."""
        return any(
            relation.package == other.name and relation.accepts(other.version) for relation in self.replaces
        )


def parse_relations(text: str) -> tuple[tuple[Relation, ...], ...]:
    """Read a dependency field: a conjunction of alternatives."""
    return tuple(
        tuple(
            Relation(match[1], match[2] or "", match[3] or "")
            for match in map(_RELATION.match, map(str.strip, either.split("|")))
            if match
        )
        for either in text.split(",")
        if either.strip()
    )


@functools.lru_cache(maxsize=4096)
def _version(text: str) -> Version:
    return Version(text)
