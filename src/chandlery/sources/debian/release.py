"""What the signed Release files of a suite list: the Packages files of every architecture. No I/O.

A suite's revision is a hash of that, for all architectures that images are made for. So they share it, and it
is known before any Packages file is (docs/decisions/0020-one-revision-of-a-suite.md). Mirrors are no part of
it, nor are dates and signatures: machines that were given the same packages agree.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from debian import deb822

from chandlery.oci.documents import ARCHITECTURES, canonical_json
from chandlery.plan.package_clusters import MEASURE_VERSION
from chandlery.sources.debian.snapshot import LOCK_VERSION

COMPONENT = "main"

_SHA256 = re.compile("[0-9a-f]{64}")
# The first that is listed is fetched.
_FORMS = (".xz", ".gz", "")


@dataclass(frozen=True, slots=True)
class PackagesFile:
    """One form of a Packages file; `path` is below the release's folder, and `size` in bytes."""

    path: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """A file name that nothing else has: the hash, and how it is compressed."""
        return self.sha256 + self.path.rpartition("Packages")[2]

    @property
    def by_hash(self) -> str:
        """Where the file stays for some time after the release has others (Debian's "Repository Format")."""
        return f"{self.path.rpartition('/')[0]}/by-hash/SHA256/{self.sha256}"


@dataclass(frozen=True, slots=True)
class Release:
    """One release of a repository, such as `bookworm-updates`.

    `packages` are the forms of each architecture's Packages file, the one that is fetched first.
    """

    name: str
    has_by_hash: bool
    packages: Mapping[str, tuple[PackagesFile, ...]]

    @classmethod
    def parse(cls, name: str, content: bytes) -> "Release":
        """Read a Release or InRelease file whose signature was checked. Raises `ValueError`."""
        fields = deb822.Release(content)
        try:
            listed = {each["name"]: each for each in fields["SHA256"]}
        except KeyError as error:
            raise ValueError("it lists no files by their SHA256") from error
        packages = {}
        for architecture in ARCHITECTURES:
            paths = [f"{COMPONENT}/binary-{architecture}/Packages{form}" for form in _FORMS]
            forms = tuple(_packages_file(listed[path]) for path in paths if path in listed)
            if forms:
                packages[architecture] = forms
        return cls(name, fields.get("Acquire-By-Hash", "no") == "yes", packages)

    def file(self, architecture: str) -> PackagesFile | None:
        """Return the Packages file to be fetched; None if the release has no packages for an architecture."""
        forms = self.packages.get(architecture, ())
        return forms[0] if forms and forms[-1].size else None


@dataclass(frozen=True, slots=True)
class SuiteState:
    """The releases of a suite at one moment: itself, what it stands on, and their updates, in this order."""

    releases: tuple[Release, ...]

    def revision(self, aliases: Mapping[str, Sequence[str]]) -> str:
        """Return the hash of what the releases list, and of how snapshots are made of it, in hexadecimal."""
        listed = [
            [each.name, {architecture: _identity(forms) for architecture, forms in each.packages.items()}]
            for each in self.releases
        ]
        made_with = [LOCK_VERSION, MEASURE_VERSION, aliases]
        return hashlib.sha256(canonical_json([made_with, listed])).hexdigest()

    @property
    def architectures(self) -> tuple[str, ...]:
        """The architectures that the suite itself has."""
        return tuple(self.releases[0].packages)

    def to_json(self) -> bytes:
        """Return the state as JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, content: bytes) -> "SuiteState":
        """Read what `to_json` wrote; raises `ValueError`."""
        return msgspec.json.decode(content, type=cls)


def _packages_file(listed: Mapping[str, Any]) -> PackagesFile:
    if _SHA256.fullmatch(listed["sha256"]) is None or not listed["size"].isdecimal():
        raise ValueError(f"it lists {listed['name'][:80]} without a SHA256 and a size")
    return PackagesFile(listed["name"], listed["sha256"], int(listed["size"]))


def _identity(forms: Sequence[PackagesFile]) -> str:
    """Return the hash of the file itself, which comes last; if it isn't listed, that of a compressed form."""
    return forms[-1].sha256
