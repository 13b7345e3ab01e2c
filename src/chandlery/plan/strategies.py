"""Which store paths share a layer: pure functions from a closure to at most `budget` groups.

What a plan is judged by is the bytes that a client downloads over a sequence of pulls, keeping the layers it
has, and those that the registry keeps (docs/layering.md).

Every strategy keeps these rules, and the tests check them for each:

- every store path is in exactly one group, and there are at most `budget` groups
- the order in which the closure was given doesn't matter, and every comparison has a last tie-break
- neither what a group holds nor where it stands depends on a store path's hash. The hash changes when a
  dependency does, while with the root layout the layer's bytes may not. Only where a closure has the same
  name twice does the hash decide, because nothing else is left
- what many store paths need comes first (see `plan.layer_group`)

A plan is known by the strategy's name, `PLAN_VERSION` and the `identity` of the popularity that it was given:
all three belong to the key of what is made with it.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from chandlery.nix.closure import Closure, ClosureNode, StorePath
from chandlery.plan.by_size import largest_alone, one_per_path
from chandlery.plan.grouped import grouped
from chandlery.plan.layer_group import LayerGroup, Strategy
from chandlery.plan.peers import nixery, popularity_contest
from chandlery.plan.popularity import Popularity

__all__ = [
    "DEFAULT_STRATEGY",
    "PLAN_VERSION",
    "STRATEGIES",
    "LayerGroup",
    "Popularity",
    "Strategy",
    "closure_of",
]

# Part of what a built image is remembered by: goes up when a strategy gives another plan for the same input.
PLAN_VERSION = 2

STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "grouped": grouped,
        "largest-alone": largest_alone,
        "one-per-path": one_per_path,
        "nixery": nixery,
        "popularity-contest": popularity_contest,
    }
)
DEFAULT_STRATEGY = "grouped"


def closure_of(nodes: Iterable[tuple[str, int, Iterable[str]]]) -> Closure:
    """Take store paths, their sizes in bytes and their references; `ValueError` if one is no store path.

    The roots are those that no other refers to.
    """
    taken = [
        ClosureNode(StorePath.parse(path), size, tuple(map(StorePath.parse, references)))
        for path, size, references in nodes
    ]
    referred = {it for node in taken for it in node.references if it != node.path}
    return Closure.of([node.path for node in taken if node.path not in referred], taken)
