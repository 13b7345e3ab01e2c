import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.nix.closure import Closure, ClosureNode, StorePath

BASE_32 = "0123456789abcdfghijklmnpqrsvwxyz"
store_paths = st.builds(
    "/nix/store/{}-{}".format,
    st.text(BASE_32, min_size=32, max_size=32),
    st.text("abcXYZ019+-._?=", min_size=1, max_size=12),
).map(StorePath.parse)
HASH = "0" * 32


@given(store_paths)
def test_a_store_path_is_a_hash_and_a_name(path: StorePath) -> None:
    assert str(path) == f"/nix/store/{path.base_name}"
    assert path.base_name[32:] == f"-{path.name}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/nix/store",
        f"/nix/store/{HASH}",
        f"/nix/store/{HASH}-",
        f"/nix/store/{HASH[1:]}-git",
        f"/nix/store/{'e' * 32}-git",
        f"/nix/store/{HASH}-git/bin",
        f"{HASH}-git",
        f"/nix/store/{HASH}-two words",
        f"/nix/store/{HASH}-git\n",
        f"/nix/store/{HASH}-{'a' * 212}",
    ],
)
def test_what_is_no_store_path_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a store path"):
        StorePath.parse(text)


def test_names_come_before_hashes_in_the_order() -> None:
    first, second, third = (f"/nix/store/{hash_}-{name}" for hash_, name in [
        ("z" * 32, "a"), ("0" * 32, "b"), ("1" * 32, "b"),
    ])  # fmt: skip
    assert [path.text for path in sorted(map(StorePath, (third, second, first)))] == [first, second, third]


@given(st.lists(store_paths, min_size=1, max_size=8, unique=True), st.randoms())
def test_a_closure_does_not_depend_on_the_order_of_its_input(
    paths: list[StorePath], chance: random.Random
) -> None:
    nodes = [ClosureNode(path, 7, tuple(paths)) for path in paths]
    shuffled = [ClosureNode(node.path, 7, tuple(chance.sample(paths, len(paths)))) for node in nodes]
    chance.shuffle(shuffled)
    assert Closure.of(paths, nodes) == Closure.of(reversed(paths), shuffled)


def test_a_store_path_does_not_refer_to_itself_in_a_closure() -> None:
    path, other = StorePath(f"/nix/store/{HASH}-a"), StorePath(f"/nix/store/{HASH}-b")
    closure = Closure.of([path], [ClosureNode(path, 1, (path, other)), ClosureNode(other, 1, ())])
    assert closure.nodes[0].references == (other,)


def test_what_is_given_twice_counts_once() -> None:
    path = StorePath(f"/nix/store/{HASH}-a")
    closure = Closure.of([path, path], [ClosureNode(path, 100, ()), ClosureNode(path, 100, ())])
    assert (closure.roots, len(closure.nodes), closure.nar_size) == ((path,), 1, 100)
