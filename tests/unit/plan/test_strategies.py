import random
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.nix.closure import Closure, ClosureNode, StorePath
from chandlery.plan.popularity import package_name
from chandlery.plan.strategies import (
    DEFAULT_STRATEGY,
    STRATEGIES,
    LayerGroup,
    Popularity,
    Strategy,
    closure_of,
)

BASE_32 = "0123456789abcdfghijklmnpqrsvwxyz"
strategies = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=list(STRATEGIES))
budgets = st.integers(1, 12) | st.integers(60, 126)
hashes = st.text(BASE_32, min_size=32, max_size=32)
store_paths = st.builds(
    "/nix/store/{}-{}-{}".format,
    hashes,
    st.sampled_from(["git", "jq", "lib"]) | st.text("abc", min_size=1),
    st.integers(0, 9),
).map(StorePath.parse)


def a_path(chance: random.Random, name: str) -> StorePath:
    return StorePath(f"/nix/store/{''.join(chance.choices(BASE_32, k=32))}-{name}")


@st.composite
def closures(draw: st.DrawFn, most: int = 150) -> Closure:
    """Closures without cycles, with many equal sizes and some equal names."""
    count = draw(st.integers(0, most))
    if count > 12:
        # Drawing hundreds of store paths one by one is slow; a seed is enough to have many.
        chance = random.Random(draw(st.integers()))  # noqa: S311
        paths = [a_path(chance, f"p{chance.randrange(99)}-{chance.randrange(3)}") for _ in range(count)]
        sizes = [chance.randrange(4) for _ in paths]
        counts = [chance.randrange(min(index, 3) + 1) for index in range(len(paths))]
        references = [chance.sample(paths[:index], number) for index, number in enumerate(counts)]
    else:
        paths = draw(st.lists(store_paths, max_size=count, unique=True))
        sizes = [draw(st.integers(0, 3)) for _ in paths]
        references = [
            draw(st.lists(st.sampled_from(paths[:index]), max_size=3)) if index else []
            for index in range(len(paths))
        ]
    nodes = map(ClosureNode, paths, sizes, map(tuple, references))
    return Closure.of(paths[-1:], nodes)


@st.composite
def tables(draw: st.DrawFn) -> Mapping[str, int]:
    """None, counts alone, or counts and groups; of the names that closures have."""
    if draw(st.booleans()):
        return {}
    chance = random.Random(draw(st.integers()))  # noqa: S311
    known = ["git", "jq", "lib", "a", "b", "ab", *(f"p{number}" for number in range(99))]
    counts = {name: chance.randrange(2**16) for name in known if chance.random() < 2 / 3}
    groups = {name: f"g{chance.randrange(30)}" for name in counts if chance.random() < 1 / 2}
    return Popularity(counts, groups) if draw(st.booleans()) else counts


def names(plan: tuple[LayerGroup, ...]) -> list[list[str]]:
    return [[path.name for path in group.store_paths] for group in plan]


@strategies
@given(closure=closures(), popularity=tables(), budget=budgets)
def test_every_store_path_is_in_one_layer_and_the_budget_is_kept(
    strategy: Strategy, closure: Closure, popularity: Mapping[str, int], budget: int
) -> None:
    plan = strategy(closure, popularity, budget)
    planned = [path for group in plan for path in group.store_paths]

    assert sorted(planned) == [node.path for node in closure.nodes]
    assert len(plan) <= budget
    assert all(group.store_paths for group in plan)
    assert all(group.store_paths == tuple(sorted(group.store_paths)) for group in plan)
    sizes = {node.path: node.nar_size for node in closure.nodes}
    assert all(group.nar_size == sum(sizes[path] for path in group.store_paths) for group in plan)


@strategies
@given(closure=closures(), popularity=tables(), budget=budgets, chance=st.randoms())
def test_a_plan_does_not_depend_on_the_order_of_its_input(
    strategy: Strategy, closure: Closure, popularity: Mapping[str, int], budget: int, chance: random.Random
) -> None:
    nodes = list(closure.nodes)
    chance.shuffle(nodes)

    shuffled = Closure(closure.roots, tuple(nodes))

    assert strategy(shuffled, popularity, budget) == strategy(closure, popularity, budget)


@strategies
@given(closure=closures(), popularity=tables(), budget=budgets)
def test_a_plan_is_the_same_every_time(
    strategy: Strategy, closure: Closure, popularity: Mapping[str, int], budget: int
) -> None:
    assert strategy(closure, popularity, budget) == strategy(closure, popularity, budget)


@strategies
@given(closure=closures(), popularity=tables(), budget=budgets, seed=st.integers())
def test_a_plan_does_not_depend_on_hashes(
    strategy: Strategy, closure: Closure, popularity: Mapping[str, int], budget: int, seed: int
) -> None:
    once = {node.path.name: node for node in closure.nodes}
    chance = random.Random(seed)  # noqa: S311
    rebuilt = {name: a_path(chance, name) for name in once}

    def closure_with(paths: Mapping[str, StorePath]) -> Closure:
        return Closure.of(
            (),
            [
                ClosureNode(
                    paths[name],
                    node.nar_size,
                    # Only those whose node was kept, else a name could be its own dependency.
                    tuple(paths[it.name] for it in node.references if once[it.name].path == it),
                )
                for name, node in once.items()
            ],
        )

    before = strategy(closure_with({name: node.path for name, node in once.items()}), popularity, budget)
    after = strategy(closure_with(rebuilt), popularity, budget)

    assert names(before) == names(after)


@pytest.mark.parametrize("strategy", [STRATEGIES[name] for name in STRATEGIES if name != "nixery"])
@given(closure=closures(60), spare=st.integers(0, 5))
def test_without_popularity_a_closure_within_the_budget_has_a_layer_for_each_store_path(
    strategy: Strategy, closure: Closure, spare: int
) -> None:
    plan = strategy(closure, {}, max(1, len(closure.nodes) + spare))

    assert all(len(group.store_paths) == 1 for group in plan)


@strategies
@pytest.mark.parametrize("budget", [0, -1])
def test_a_plan_without_layers_is_refused(strategy: Strategy, budget: int) -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        strategy(Closure.of((), ()), {}, budget)


def a_closure(sizes: Mapping[str, int], needs: Mapping[str, list[str]] | None = None) -> Closure:
    def path(name: str) -> StorePath:
        return StorePath.parse(f"/nix/store/{'0' * 32}-{name}")

    return Closure.of(
        (),
        (
            ClosureNode(path(name), size, tuple(map(path, (needs or {}).get(name, []))))
            for name, size in sizes.items()
        ),
    )


def test_the_largest_stand_alone_and_the_rest_share_buckets() -> None:
    closure = a_closure({f"p{number:03}": number for number in range(200)})

    plan = STRATEGIES["largest-alone"](closure, {}, 94)

    alone = {path.name for group in plan if len(group.store_paths) == 1 for path in group.store_paths}
    assert {f"p{number:03}" for number in range(130, 200)} <= alone
    shared = [group for group in plan if len(group.store_paths) > 1]
    assert 18 <= len(shared) <= 24


def test_a_new_version_stays_in_the_bucket_of_the_old_one() -> None:
    common = {f"p{number:03}": number for number in range(100)}
    old = STRATEGIES["largest-alone"](a_closure({**common, "tiny-1.0": 0}), {}, 30)
    new = STRATEGIES["largest-alone"](a_closure({**common, "tiny-2.0beta": 0}), {}, 30)

    def changed(plan: tuple[LayerGroup, ...], other: tuple[LayerGroup, ...]) -> list[LayerGroup]:
        return [group for group in plan if group not in other]

    [before], [after] = changed(old, new), changed(new, old)
    assert len(before.store_paths) > 1
    assert [package_name(path.name) for path in before.store_paths] == [
        package_name(path.name) for path in after.store_paths
    ]


def test_what_most_need_comes_first() -> None:
    needs = {"app": ["lib", "tool"], "lib": ["libc"], "tool": ["libc"], "libc": ["libgcc"]}
    closure = a_closure(dict.fromkeys(["app", "lib", "libc", "libgcc", "tool", "base"], 1), needs)

    plan = STRATEGIES["largest-alone"](closure, {}, 94)

    assert names(plan) == [["libgcc"], ["libc"], ["lib"], ["tool"], ["app"], ["base"]]


def test_popularity_counts_more_than_what_this_closure_needs() -> None:
    closure = a_closure({"app-1": 1, "lib-2": 1}, {"app-1": ["lib-2"]})

    assert names(STRATEGIES["largest-alone"](closure, {"app": 7}, 94)) == [["app-1"], ["lib-2"]]


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("git-2.39.5", "git"),
        ("python3.11-numpy-1.24.2", "python3.11-numpy"),
        ("cacert", "cacert"),
        ("2048-in-terminal-0.9", "2048-in-terminal"),
        ("glibc-2.38-27-bin", "glibc"),
        ("trailing-", "trailing-"),
    ],
)
def test_a_package_name_ends_where_the_version_starts(name: str, package: str) -> None:
    assert package_name(name) == package


def steps_to_plan(strategy: Strategy, size: int) -> int:
    """Count what the interpreter does for a plan of a closure of this size."""
    chance = random.Random(1)  # noqa: S311
    paths = [StorePath(f"/nix/store/{number:032}-p{number}-1") for number in range(size)]
    nodes = [
        ClosureNode(path, chance.randrange(10**7), tuple(chance.sample(paths[:index], min(index, 10))))
        for index, path in enumerate(paths)
    ]
    closure = Closure.of(paths[-1:], nodes)

    popularity = Popularity(
        {f"p{number}": size - number for number in range(size)},
        {f"p{number}": f"p{number // 3}" for number in range(size)},
    )
    steps = 0

    def step(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += 1
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        strategy(closure, popularity, 94)
    finally:
        sys.settrace(before)
    return steps


@strategies
def test_what_a_plan_takes_grows_as_the_closure_does(strategy: Strategy) -> None:
    # Four times as much for four times the closure, and sixteen times if anything was quadratic.
    assert steps_to_plan(strategy, 1200) < 7 * steps_to_plan(strategy, 300)


def test_the_default_is_one_of_the_strategies() -> None:
    assert DEFAULT_STRATEGY in STRATEGIES


def test_plain_nodes_are_a_closure() -> None:
    app, lib = f"/nix/store/{'0' * 32}-app-1", f"/nix/store/{'1' * 32}-lib-2"

    closure = closure_of([(app, 5, [app, lib]), (lib, 7, [])])

    assert [path.text for path in closure.roots] == [app]
    assert [(node.path.text, node.nar_size, len(node.references)) for node in closure.nodes] == [
        (app, 5, 1),
        (lib, 7, 0),
    ]


def test_the_example_in_the_documentation_works(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[3] / "docs" / "layering.md").read_text()
    [(program, output)] = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL)

    exec(program, {})  # noqa: S102 (it is ours)

    assert capsys.readouterr().out == output
