import random
from collections import defaultdict

from chandlery.plan.package_clusters import measure
from chandlery.plan.package_graph import PackageGraph
from chandlery.plan.popularity import Popularity


def a_set(
    apps: int = 400, *, more: bool = False, grown: float = 1.0, seed: int = 1
) -> dict[str, tuple[str, int, list[str]]]:
    """Return apps over three kits of libraries: who needs one of a kit mostly needs all of it."""
    chance = random.Random(seed)  # noqa: S311
    packages: dict[str, tuple[str, int, list[str]]] = {"libc": ("libc", 10**7, [])}
    for kit in ("gui", "net", "db"):
        for number in range(6):
            packages[f"{kit}{number}"] = (f"{kit}{number}", int(400_000 * grown), ["libc"])
        packages[kit] = (kit, 50_000, [f"{kit}{number}" for number in range(6)])
    packages["huge"] = ("huge", 10**9, ["libc"])
    for number in range(apps + more):
        needs = [kit for kit in ("gui", "net", "db") if chance.random() < 0.04]
        packages[f"app{number}"] = (
            f"app{number}",
            10**6,
            ["libc", *needs, *(["huge"] if number % 3 == 0 else [])],
        )
    return packages


def groups(popularity: Popularity) -> set[frozenset[str]]:
    found = defaultdict(set)
    for name, group in popularity.groups.items():
        found[group].add(name)
    return {frozenset(names) for names in found.values()}


def test_counts_are_of_closures() -> None:
    popularity = measure(PackageGraph.of(a_set()))
    assert popularity["libc"] == 400 + 3 * 7 + 1 + 1
    assert popularity["app7"] == 1
    assert popularity["gui0"] == popularity["gui"] + 1


def test_what_every_image_has_is_needed_by_all() -> None:
    popularity = measure(PackageGraph.of(a_set()), always=["app0"])
    assert popularity["app0"] == popularity["huge"] == 400 + 3 * 7 + 1 + 1


def test_packages_that_are_needed_together_are_a_group() -> None:
    found = groups(measure(PackageGraph.of(a_set())))
    for kit in ("gui", "net", "db"):
        [group] = [each for each in found if f"{kit}0" in each]
        assert {f"{kit}{number}" for number in range(6)} <= group
        # What another kit has would be downloaded in vain.
        assert not any(name.startswith(other) for name in group for other in {"gui", "net", "db"} - {kit})


def test_what_is_large_is_in_a_group_only_if_it_never_parts() -> None:
    assert "huge" not in measure(PackageGraph.of(a_set())).groups


def test_what_few_need_is_in_no_group() -> None:
    assert not any(name.startswith("app") for name in measure(PackageGraph.of(a_set(4000))).groups)


def test_the_same_set_has_the_same_table() -> None:
    packages = a_set()
    turned = dict(reversed(packages.items()))
    assert measure(PackageGraph.of(packages)).encode() == measure(PackageGraph.of(turned)).encode()


def test_one_package_more_or_a_new_version_leaves_the_groups_alone() -> None:
    before = groups(measure(PackageGraph.of(a_set())))
    assert groups(measure(PackageGraph.of(a_set(more=True)))) == before
    assert groups(measure(PackageGraph.of(a_set(grown=1.05)))) == before


def test_a_group_has_a_name_of_its_own() -> None:
    popularity = measure(PackageGraph.of(a_set()))
    assert all(popularity.groups[group] == group for group in popularity.groups.values())


def test_several_packages_of_one_name_are_in_one_group_at_most() -> None:
    packages = a_set()
    packages["old gui0"] = ("gui0", 40_000, ["libc"])
    assert len([each for each in groups(measure(PackageGraph.of(packages))) if "gui0" in each]) == 1


def test_a_set_of_nothing_and_one_of_a_few_have_tables() -> None:
    assert len(measure(PackageGraph.of({}))) == 0
    assert measure(PackageGraph.of({"a": ("a", 0, [])}))["a"] == 1
