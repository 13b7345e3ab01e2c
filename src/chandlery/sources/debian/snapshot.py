"""A Debian suite's packages, turned into the locked data that `nix/expressions/debian.nix` reads. No I/O.

A snapshot says which .debs (with their sha256) make up which unit, and which units a unit needs. A unit is a
set of packages that need each other, mostly one: cycles are condensed, so units form an acyclic graph. The
same index always gives the same snapshot, whose revision is the hash of all of it; the mirrors are no part of
it.

A snapshot is 4,096 small files rather than one of 20 MB, since an evaluation reads only a few packages: file
`<first three hex digits of sha256(name)>.json` holds `names` (package, virtual package or alias -> unit) and
`units` (unit -> .debs, references). `names.txt` has all names, for suggestions. Beside them stands a table of
the units' popularity, which takes longer to make than the snapshot, and follows from it.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import rustworkx
from debian.debian_support import Version

from chandlery.image.profile import BASE_PACKAGES, SHELL, SHIPPED
from chandlery.layers.package_relations import Relation, parse_relations
from chandlery.oci.documents import canonical_json
from chandlery.plan.package_clusters import MEASURE_VERSION, measure
from chandlery.plan.package_graph import PackageGraph
from chandlery.plan.popularity import Popularity

LOCK_VERSION = "2"

_FIELDS = (
    *("Package", "Version", "Installed-Size", "Pre-Depends", "Depends", "Provides", "Priority"),
    *("Filename", "SHA256"),
)
_PRIORITIES = ("required", "important", "standard", "optional", "extra")


@dataclass(frozen=True, slots=True)
class Package:
    """One paragraph of a Packages file (deb-control(5)), and which repository it stands in.

    `installed_size` is in KiB, and an estimate; 0 if the paragraph has none.
    """

    name: str
    version: str
    priority: str
    repository: int
    filename: str
    sha256: str
    depends: tuple[tuple[Relation, ...], ...] = ()
    provides: tuple[Relation, ...] = ()
    installed_size: int = 0

    @property
    def rank(self) -> tuple[int, str]:
        """Which provider of a virtual package is taken: the more important one, then by name."""
        known = self.priority in _PRIORITIES
        return (_PRIORITIES.index(self.priority) if known else len(_PRIORITIES), self.name)


@dataclass(frozen=True, slots=True)
class Unit:
    """Packages that need each other (mostly one), and the units that they need."""

    name: str
    packages: tuple[Package, ...]
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DebianSnapshot:
    """A suite at one moment: every unit, and every name that finds one."""

    units: Mapping[str, Unit]
    names: Mapping[str, str]
    unresolved: tuple[str, ...] = field(default=())  # "package: dependency" that nothing in the suite meets

    @classmethod
    def of(cls, packages: Iterable[Package], aliases: Mapping[str, Sequence[str]]) -> Self:
        """Resolve every dependency and condense the cycles."""
        return cls(*_Resolver(packages, aliases).resolve())

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Return the snapshot's files, by name; the same snapshot gives the same bytes."""
        shards: dict[str, dict[str, dict[str, object]]] = defaultdict(lambda: {"names": {}, "units": {}})
        for name, unit_name in self.names.items():
            shards[shard_of(name)]["names"][name] = unit_name
        for unit in self.units.values():
            shards[shard_of(unit.name)]["units"][unit.name] = {
                "debs": [
                    {
                        "name": package.name,
                        "version": package.version,
                        "repository": package.repository,
                        "filename": package.filename,
                        "sha256": package.sha256,
                        "installed_size": package.installed_size,
                    }
                    for package in unit.packages
                ],
                "references": unit.references,
            }
        empty: dict[str, object] = {"names": {}, "units": {}}
        for number in range(16**3):
            key = f"{number:03x}"
            yield f"{key}.json", canonical_json(shards.get(key, empty))
        yield "names.txt", "\n".join(sorted(self.names)).encode()

    def revision(self) -> str:
        """Name this state of the suite: a hash over everything in the snapshot, in hexadecimal.

        What popularity is made of is in it too.
        """
        state = hashlib.sha256(f"{LOCK_VERSION}\n{MEASURE_VERSION}\n".encode())
        for name, content in self.files():
            state.update(f"{name} {len(content)}\n".encode())
            state.update(content)
        return state.hexdigest()

    def popularity(self) -> Popularity:
        """Measure how many units need each one, and which go together; takes seconds."""
        graph = PackageGraph.of(
            {
                name: (name, sum(each.installed_size << 10 for each in unit.packages), unit.references)
                for name, unit in self.units.items()
            }
        )
        always, often = (
            {self.names[name] for name in packages if name in self.names}
            for packages in (BASE_PACKAGES, SHIPPED[SHELL].packages)
        )
        return measure(graph, always, often, source="debian")


def parse_packages(text: str, repository: int) -> Iterator[Package]:
    """Read a Packages file; paragraphs without a file (there are none in a sound index) are left out."""
    for paragraph in text.split("\n\n"):
        fields = {
            name: value
            for name, _, value in (line.partition(": ") for line in paragraph.split("\n"))
            if name in _FIELDS
        }
        if "Package" not in fields or "Filename" not in fields or "SHA256" not in fields:
            continue
        size = fields.get("Installed-Size", "")
        needs = ", ".join(fields[name] for name in ("Pre-Depends", "Depends") if name in fields)
        yield Package(
            name=fields["Package"],
            version=fields["Version"],
            priority=fields.get("Priority", ""),
            repository=repository,
            filename=fields["Filename"],
            sha256=fields["SHA256"],
            depends=parse_relations(needs),
            provides=tuple(one for either in parse_relations(fields.get("Provides", "")) for one in either),
            installed_size=int(size) if re.fullmatch("[0-9]{1,12}", size) else 0,
        )


class _Resolver:
    """Chooses, for each dependency, the package that meets it: the same one every time."""

    def __init__(self, packages: Iterable[Package], aliases: Mapping[str, Sequence[str]]) -> None:
        self._packages: dict[str, Package] = {}
        for package in packages:
            other = self._packages.get(package.name)
            # Suites overlap (a security update stands beside the release's version): the newest is taken.
            if other is None or _newness(package) > _newness(other):
                self._packages[package.name] = package
        self._providers: dict[str, list[tuple[Package, Relation]]] = defaultdict(list)
        for package in sorted(self._packages.values(), key=lambda package: package.rank):
            for provided in package.provides:
                self._providers[provided.package].append((package, provided))
        self._aliases = aliases
        self._unresolved: list[str] = []

    def resolve(self) -> tuple[dict[str, Unit], dict[str, str], tuple[str, ...]]:
        names = sorted(self._packages)
        index = {name: number for number, name in enumerate(names)}
        needs = [self._needs(self._packages[name]) for name in names]
        graph: rustworkx.PyDiGraph[str, None] = rustworkx.PyDiGraph()
        graph.add_nodes_from(names)
        graph.add_edges_from_no_data(
            [(number, index[need]) for number, needed in enumerate(needs) for need in needed]
        )
        unit_of: dict[str, str] = {}
        members: dict[str, list[str]] = {}
        for component in rustworkx.strongly_connected_components(graph):
            cycle = sorted(names[number] for number in component)
            members[cycle[0]] = cycle
            unit_of.update(dict.fromkeys(cycle, cycle[0]))
        units = {
            unit: Unit(
                unit,
                tuple(self._packages[name] for name in cycle),
                tuple(sorted({unit_of[d] for name in cycle for d in needs[index[name]]} - {unit})),
            )
            for unit, cycle in members.items()
        }
        self._add_virtual_packages(unit_of)
        self._add_aliases(unit_of, units)
        return units, unit_of, tuple(sorted(self._unresolved))

    def _needs(self, package: Package) -> list[str]:
        chosen = []
        for alternatives in package.depends:
            if not alternatives:
                # It says something that is no relation, such as a variable that was never replaced.
                self._unresolved.append(f"{package.name}: ?")
                continue
            first = alternatives[0].package
            if len(alternatives) == 1 and first in self._packages and first not in self._providers:
                # There is no other choice, so the version isn't compared: that is the slow part.
                met: str | None = first
            else:
                met = next(filter(None, map(self._meet, alternatives)), None)
            if met is None:
                text = " | ".join(relation.package for relation in alternatives)
                self._unresolved.append(f"{package.name}: {text}")
            elif met != package.name:
                chosen.append(met)
        return chosen

    def _meet(self, relation: Relation) -> str | None:
        """Find the package that meets one alternative: the real one, else the first provider."""
        package = self._packages.get(relation.package)
        if package is not None and relation.accepts(package.version):
            return package.name
        providers = self._providers.get(relation.package, ())
        return next((each.name for each, provided in providers if relation.is_met_by(provided)), None)

    def _add_virtual_packages(self, names: dict[str, str]) -> None:
        for virtual, providers in self._providers.items():
            if virtual not in names:
                names[virtual] = names[providers[0][0].name]

    def _add_aliases(self, names: dict[str, str], units: dict[str, Unit]) -> None:
        """Add nixpkgs' names; one that stands for several packages is a unit of no .deb that needs them."""
        for alias, targets in sorted(self._aliases.items()):
            found = [names[target] for target in targets if target in names]
            if alias in names or len(found) < len(targets):
                continue
            if len(found) == 1:
                names[alias] = found[0]
            else:
                units[alias] = Unit(alias, (), tuple(sorted(set(found))))
                names[alias] = alias


def _newness(package: Package) -> tuple[Version, int, str]:
    """Order the versions of one package; of equal ones the first repository has the newest."""
    return (Version(package.version), -package.repository, package.sha256)


def shard_of(name: str) -> str:
    """Return which of a snapshot's files has a name, without its suffix."""
    return hashlib.sha256(name.encode()).hexdigest()[:3]
