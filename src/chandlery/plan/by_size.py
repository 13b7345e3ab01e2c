"""Layer plans that need nothing but sizes."""

import hashlib
from collections.abc import Mapping

from chandlery.nix.closure import Closure, ClosureNode, StorePath
from chandlery.plan.layer_group import LayerGroup, check_budget, stacked
from chandlery.plan.popularity import package_name

# More buckets leave fewer layers for what is large, fewer are spoilt more often.
_BUCKETS = 24
# With a small budget most layers are still for what is large.
_BUCKET_SHARE = 3


def one_per_path(closure: Closure, popularity: Mapping[str, int], budget: int) -> tuple[LayerGroup, ...]:
    """Give each store path a layer; beyond the budget the largest have one, and the rest share one.

    The plainest plan there is: without a budget no other shares more, with store paths as units.
    """
    check_budget(budget)
    ranked = _largest_first(closure)
    if len(ranked) <= budget:
        return stacked([[node] for node in ranked], closure, popularity)
    alone, rest = ranked[: budget - 1], ranked[budget - 1 :]
    return stacked([*([node] for node in alone), rest], closure, popularity)


def largest_alone(closure: Closure, popularity: Mapping[str, int], budget: int) -> tuple[LayerGroup, ...]:
    """Give the largest store paths a layer each, and spread the rest over buckets by their names.

    One more package spoils one bucket and not all; a new version takes the place of the one before.
    """
    check_budget(budget)
    ranked = _largest_first(closure)
    if len(ranked) <= budget:
        return stacked([[node] for node in ranked], closure, popularity)
    buckets = min(_BUCKETS, max(1, budget // _BUCKET_SHARE))
    bucketed: dict[int, list[ClosureNode]] = {}
    for node in ranked[budget - buckets :]:
        bucketed.setdefault(_bucket(node.path, buckets), []).append(node)
    alone = ([node] for node in ranked[: budget - buckets])
    return stacked([*alone, *bucketed.values()], closure, popularity)


def _largest_first(closure: Closure) -> list[ClosureNode]:
    return sorted(closure.nodes, key=lambda node: (-node.nar_size, node.path))


def _bucket(store_path: StorePath, buckets: int) -> int:
    digest = hashlib.sha256(package_name(store_path.name).encode()).digest()
    return int.from_bytes(digest) % buckets
