from graphlib import CycleError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.plan.package_graph import PackageGraph


@st.composite
def graphs(draw: st.DrawFn) -> PackageGraph:
    count = draw(st.integers(0, 12))
    references = [
        draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else [] for i in range(count)
    ]
    return PackageGraph.numbered([f"p{i}" for i in range(count)], [1] * count, references)


@given(graphs())
def test_needed_by_counts_the_closures_that_hold_a_package(graph: PackageGraph) -> None:
    closures = [graph.closure([package]) for package in range(len(graph))]
    assert graph.needed_by() == [
        sum(package in closure for closure in closures) for package in range(len(graph))
    ]


@given(graphs())
def test_dependants_are_those_whose_closure_has_a_package(graph: PackageGraph) -> None:
    for package in range(len(graph)):
        needing = {other for other in range(len(graph)) if package in graph.closure([other])}
        assert graph.dependants([package]) == needing


@given(graphs())
def test_references_come_first(graph: PackageGraph) -> None:
    place = {package: number for number, package in enumerate(graph.order)}
    assert all(place[it] < place[package] for package, all_ in enumerate(graph.references) for it in all_)


def test_a_graph_does_not_depend_on_the_order_of_its_packages() -> None:
    packages = {"b": ("b", 2, ["a", "b", "gone"]), "a": ("a", 1, [])}
    graph = PackageGraph.of(packages)

    assert graph == PackageGraph.of(dict(reversed(packages.items())))
    assert (graph.names, graph.sizes, graph.references) == (("a", "b"), (1, 2), ((), (0,)))


def test_packages_that_need_each_other_are_refused() -> None:
    with pytest.raises(CycleError):
        PackageGraph.of({"a": ("a", 1, ["b"]), "b": ("b", 1, ["a"])})


def test_a_graph_is_read_from_json() -> None:
    graph = PackageGraph.parse(b'{"names": ["a", "b"], "sizes": [1, 2], "refs": [[], [0]], "what": "else"}')
    assert graph.closure([1]) == {0, 1}


def test_other_json_is_refused() -> None:
    with pytest.raises(ValueError, match="names"):
        PackageGraph.parse(b"{}")
