"""How others plan layers, to measure by and for those who come from there."""

import operator
from collections.abc import Mapping

import rustworkx

from chandlery.nix.closure import Closure, ClosureNode, StorePath
from chandlery.plan.layer_group import (
    LayerGroup,
    check_budget,
    dependants,
    references,
    references_first,
    stacked,
    without_referrers,
)
from chandlery.plan.popularity import known_name

# Nixery, layers.go: `bigOrPopular`.
_LARGE = 100_000_000
_POPULAR = 100
# "glibc has ~300k references, these packages need *more*": they are in every image.
_IN_EVERY_IMAGE = ("nss-cacert", "iana-etc")
_MOST_POPULAR = 500_000

# Sums over sets of store paths are looked up so many at a time.
_SUMS = 8


def nixery(closure: Closure, popularity: Mapping[str, int], budget: int) -> tuple[LayerGroup, ...]:
    """Group what all ways from the image lead through, as Nixery does (its `layers/layers.go`).

    A store path that is large or popular hangs from the image itself, beside the packages that were asked
    for; the subtrees of the dominator tree below the image are the layers. Beyond the budget those with the
    least popularity * size are put into one. Unlike there, a store path's size is its own and not its
    closure's, which counts what is shared many times, and ties are broken by name.
    """
    check_budget(budget)
    edges = references(closure)
    image = len(edges)
    popular = [_nixery_popularity(node.path, popularity) for node in closure.nodes]
    roots = {*closure.roots, *without_referrers(closure)}
    top = [
        number
        for number, node in enumerate(closure.nodes)
        if node.path in roots or node.nar_size > _LARGE or popular[number] >= _POPULAR
    ]
    graph: rustworkx.PyDiGraph[int, None] = rustworkx.PyDiGraph()
    graph.add_nodes_from(range(image + 1))
    graph.add_edges_from_no_data([(image, number) for number in top])
    graph.add_edges_from_no_data([(node, it) for node, of in enumerate(edges) for it in of])
    dominator = rustworkx.immediate_dominators(graph, image)
    heads: dict[int, int] = {}
    trees: dict[int, list[ClosureNode]] = {}
    for number, node in enumerate(closure.nodes):
        way = [number]
        while way[-1] not in heads and dominator[way[-1]] != image:
            way.append(dominator[way[-1]])
        head = heads.get(way[-1], way[-1])
        heads.update(dict.fromkeys(way, head))
        trees.setdefault(head, []).append(node)

    def rating(head: int) -> tuple[int, StorePath]:
        return popular[head] * sum(node.nar_size for node in trees[head]), closure.nodes[head].path

    layers = [trees[head] for head in sorted(trees, key=rating)]
    if len(layers) > budget:
        beyond = len(layers) - budget + 1
        layers = [[node for layer in layers[:beyond] for node in layer], *layers[beyond:]]
    return stacked(layers, closure, popularity)


def popularity_contest(
    closure: Closure, popularity: Mapping[str, int], budget: int
) -> tuple[LayerGroup, ...]:
    """Give the most popular store paths a layer each, as nixpkgs' dockerTools does (`closure-graph.py`).

    Popular is what is deep in the graph and on many ways from the roots: the references are unrolled into a
    tree, and a store path scores for each of its places there and each above. Of the others the last layer is
    made. Popularity in the package set doesn't count.
    """
    check_budget(budget)
    scores = _contest(closure)
    ranked = sorted(closure.nodes, key=lambda node: (-scores[node.path], node.path))
    if len(ranked) <= budget:
        return stacked([[node] for node in ranked], closure, popularity)
    alone, rest = ranked[: budget - 1], ranked[budget - 1 :]
    return stacked([*([node] for node in alone), rest], closure, popularity)


def _contest(closure: Closure) -> Mapping[StorePath, int]:
    """Score each store path: the number of ways to it, and to all above it, each way counted.

    That is what unrolling and counting gives, without a tree whose size is exponential.
    """
    edges = references(closure)
    roots = without_referrers(closure)
    ways = [int(node.path in roots) for node in closure.nodes]
    for node in reversed(references_first(edges)):
        for reference in edges[node]:
            ways[reference] += ways[node]
    # The sums over all subsets of eight neighbours at a time make the sum over any set a few look-ups.
    tables = []
    for start in range(0, len(ways), _SUMS):
        table = [0]
        for number in ways[start : start + _SUMS]:
            table += [total + number for total in table]
        tables.append(table)
    return {
        node.path: own + sum(map(operator.getitem, tables, needing.to_bytes(len(tables), "little")))
        for node, own, needing in zip(closure.nodes, ways, dependants(closure), strict=True)
    }


def _nixery_popularity(path: StorePath, popularity: Mapping[str, int]) -> int:
    if path.name.startswith(_IN_EVERY_IMAGE):
        return _MOST_POPULAR
    return max(1, popularity.get(known_name(path.name, popularity), 1))
