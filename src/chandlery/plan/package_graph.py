"""A whole package set as a graph: what each package needs, and how large it is. Pure data.

Packages are numbers, so that sets of them can be the bits of an `int`: uniting two sets of 60,000 takes
microseconds, and counting them too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Self

import msgspec

# Sets are computed for so many packages at a time: wider ones no longer fit a processor's cache.
_CHUNK = 8192


class _File(msgspec.Struct, frozen=True):
    names: list[str]
    sizes: list[int]
    refs: list[list[int]]


@dataclass(frozen=True, slots=True)
class PackageGraph:
    """Package `i` is called `names[i]`, takes `sizes[i]` bytes and needs the packages `references[i]`.

    Names may repeat, since a store holds several versions and outputs of one package. `order` has references
    before what refers to them.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    references: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, packages: Mapping[str, tuple[str, int, Iterable[str]]]) -> Self:
        """Take each package's name, size in bytes and references, by key; the same packages give one graph.

        References to itself and to what isn't there are left out. `graphlib.CycleError` if there are cycles.
        """
        keys = sorted(packages)
        index = {key: number for number, key in enumerate(keys)}
        return cls.numbered(
            [packages[key][0] for key in keys],
            [packages[key][1] for key in keys],
            [sorted({index[it] for it in packages[key][2] if it in index} - {index[key]}) for key in keys],
        )

    @classmethod
    def numbered(
        cls, names: Sequence[str], sizes: Sequence[int], references: Sequence[Sequence[int]]
    ) -> Self:
        """Take the packages in the order of their numbers; `graphlib.CycleError` if they need each other."""
        order = TopologicalSorter(dict(enumerate(references))).static_order()
        return cls(tuple(names), tuple(sizes), tuple(map(tuple, references)), tuple(order))

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Read JSON with `names`, `sizes` and `refs`; `ValueError` if it is something else."""
        file = msgspec.json.decode(content, type=_File)
        return cls.numbered(file.names, file.sizes, file.refs)

    def __len__(self) -> int:
        return len(self.names)

    def closure(self, roots: Iterable[int]) -> set[int]:
        """Return all that some packages need, with themselves."""
        return _reached(self.references, roots)

    def dependants(self, packages: Iterable[int]) -> set[int]:
        """Return all that needs some packages, with themselves."""
        return _reached(self.referrers(), packages)

    def referrers(self) -> list[list[int]]:
        """Return what refers to each package."""
        found: list[list[int]] = [[] for _ in self.names]
        for package, references in enumerate(self.references):
            for reference in references:
                found[reference].append(package)
        return found

    def spread(self, bits: Sequence[int]) -> list[int]:
        """Unite each package's bits with those of all that needs it."""
        united = list(bits)
        for package in reversed(self.order):
            own = united[package]
            if own:
                for reference in self.references[package]:
                    united[reference] |= own
        return united

    def needed_by(self) -> list[int]:
        """Count in how many packages' closures each one is, its own included."""
        counts = [0] * len(self)
        for chunk in self._chunks():
            bits = [0] * len(self)
            for number, package in enumerate(chunk):
                bits[package] = 1 << number
            for package, needing in enumerate(self.spread(bits)):
                counts[package] += needing.bit_count()
        return counts

    def _chunks(self) -> Iterator[range]:
        for start in range(0, len(self), _CHUNK):
            yield range(start, min(start + _CHUNK, len(self)))


def _reached(edges: Sequence[Sequence[int]], starts: Iterable[int]) -> set[int]:
    reached = set(starts)
    waiting = list(reached)
    while waiting:
        for other in edges[waiting.pop()]:
            if other not in reached:
                reached.add(other)
                waiting.append(other)
    return reached
