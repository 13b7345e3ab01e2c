"""Which store paths share a layer: pure functions from a closure to at most `budget` groups.

What a plan is judged by is the bytes that a client downloads over a sequence of pulls, keeping the layers it
has. A layer is reused only if everything in it is the same, so what is large stands alone, and what is small
is spread over a fixed number of buckets, where a change spoils one bucket and not all.

Every strategy keeps these rules, and the tests check them for each:

- every store path is in exactly one group, and there are at most `budget` groups
- the order in which the closure was given doesn't matter, and every comparison has a last tie-break
- neither what a group holds nor where it stands depends on a store path's hash. The hash changes when a
  dependency does, while with the root layout the layer's bytes may not. Only where a closure has the same
  name twice does the hash decide, because nothing else is left
- what many store paths need comes first: old Docker daemons reuse a layer only when all below it are the same
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from types import MappingProxyType

from chandlery.closure import Closure, ClosureNode, StorePath

# Part of what a built image is remembered by: goes up when a strategy gives another plan for the same input.
PLAN_VERSION = 1

# Measured with `layering/`: more buckets leave fewer layers for what is large, fewer are spoilt more often.
_BUCKETS = 24
# With a small budget most layers are still for what is large.
_BUCKET_SHARE = 3

# Where the version starts, as builtins.parseDrvName has it (Nix manual).
_VERSION = re.compile(r"-(?=[0-9])")


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The store paths of one layer, sorted, and the sum of their nar sizes in bytes."""

    store_paths: tuple[StorePath, ...]
    nar_size: int


# Closure, popularity and budget. Popularity is by package name (see `package_name`), in any unit; it may be
# empty, and what it doesn't know counts as 0.
Strategy = Callable[[Closure, Mapping[str, int], int], tuple[LayerGroup, ...]]


def largest_alone(closure: Closure, popularity: Mapping[str, int], budget: int) -> tuple[LayerGroup, ...]:
    """Give the largest store paths a layer each, and spread the rest over buckets by their names.

    `ValueError` if the budget is less than 1.
    """
    if budget < 1:
        raise ValueError(f"a plan needs at least one layer, not {budget}")
    alone = closure.nodes
    rest: tuple[ClosureNode, ...] = ()
    buckets = min(_BUCKETS, max(1, budget // _BUCKET_SHARE))
    if len(closure.nodes) > budget:
        ranked = sorted(closure.nodes, key=lambda node: (-node.nar_size, node.path))
        alone, rest = tuple(ranked[: budget - buckets]), tuple(ranked[budget - buckets :])

    bucketed: dict[int, list[ClosureNode]] = {}
    for node in rest:
        bucketed.setdefault(_bucket(node.path, buckets), []).append(node)
    return _most_needed_first([*([node] for node in alone), *bucketed.values()], closure, popularity)


STRATEGIES: Mapping[str, Strategy] = MappingProxyType({"largest-alone": largest_alone})


def package_name(store_path: StorePath) -> str:
    """Give the name without the version: `git` for `git-2.39.5`."""
    return _VERSION.split(store_path.name, maxsplit=1)[0]


def _bucket(store_path: StorePath, buckets: int) -> int:
    """Choose a bucket by the package's name, so that another version takes the place of the one before."""
    digest = hashlib.sha256(package_name(store_path).encode()).digest()
    return int.from_bytes(digest) % buckets


def _most_needed_first(
    groups: Iterable[Iterable[ClosureNode]], closure: Closure, popularity: Mapping[str, int]
) -> tuple[LayerGroup, ...]:
    """Order groups by how likely another image has the same; a group is no likelier than its least needed."""
    needed_by = _needed_by(closure)

    def likelihood(path: StorePath) -> tuple[int, int]:
        return popularity.get(package_name(path), 0), needed_by[path]

    ranked = []
    for group in groups:
        nodes = sorted(group, key=lambda node: node.path)
        paths = tuple(node.path for node in nodes)
        known, needed = min(map(likelihood, paths))
        names = [path.name for path in paths]
        layer = LayerGroup(paths, sum(node.nar_size for node in nodes))
        ranked.append(((-known, -needed, names, layer.nar_size, paths), layer))
    return tuple(layer for _, layer in sorted(ranked, key=lambda pair: pair[0]))


def _needed_by(closure: Closure) -> Mapping[StorePath, int]:
    """Count the store paths of the closure that need each one, directly or not.

    Sets of store paths are bits of a number: 5,000 sets of 5,000 are united in milliseconds.
    """
    references = {node.path: node.references for node in closure.nodes}
    dependants = dict.fromkeys(references, 0)
    # References first, so in reverse a store path comes after all that need it.
    ordered = [path for path in TopologicalSorter(references).static_order() if path in references]
    for number, path in enumerate(reversed(ordered)):
        for reference in references[path]:
            if reference in dependants:
                dependants[reference] |= dependants[path] | 1 << number
    return {path: bits.bit_count() for path, bits in dependants.items()}
