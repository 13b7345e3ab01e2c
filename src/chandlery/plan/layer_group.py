"""What layer plans are made of: groups of store paths, and the order in which they are stacked.

What most images have comes first, and the root filesystem layer, which no two images share, comes last: old
Docker daemons reuse a layer only if every layer under it is the same.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter

from chandlery.nix.closure import Closure, ClosureNode, StorePath
from chandlery.plan.popularity import known_name


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """The store paths of one layer, sorted, and the sum of their nar sizes in bytes."""

    store_paths: tuple[StorePath, ...]
    nar_size: int


# Closure, popularity and budget. Popularity is by package name (see `known_name`), in any unit; it may be
# empty, and what it doesn't know counts as 0. `Popularity` has groups too, which any other mapping lacks.
Strategy = Callable[[Closure, Mapping[str, int], int], tuple[LayerGroup, ...]]


def check_budget(budget: int) -> None:
    """Raise `ValueError` if a plan could have no layer at all."""
    if budget < 1:
        raise ValueError(f"a plan needs at least one layer, not {budget}")


def stacked(
    groups: Iterable[Iterable[ClosureNode]], closure: Closure, popularity: Mapping[str, int]
) -> tuple[LayerGroup, ...]:
    """Order groups by how likely another image has the same; a group is no likelier than its least needed."""
    likelihood = needs(closure, popularity)
    ranked = []
    for group in groups:
        nodes = sorted(group, key=lambda node: node.path)
        paths = tuple(node.path for node in nodes)
        known, needed = min(likelihood[path] for path in paths)
        names = [path.name for path in paths]
        layer = LayerGroup(paths, sum(node.nar_size for node in nodes))
        ranked.append(((-known, -needed, names, layer.nar_size, paths), layer))
    return tuple(layer for _, layer in sorted(ranked, key=lambda pair: pair[0]))


def needs(closure: Closure, popularity: Mapping[str, int]) -> Mapping[StorePath, tuple[int, int]]:
    """Return how much each store path is needed: by the whole package set, and then within the closure."""
    return {
        node.path: (popularity.get(known_name(node.path.name, popularity), 0), needing.bit_count())
        for node, needing in zip(closure.nodes, dependants(closure), strict=True)
    }


def references(closure: Closure) -> list[list[int]]:
    """Return what each node refers to, all by their place in `closure.nodes`."""
    number = {node.path: place for place, node in enumerate(closure.nodes)}
    return [[number[it] for it in node.references if it in number] for node in closure.nodes]


def dependants(closure: Closure) -> list[int]:
    """Return what needs each node, directly or not, as bits by their place.

    5,000 sets of 5,000 are united in milliseconds.
    """
    edges = references(closure)
    found = [0] * len(edges)
    for node in reversed(references_first(edges)):
        needing = found[node] | 1 << node
        for reference in edges[node]:
            found[reference] |= needing
    return found


def references_first(edges: Sequence[Sequence[int]]) -> list[int]:
    """Sort nodes so that each comes after those that it refers to."""
    return list(TopologicalSorter(dict(enumerate(edges))).static_order())


def without_referrers(closure: Closure) -> set[StorePath]:
    """Return the store paths that no other refers to."""
    referred = {reference for node in closure.nodes for reference in node.references}
    return {node.path for node in closure.nodes} - referred
