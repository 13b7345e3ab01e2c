"""What layer plans cost: clients that pull sequences of images and keep the layers they have. Pure.

A pull costs the layers that a client doesn't hold. The limit is one layer per store path without a budget; no
plan can cost less with store paths as units, and none costs less than the first pull of everything. An update
gives some packages a new version, and with them all that needs them, as store paths do; then every client
pulls its sequence again.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import msgspec

from chandlery.nix.closure import Closure, ClosureNode, StorePath
from chandlery.plan.layer_group import LayerGroup
from chandlery.plan.package_graph import PackageGraph

# From a closure to its layers: a strategy with its popularity and budget.
Plan = Callable[[Closure], Sequence[LayerGroup]]


class _File(msgspec.Struct, frozen=True):
    clients: list[list[list[str]]]
    updates: list[list[str]]


@dataclass(frozen=True, slots=True)
class Workload:
    """What each client pulls, one after the other, and what each update changes; packages by number."""

    clients: tuple[tuple[tuple[int, ...], ...], ...]
    updates: tuple[tuple[int, ...], ...]

    @classmethod
    def parse(cls, content: bytes, graph: PackageGraph) -> Self:
        """Read JSON with `clients` and `updates`, both of names; `ValueError` if the graph has one not."""
        file = msgspec.json.decode(content, type=_File)
        number = {name: package for package, name in enumerate(graph.names)}

        def numbers(names: Iterable[str]) -> tuple[int, ...]:
            unknown = sorted(set(names) - number.keys())
            if unknown:
                raise ValueError(f"the package graph has no {', '.join(unknown)}")
            return tuple(sorted(number[name] for name in names))

        return cls(
            tuple(tuple(numbers(pull) for pull in pulls) for pulls in file.clients),
            tuple(map(numbers, file.updates)),
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes that each client downloaded, and that the registry keeps of it."""

    downloaded: tuple[int, ...]
    kept: int

    @property
    def total(self) -> int:
        """What all clients downloaded."""
        return sum(self.downloaded)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a plan cost: at first, after all updates (without what went before), and by unbroken chains alone.

    `layers` has the number of each image's layers.
    """

    cold: Cost
    updated: Cost
    chained: Cost
    layers: tuple[int, ...]


class Simulation:
    """Plays one workload with any plan."""

    def __init__(self, graph: PackageGraph, workload: Workload) -> None:
        self._graph = graph
        self._workload = workload
        self._changed = [graph.dependants(update) for update in workload.updates]
        paths = [_path(number, name) for number, name in enumerate(graph.names)]
        self._number = {path: number for number, path in enumerate(paths)}
        self._nodes = [
            ClosureNode(path, size, tuple(paths[it] for it in references))
            for path, size, references in zip(paths, graph.sizes, graph.references, strict=True)
        ]
        images = {pull for pulls in workload.clients for pull in pulls}
        self.closures: Mapping[tuple[int, ...], Closure] = {
            image: Closure.of(
                (paths[root] for root in image), (self._nodes[it] for it in graph.closure(image))
            )
            for image in sorted(images)
        }

    def limit(self) -> Outcome:
        """Play one layer per store path."""
        return self.play(lambda closure: [LayerGroup((node.path,), node.nar_size) for node in closure.nodes])

    def play(self, plan: Plan) -> Outcome:
        """Plan each image once, and let every client pull: from nothing, and after each update."""
        images = {
            image: [
                (tuple(self._number[path] for path in group.store_paths), group.nar_size)
                for group in plan(closure)
            ]
            for image, closure in self.closures.items()
        }
        versions = [0] * len(self._graph)
        held: list[set[object]] = [set() for _ in self._workload.clients]
        registry: set[object] = set()
        costs = [self._round(images, versions, held, registry)]
        for update, changed in enumerate(self._changed, 1):
            for package in changed:
                versions[package] = update
            costs.append(self._round(images, versions, held, registry))
        after = costs[1:]
        updated = Cost(
            tuple(sum(cost.downloaded[client] for cost in after) for client in range(len(held))),
            sum(cost.kept for cost in after),
        )
        layers = tuple(len(images[pull]) for pulls in self._workload.clients for pull in pulls)
        return Outcome(costs[0], updated, self._chained(images), layers)

    def _round(
        self,
        images: Mapping[tuple[int, ...], Sequence[tuple[tuple[int, ...], int]]],
        versions: Sequence[int],
        held: Sequence[set[object]],
        registry: set[object],
    ) -> Cost:
        downloaded, kept = [0] * len(held), 0
        for client, pulls in enumerate(self._workload.clients):
            for pull in pulls:
                for packages, size in images[pull]:
                    layer = tuple((package, versions[package]) for package in packages)
                    if layer not in held[client]:
                        held[client].add(layer)
                        downloaded[client] += size
                        kept += 0 if layer in registry else size
                        registry.add(layer)
        return Cost(tuple(downloaded), kept)

    def _chained(self, images: Mapping[tuple[int, ...], Sequence[tuple[tuple[int, ...], int]]]) -> Cost:
        """Let clients reuse a layer only if they have it over the very same ones below."""
        downloaded = [0] * len(self._workload.clients)
        for client, pulls in enumerate(self._workload.clients):
            held: set[object] = set()
            for pull in pulls:
                chain: tuple[object, ...] = ()
                for packages, size in images[pull]:
                    # A chain is its hash, as in image-spec, config.md, "Layer ChainID".
                    chain = (hashlib.sha256(repr((chain, packages)).encode()).digest(),)
                    if chain not in held:
                        held.add(chain)
                        downloaded[client] += size
        return Cost(tuple(downloaded), 0)


def _path(number: int, name: str) -> StorePath:
    """Make a store path; the number is in place of the hash, in digits that Nix's base 32 has."""
    return StorePath(f"/nix/store/{number:032}-{name}-0")
