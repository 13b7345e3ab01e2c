from collections.abc import Mapping

from chandlery.plan.peers import nixery, popularity_contest
from chandlery.plan.strategies import LayerGroup, closure_of


def path(name: str) -> str:
    return f"/nix/store/{'0' * 32}-{name}"


def plan_of(plan: tuple[LayerGroup, ...]) -> list[list[str]]:
    return [[it.name for it in group.store_paths] for group in plan]


def nodes(
    needs: Mapping[str, str], sizes: Mapping[str, int] | None = None
) -> list[tuple[str, int, list[str]]]:
    return [
        (path(name), (sizes or {}).get(name, 1), list(map(path, of.split()))) for name, of in needs.items()
    ]


# The example of Nixery's layers.go, whose G is large and E popular.
NIXERY = {"A": "E", "B": "E", "C": "E D", "D": "F", "E": "", "F": "", "G": "", "img": "A B C D G"}


def test_nixery_groups_what_is_dominated_and_takes_out_what_is_popular() -> None:
    closure = closure_of(nodes({name: needs for name, needs in NIXERY.items() if name != "img"}))

    assert sorted(plan_of(nixery(closure, {"E": 100}, 94))) == [
        ["A"],
        ["B"],
        ["C", "D", "F"],
        ["E"],
        ["G"],
    ]


def test_nixery_takes_out_what_is_large() -> None:
    closure = closure_of(nodes({"app": "lib", "lib": ""}, {"lib": 100_000_001}))
    assert sorted(plan_of(nixery(closure, {}, 94))) == [["app"], ["lib"]]
    assert plan_of(nixery(closure_of(nodes({"app": "lib", "lib": ""})), {}, 94)) == [["app", "lib"]]


def test_nixery_merges_the_lowest_popularity_times_size() -> None:
    closure = closure_of(nodes(dict.fromkeys("abcd", ""), {"a": 10, "b": 2, "c": 3, "d": 9}))
    assert sorted(plan_of(nixery(closure, {"b": 90}, 3))) == [["a"], ["b"], ["c", "d"]]


def test_the_popularity_contest_scores_as_dockertools_does() -> None:
    # The example of nixpkgs' closure-graph.py: A 1, B 2, C 3, D 4, E 5, F 9, G 2.
    closure = closure_of(
        nodes({"A": "B G", "B": "C E", "C": "D E", "D": "F", "E": "F", "F": "", "G": ""}),
    )
    ranked = {
        budget: [group for group in plan_of(popularity_contest(closure, {}, budget)) if len(group) > 1]
        for budget in range(1, 7)
    }
    assert ranked == {
        1: [["A", "B", "C", "D", "E", "F", "G"]],
        2: [["A", "B", "C", "D", "E", "G"]],
        3: [["A", "B", "C", "D", "G"]],
        4: [["A", "B", "C", "G"]],
        5: [["A", "B", "G"]],
        6: [["A", "G"]],
    }
