import json

import pytest

from chandlery.nix.closure import Closure
from chandlery.plan.package_graph import PackageGraph
from chandlery.plan.pull_simulation import Simulation, Workload
from chandlery.plan.strategies import STRATEGIES, LayerGroup

# app and tool need lib, and other needs nothing.
GRAPH = PackageGraph.of({"app": ("app", 10, ["lib"]), "lib": ("lib", 100, []), "tool": ("tool", 1, ["lib"])})
APP, LIB, TOOL = range(3)


def workload(pulls: list[list[str]], *updates: list[str]) -> Workload:
    content = json.dumps({"clients": [pulls, pulls[:1]], "updates": updates}).encode()
    return Workload.parse(content, GRAPH)


def test_a_client_downloads_each_layer_once_and_the_registry_keeps_it_once() -> None:
    outcome = Simulation(GRAPH, workload([["app"], ["tool"], ["app"]])).limit()
    assert outcome.cold.downloaded == (111, 110)
    assert outcome.cold.kept == 111
    assert outcome.layers == (2, 2, 2, 2)


def test_one_layer_is_downloaded_anew_with_every_image() -> None:
    simulation = Simulation(GRAPH, workload([["app"], ["tool"], ["app"]]))
    outcome = simulation.play(lambda closure: STRATEGIES["one-per-path"](closure, {}, 1))
    assert outcome.cold.downloaded == (211, 110)
    assert outcome.cold.kept == 211


def test_an_update_changes_what_needs_it_too() -> None:
    outcome = Simulation(GRAPH, workload([["app"], ["tool"]], ["app"], ["lib"])).limit()
    assert outcome.updated.downloaded == (10 + 111, 10 + 110)
    assert outcome.updated.kept == 10 + 111


def test_a_chain_is_reused_only_from_below() -> None:
    simulation = Simulation(GRAPH, workload([["app"], ["tool"]]))

    def stacked(*order: int) -> int:
        def plan(closure: Closure) -> list[LayerGroup]:
            numbers = {GRAPH.names.index(node.path.name[:-2]): node for node in closure.nodes}
            return [LayerGroup((numbers[it].path,), numbers[it].nar_size) for it in order if it in numbers]

        return simulation.play(plan).chained.downloaded[0]

    assert stacked(LIB, APP, TOOL) == 111
    assert stacked(APP, TOOL, LIB) == 211


def test_an_unknown_package_is_named() -> None:
    with pytest.raises(ValueError, match="has no gone"):
        workload([["gone"]])
