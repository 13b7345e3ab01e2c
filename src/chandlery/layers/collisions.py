"""Packages at / that have the same paths, and whose are in the image.

Debian's packages may have the same path only if one of them says so (Debian Policy 7.4, 7.6): that it
conflicts with the other, or that it replaces it. So only those that do are compared, and no other package's
files are listed. Of two packages:

1. one that replaces the other and doesn't conflict with it has the path, as dpkg has it
2. of what conflicts, what was asked for has it, the more wanted before the less; dpkg wouldn't install both
3. of what merely came along, one that replaces the other has it, or else the first by name

`layers.root_filesystem` puts what these paths hold into the last layer, which covers the others, so that
layers of packages stay what they are. A store path with the root layout that has no `nix-support/relations`,
as no .deb was unpacked there, is compared with none: what lies in a higher layer has the path, or comes later
within a layer (`layers.archive`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from chandlery.layers.package_relations import RelatedPackage
from chandlery.layers.store_reader import Entry, Reader
from chandlery.nix.closure import Closure, StorePath

_PATHS_TOLD = 3


class Reason(Enum):
    """Why one package's paths are in the image and the other's are not."""

    REPLACES = "it replaces the other"
    ASKED = "it was asked for"
    BEFORE = "it comes first in what was asked for"
    NAME = "it comes first by name"


@dataclass(frozen=True, slots=True)
class Collision:
    """Two packages that have the same paths, and whose are in the image.

    `entries` are the winner's, in order: `paths`, and what is above and below them.
    """

    winner: str
    loser: str
    reason: Reason
    paths: tuple[bytes, ...]
    entries: tuple[Entry, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        told = [f"/{path.decode(errors='backslashreplace')}" for path in self.paths[:_PATHS_TOLD]]
        more = f" and {len(self.paths) - _PATHS_TOLD} more" if len(self.paths) > _PATHS_TOLD else ""
        return (
            f"{self.winner} and {self.loser} have the same paths ({', '.join(told)}{more}): "
            f"here are those of {self.winner}, since {self.reason.value}"
        )


@dataclass(frozen=True, slots=True)
class _Member:
    """A package, and where it was unpacked."""

    store_path: StorePath
    package: RelatedPackage


def collisions(reader: Reader, closure: Closure, roots: Sequence[StorePath]) -> list[Collision]:
    """Return which packages of an image collide.

    `roots` are the store paths that were asked for, the most wanted first. Raises what `Reader` raises.
    """
    wanted = {root: place for place, root in enumerate(roots)}
    members = [
        _Member(node.path, package)
        for node in closure.nodes
        if (said := reader.read(node.path, b"nix-support/relations")) is not None
        for package in RelatedPackage.parse(said)
    ]

    def order(ranked: tuple[_Member, _Member, Reason]) -> tuple[int, StorePath, StorePath]:
        """For a path that three have, the most wanted comes first."""
        winner, loser, _ = ranked
        return wanted.get(winner.store_path, len(wanted)), winner.store_path, loser.store_path

    pairs = sorted((_ranked(one, other, wanted) for one, other in _related(members)), key=order)
    return [found for each in pairs if (found := _collision(reader, *each)).paths]


def disputed(found: Iterable[Collision]) -> Mapping[bytes, Entry]:
    """Return what stands at the paths that were settled, and above and below them."""
    entries: dict[bytes, Entry] = {}
    for collision in found:
        for entry in collision.entries:
            entries.setdefault(entry.path, entry)
    return entries


def _related(members: Sequence[_Member]) -> Iterator[tuple[_Member, _Member]]:
    """Yield each two packages of which one conflicts with the other or replaces it, once."""
    known: dict[str, list[_Member]] = defaultdict(list)
    for member in members:
        for name in {member.package.name, *(each.package for each in member.package.provides)}:
            known[name].append(member)
    seen = set()
    for member in members:
        package = member.package
        for name in sorted({relation.package for relation in (*package.conflicts, *package.replaces)}):
            for other in known.get(name, ()):
                pair = frozenset((package.name, other.package.name))
                if other.store_path == member.store_path or pair in seen:
                    continue
                if package.conflicts_with(other.package) or package.does_replace(other.package):
                    seen.add(pair)
                    yield member, other


def _ranked(one: _Member, other: _Member, wanted: Mapping[StorePath, int]) -> tuple[_Member, _Member, Reason]:
    """Return whose paths are in the image, whose are not, and why."""
    conflict = one.package.conflicts_with(other.package) or other.package.conflicts_with(one.package)
    replaces = one.package.does_replace(other.package), other.package.does_replace(one.package)
    by_replacing = {(True, False): (one, other), (False, True): (other, one)}.get(replaces)
    if by_replacing and not conflict:
        return *by_replacing, Reason.REPLACES
    places = [wanted.get(each.store_path, len(wanted)) for each in (one, other)]
    if places[0] != places[1]:
        first, second = (one, other) if places[0] < places[1] else (other, one)
        return first, second, Reason.BEFORE if max(places) < len(wanted) else Reason.ASKED
    if by_replacing:
        return *by_replacing, Reason.REPLACES
    first, second = sorted((one, other), key=lambda each: each.store_path)
    return first, second, Reason.NAME


def _collision(reader: Reader, winner: _Member, loser: _Member, reason: Reason) -> Collision:
    """Compare what two packages hold."""
    held = {entry.path: entry for entry in reader.entries(loser.store_path)}
    paths: list[bytes] = []
    entries: dict[bytes, Entry] = {}
    folders: dict[bytes, Entry] = {}
    covering = None  # a directory of the winner's in place of something else: all that is below is meant
    for entry in reader.entries(winner.store_path):
        if entry.is_directory:
            folders[entry.path] = entry
        other = held.get(entry.path)
        if covering is not None and entry.path.startswith(covering):
            entries[entry.path] = entry
        elif other is not None and not _is_same_directory(entry, other):
            paths.append(entry.path)
            entries.update((path, folders[path]) for path in _parents(entry.path))
            entries[entry.path] = entry
            covering = entry.path + b"/" if entry.is_directory and not other.is_directory else None
    return Collision(
        winner.package.name,
        loser.package.name,
        reason,
        tuple(paths),
        tuple(sorted(entries.values(), key=lambda entry: entry.order)),
    )


def _is_same_directory(entry: Entry, other: Entry) -> bool:
    return entry.is_directory and entry[1:] == other[1:]


def _parents(path: bytes) -> Iterator[bytes]:
    while path := path.rpartition(b"/")[0]:
        yield path
