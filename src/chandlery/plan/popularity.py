"""What a layer plan knows of the whole package set: how many packages need each one, and which go together.

No I/O. A table is made once, of a package set (`plan.package_clusters`) or a binary cache
(`sources.binary_cache`), and is data from then on: `identity` is a hash of all of it, and part of the key of
every image planned with it.

The file is JSON, `{"version": 1, "source": ..., "counts": {name: number}, "groups": {group: [name, ...]}}`.
Nixery's tables (`{name: number}`) are read as well; they have no groups.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import msgspec

from chandlery.oci.documents import canonical_json

_VERSION = 1

# Where the version starts, as builtins.parseDrvName has it (Nix manual).
_DIGIT = re.compile(r"-(?=[0-9])")
# A last part after the version is an output of the same package: `glibc-2.38-27-bin`.
_OUTPUT = re.compile(r"-[0-9][^-]*(?:-[0-9][^-]*)*-([a-z][a-z0-9]*)$")


class _File(msgspec.Struct, frozen=True):
    version: int
    source: str
    counts: dict[str, int]
    groups: dict[str, list[str]]


@dataclass(frozen=True)
class Popularity(Mapping[str, int]):
    """How many packages need each package, by name, and the groups of packages that share a layer.

    As a mapping it is the counts; what is in none of them counts as 0. `groups` is by name: packages with the
    same value are one group.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Read a file of this module, or a table of Nixery's; `ValueError` says why it is neither."""
        try:
            decoded: Any = msgspec.json.decode(content)
            if isinstance(decoded, dict) and "version" not in decoded:
                return cls(_with_packages(msgspec.convert(decoded, dict[str, int])))
            file = msgspec.convert(decoded, _File)
        except msgspec.MsgspecError as error:
            raise ValueError(f"it is no table of popularity: {error}") from error
        if file.version != _VERSION:
            raise ValueError(f"its version is {file.version}, and this program reads {_VERSION}")
        groups = {name: group for group, names in file.groups.items() for name in names}
        return cls(file.counts, groups, file.source)

    def encode(self) -> bytes:
        """Return the file; the same table always gives the same bytes."""
        groups: dict[str, list[str]] = {}
        for name in sorted(self.groups):
            groups.setdefault(self.groups[name], []).append(name)
        counts = dict(self.counts)
        return canonical_json(
            {"version": _VERSION, "source": self.source, "counts": counts, "groups": groups}
        )

    @cached_property
    def identity(self) -> str:
        """A hash of everything that a plan can see of it, in hexadecimal."""
        state = hashlib.sha256()
        for table in (self.counts, self.groups):
            state.update(f"{len(table)}\n".encode())
            for name, value in sorted(table.items()):
                state.update(f"{name} {value}\n".encode())
        return state.hexdigest()

    def __getitem__(self, name: str) -> int:
        return self.counts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)


def package_name(store_name: str) -> str:
    """Return a store path's name without the version: `git` for `git-2.39.5`."""
    return _DIGIT.split(store_name, maxsplit=1)[0]


def output_name(store_name: str) -> str:
    """Return the name without the version, but with the output: `glibc-bin` for `glibc-2.38-27-bin`."""
    output = _OUTPUT.search(store_name)
    return package_name(store_name) + (f"-{output[1]}" if output else "")


def known_name(store_name: str, popularity: Mapping[str, int]) -> str:
    """Return the name under which a table knows a store path; without a table, the name without the version.

    Names may have digits: of `gcc-12-base-12.2.0` the longest beginning counts that the table has.
    """
    package, output = package_name(store_name), output_name(store_name)
    beginnings = [store_name[: match.start()] for match in _DIGIT.finditer(store_name)]
    candidates = [store_name, *([output] if output != package else []), *reversed(beginnings)]
    return next((name for name in candidates if name in popularity), output)


def _with_packages(counts: Mapping[str, int]) -> dict[str, int]:
    """Add the names without versions, each with its largest count: tables name one version of a package."""
    known = dict(counts)
    for name, count in sorted(counts.items()):
        package = output_name(name)
        if package not in counts:
            known[package] = max(count, known.get(package, 0))
    return known
