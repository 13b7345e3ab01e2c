from chandlery.nix.closure import Closure
from chandlery.plan.grouped import grouped
from chandlery.plan.strategies import LayerGroup, Popularity, closure_of


def closure(sizes: dict[str, int], version: int = 1) -> Closure:
    return closure_of((f"/nix/store/{'0' * 32}-{name}-{version}", size, []) for name, size in sizes.items())


def names(plan: tuple[LayerGroup, ...]) -> list[set[str]]:
    return [{path.name.rpartition("-")[0] for path in group.store_paths} for group in plan]


GROUPS = Popularity({"a": 900, "b": 800, "c": 2}, {"a": "a", "b": "a"})


def test_a_group_is_one_layer_however_much_room_there_is() -> None:
    assert names(grouped(closure({"a": 1, "b": 2, "c": 3}), GROUPS, 94)) == [{"a", "b"}, {"c"}]


def test_an_image_has_as_much_of_a_group_as_it_needs() -> None:
    assert names(grouped(closure({"b": 2, "c": 3}), GROUPS, 94)) == [{"b"}, {"c"}]


def test_a_new_version_is_in_the_same_group() -> None:
    sizes = {"a": 1, "b": 2, "c": 3}
    assert names(grouped(closure(sizes), GROUPS, 94)) == names(grouped(closure(sizes, 2), GROUPS, 94))


def test_beyond_the_budget_the_smallest_share_a_layer() -> None:
    sizes = {f"p{number:02}": number + 1 for number in range(30)}
    plan = names(grouped(closure(sizes), dict.fromkeys(sizes, 5), 20))
    assert [group for group in plan if len(group) > 1] == [{f"p{number:02}" for number in range(12)}]
    assert len(plan) == 19


def test_what_is_in_most_images_shares_no_layer_with_what_is_in_few() -> None:
    sizes = {f"{'common' if number % 2 else 'rare'}{number:02}x": 1 for number in range(60)}
    counts = {name: 40_000 if name.startswith("common") else 3 for name in sizes}
    shared = [group for group in names(grouped(closure(sizes), counts, 20)) if len(group) > 1]
    assert len(shared) == 2
    assert all(len({name[:4] for name in group}) == 1 for group in shared)


def test_what_is_needed_more_keeps_its_own_layer_sooner() -> None:
    sizes = {f"p{number:02}x": 100 for number in range(30)}
    counts = {name: 2 + 10_000 * (name == "p17x") for name in sizes}
    assert {"p17x"} in names(grouped(closure(sizes), counts, 10))


def test_one_package_more_changes_little_of_a_plan() -> None:
    sizes = {f"p{number:03}x": 1000 + number for number in range(150)}
    counts = dict.fromkeys(sizes, 9)
    before = set(map(frozenset, names(grouped(closure(sizes), counts, 94))))
    after = set(map(frozenset, names(grouped(closure({**sizes, "new": 5000}), counts, 94))))
    assert len(after - before) <= 3
