"""Chandlery's own layer plan: groups that hold for every image, then the largest alone, then a tail in bands.

docs/layering.md has the reasons and the measurements.
"""

from collections.abc import Mapping

from chandlery.nix.closure import Closure, ClosureNode, StorePath
from chandlery.plan.layer_group import LayerGroup, check_budget, needs, stacked
from chandlery.plan.popularity import Popularity, known_name

# Layers of the tail. Fewer leave more layers for single packages, more are spoilt less by an update.
_BANDS = 2
# With a small budget most layers are still for what is large.
_BAND_SHARE = 8
# How much more a layer of its own is worth for what is needed much: as log2(needed) + this to size.
_NEED = 2


def grouped(closure: Closure, popularity: Mapping[str, int], budget: int) -> tuple[LayerGroup, ...]:
    """Put packages of one group into one layer in every image, then give the largest units one each.

    - A unit is a group of `popularity` (as much of it as the closure has), or a single store path. An image
      that has room enough has the same units: a client that holds it shares them with a larger one.
    - Beyond the budget the smallest units are the tail, a little less so those that are needed much. It is
      split into two bands by how much the whole package set needs a unit: what is in most images doesn't
      share a layer with what is in few, and no package moves another's band.
    - Without groups (no popularity, or a plain table of counts) every store path is a unit; without counts
      the closure's own references tell what is needed.
    """
    check_budget(budget)
    group_of = popularity.groups if isinstance(popularity, Popularity) else {}
    units: dict[tuple[str, StorePath | None], list[ClosureNode]] = {}
    for node in sorted(closure.nodes, key=lambda node: node.path):
        group = group_of.get(known_name(node.path.name, popularity)) if group_of else None
        units.setdefault(("", node.path) if group is None else (group, None), []).append(node)
    if len(units) <= budget:
        return stacked(units.values(), closure, popularity)

    needed = {
        path: known if popularity else within for path, (known, within) in needs(closure, popularity).items()
    }

    def need(unit: list[ClosureNode]) -> int:
        """Return log2 of how much the least needed is needed, in whole numbers."""
        return min(needed[node.path] for node in unit).bit_length()

    def worth(unit: list[ClosureNode]) -> tuple[int, list[StorePath]]:
        size = sum(node.nar_size for node in unit)
        return -size * (need(unit) + _NEED), [node.path for node in unit]

    bands = min(_BANDS, max(1, budget // _BAND_SHARE))
    ranked = sorted(units.values(), key=worth)
    most = max(popularity.values() if popularity else needed.values()).bit_length()
    tail: dict[int, list[ClosureNode]] = {}
    for unit in ranked[budget - bands :]:
        tail.setdefault(max(0, min(bands - 1, need(unit) - most + bands)), []).extend(unit)
    return stacked([*ranked[: budget - bands], *tail.values()], closure, popularity)
