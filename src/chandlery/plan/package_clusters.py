"""Which packages of a whole package set share a layer at next to no cost. No I/O.

A layer is reused only if all of it is the same. So packages can share one if an image that has one of them
nearly always has all of them, and if what is lost otherwise is small. Both can be told from the whole graph:

1. Draw images: a few thousand, each of some packages from anywhere in the set, with what every image has. For
   each package the images that hold it are a set of bits.
2. A group costs, per image, what is downloaded in vain: for each member its size times the chance that an
   image has it without the whole group, and its size times the chance that an update changes another member's
   dependencies and not its own:

       sum over members m of  size(m) * (p(m) - p(all) + e)
                            + u * size(m) * (1 - (1 - p(m))^60) * (1 - exp(-r * |needed by all less by m|))

   Both parts need only sums over the members and two counts of bits, so two groups are weighed up in a
   microsecond however large they are. For example, two packages of 1 MiB that need nothing:

       both in the same half of all images               1,676 bytes: joined if a mean image has 14 MB
       one in half of the images, one in half of these   263,820 bytes: apart unless it has 2.2 GB

3. Join the two groups that cost the least together, and again, until one layer less would cost an
   image an eight-thousandth of its size: hierarchical clustering, as of Ward (1963), with this cost.

The groups hold for every image alike. A plan that grouped each image at its best would do worse: it is the
difference between two images' groups that makes a client download the same package twice (docs/layering.md).

Nothing is drawn by chance: which images a package is drawn for is a hash of its name, so that a package more
or less changes little. Sizes count by their power of two, so that a new version changes nothing mostly.
"""

import hashlib
import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Collection
from dataclasses import dataclass

from chandlery.plan.package_graph import PackageGraph
from chandlery.plan.popularity import Popularity

# Goes up when another table is made of the same graph.
MEASURE_VERSION = 1

# Images drawn at most; fewer from small sets. The measurements are in docs/layering.md.
_IMAGES = 4096
# Packages that an image was asked for, on average: few for the first images, twice as many for the last.
_PACKAGES = 7
# Groups are for packages that one in so many needs; the others' chances are too small to be told from a draw.
_COMMON = 400
# A chance that packages part for reasons that no draw shows, such as that somebody asks for one by name.
_PARTING = 0.0003
# How often packages change (per package of a closure), and how much that counts beside new images.
_CHANGE = 0.003
_UPDATES = 1 / 6
# Images that a client has pulled when an update comes.
_PULLS = 60
# What one layer less may cost: this part of a mean image.
_WORTH = 1 / 8000

_MOST_DRAWS = 64


def measure(
    graph: PackageGraph, always: Collection[str] = (), often: Collection[str] = (), source: str = ""
) -> Popularity:
    """Count and group the packages of a set; takes seconds for 60,000.

    `always` are the names of packages that every image has, `often` of those that half of them have. What
    every image has counts as needed by all packages.
    """
    counts = graph.needed_by()
    for package in graph.closure(package for package, name in enumerate(graph.names) if name in always):
        counts[package] = len(graph)
    by_name: dict[str, int] = {}
    for name, count in zip(graph.names, counts, strict=True):
        by_name[name] = max(count, by_name.get(name, 0))
    groups = _Groups(graph, counts, always, often).joined() if len(graph) else []
    group_of: dict[str, str] = {}
    for group in groups:
        # Of several packages of one name the one that most need speaks for all.
        names = sorted({graph.names[member] for member in group} - group_of.keys())
        group_of.update(dict.fromkeys(names, names[0]) if len(names) > 1 else {})
    return Popularity(by_name, group_of, source)


@dataclass(frozen=True, slots=True)
class _Group:
    """Packages, and the sums over them that a cost is made of; see the module's formula.

    `spent` is the sum of size * p and of u * size * (1 - (1 - p)^60), less the cost; `unchanged` is the
    second of these times exp(r * |needed by the member|).
    """

    members: tuple[int, ...]
    images: int  # bits: which images have all members
    needed: int  # bits: what any member needs
    size: float
    spent: float
    unchanged: float
    cost: float

    def with_(self, other: "_Group", cost: float) -> "_Group":
        """Give both as one, which costs so much more than the two."""
        return _Group(
            self.members + other.members,
            self.images & other.images,
            self.needed | other.needed,
            self.size + other.size,
            self.spent + other.spent - cost,
            self.unchanged + other.unchanged,
            self.cost + other.cost + cost,
        )


class _Groups:
    """The groups while they are joined; a group is a number, and joined ones get the next."""

    def __init__(
        self, graph: PackageGraph, counts: list[int], always: Collection[str], often: Collection[str]
    ) -> None:
        self._images = min(_IMAGES, max(64, len(graph) // 8))
        held = graph.spread(_drawn(graph, self._images, frozenset(always), frozenset(often)))
        self._worth = int(
            sum(images.bit_count() * size for images, size in zip(held, graph.sizes, strict=True))
            / self._images
            * _WORTH
        )
        common = [package for package, count in enumerate(counts) if count * _COMMON >= len(graph)]
        # What most need comes first, so it is what a name stands for.
        common.sort(key=lambda package: (-counts[package], graph.names[package], package))
        # What common packages need is common too, so their closures are among themselves.
        number = {package: bit for bit, package in enumerate(common)}
        needed: dict[int, int] = {}
        for package in graph.order:
            if package in number:
                bits = 1 << number[package]
                for reference in graph.references[package]:
                    bits |= needed[reference]
                needed[package] = bits
        self._groups = {
            bit: self._alone(package, held[package], needed[package], graph.sizes[package])
            for package, bit in number.items()
        }
        self._next = len(common)
        self._unlikely = [math.exp(-_CHANGE * number) for number in range(len(common) + 1)]
        # Ascending by p(all): a partner that is much rarer or more common is too dear, and is not looked at.
        self._sorted = sorted((group.images.bit_count(), bit) for bit, group in self._groups.items())

    def _alone(self, package: int, images: int, needed: int, size: int) -> _Group:
        rounded = float(1 << (size * size).bit_length() // 2)
        chance = images.bit_count() / self._images
        updated = _UPDATES * rounded * (1 - (1 - chance) ** _PULLS)
        unchanged = updated * math.exp(_CHANGE * needed.bit_count())
        return _Group((package,), images, needed, rounded, rounded * chance + updated, unchanged, 0)

    def joined(self) -> list[tuple[int, ...]]:
        """Join until no two groups are worth it."""
        best: dict[int, tuple[int, int]] = {}
        heap: list[tuple[int, int, int]] = []

        def look(group: int) -> None:
            cost, partner = self._partner(group)
            if partner >= 0:
                best[group] = (cost, partner)
                heapq.heappush(heap, (cost, group, partner))

        for group in list(self._groups):
            look(group)
        while heap:
            cost, one, other = heapq.heappop(heap)
            if one not in self._groups or best[one] != (cost, other):
                continue
            # Of groups that are gone one looks for another partner; a new group looks for all that are left.
            look(one if other not in self._groups else self._join(one, other, cost))
        return [group.members for group in self._groups.values()]

    def _join(self, one: int, other: int, cost: int) -> int:
        first, second = self._groups.pop(one), self._groups.pop(other)
        for group, number in ((first, one), (second, other)):
            del self._sorted[bisect_left(self._sorted, (group.images.bit_count(), number))]
        new, self._next = self._next, self._next + 1
        joined = first.with_(second, cost)
        self._groups[new] = joined
        insort(self._sorted, (joined.images.bit_count(), new))
        return new

    def _partner(self, number: int) -> tuple[int, int]:
        """Find the group that costs the least beside this one, in whole bytes; -1 if none is worth it."""
        group, groups, images, unlikely = self._groups[number], self._groups, self._images, self._unlikely
        count = group.images.bit_count()
        best, partner = self._worth, -1
        place = bisect_left(self._sorted, (count, number))

        mine, needed, weight = group.images, group.needed, group.size
        spent, unchanged = group.spent, group.unchanged

        # The innermost loop: it runs millions of times for a whole Debian.
        def weigh(it: _Group) -> int:
            size = weight + it.size
            together = (mine & it.images).bit_count() / images
            alike = unlikely[(needed | it.needed).bit_count()]
            return int(spent + it.spent - size * (together - _PARTING) - alike * (unchanged + it.unchanged))

        for other_count, other in reversed(self._sorted[:place]):
            # This group would be without the rarer one at least so often.
            if weight * (count - other_count) / images - group.cost > best:
                break
            if (cost := weigh(groups[other])) < best:
                best, partner = cost, other
        for other_count, other in self._sorted[place + 1 :]:
            it = groups[other]
            if it.size * (other_count - count) / images - group.cost - it.cost > best:
                continue
            if (cost := weigh(it)) < best:
                best, partner = cost, other
        return best, partner


def _drawn(graph: PackageGraph, images: int, always: frozenset[str], often: frozenset[str]) -> list[int]:
    """Return, as bits, the images that each package was drawn for: a few of all, by its name's hash."""
    every = (1 << images) - 1
    half = every // 3
    mean = _PACKAGES * images / len(graph)

    def held(name: str) -> int:
        if name in always:
            return every
        return _draw(name, images, mean) | (half if name in often else 0)

    return [held(name) for name in graph.names]


def _draw(name: str, images: int, mean: float) -> int:
    """Draw a Poisson number of images by a hash; the later an image, the more packages it is asked for."""
    stream = hashlib.shake_256(name.encode()).digest(8 + 4 * _MOST_DRAWS)
    chance = int.from_bytes(stream[:8]) / 2**64
    number, term = 0, math.exp(-mean)
    total = term
    while chance > total and number < _MOST_DRAWS:
        number += 1
        term *= mean / number
        total += term
    bits = 0
    for start in range(8, 8 + 4 * number, 4):
        bits |= 1 << int(images * math.sqrt(int.from_bytes(stream[start : start + 4]) / 2**32))
    return bits
