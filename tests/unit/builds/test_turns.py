from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from chandlery.builds.turns import Turns

CLIENTS = "abcd"
# Who asks for what, in this order.
ASKED = st.lists(st.tuples(st.sampled_from(CLIENTS), st.integers(0, 30)), max_size=40)


def turns_of(asked: list[tuple[str, int]]) -> Turns[int]:
    turns = Turns[int]()
    for client, item in asked:
        turns.join(client, item)
    return turns


def test_clients_take_turns_and_what_several_wait_for_comes_with_the_first_of_them() -> None:
    turns = turns_of([("a", 1), ("a", 2), ("a", 3), ("b", 3), ("b", 4)])
    assert list(turns) == [1, 3, 2, 4]
    assert turns.heads == {"a": 1, "b": 3}
    turns.remove(1)
    turns.took("a")
    assert list(turns) == [3, 2, 4]
    assert turns.heads == {"b": 3, "a": 2}


@given(ASKED)
def test_everything_that_waits_has_one_turn(asked: list[tuple[str, int]]) -> None:
    turns = turns_of(asked)
    assert sorted(turns) == sorted({item for _, item in asked})
    assert len(turns) == len(list(turns))
    for item in list(turns):
        turns.remove(item)
    assert (list(turns), len(turns), turns.heads) == ([], 0, {})


@given(ASKED, st.sampled_from(CLIENTS))
def test_a_client_is_delayed_by_no_more_than_one_thing_of_each_other(
    asked: list[tuple[str, int]], client: str
) -> None:
    turns = turns_of([*(each for each in asked if each[0] != client), (client, 99)])
    assert list(turns).index(99) < len(CLIENTS)


def test_a_client_that_leaves_takes_its_turn_along_unless_it_is_the_only_one() -> None:
    turns = turns_of([("a", 1), ("a", 2), ("b", 2)])
    assert turns.clients(2) == ("a", "b")
    turns.leave("b", 2)
    turns.leave("a", 2)
    turns.leave("c", 1)
    assert (turns.clients(1), turns.clients(2), turns.clients(3)) == (("a",), ("a",), ())
    assert turns.heads == {"a": 1}


def test_the_newest_of_the_client_with_most_gives_way() -> None:
    turns = turns_of([("a", 1), ("b", 2), ("b", 3), ("b", 4), ("a", 5)])
    assert turns.gives_way_to("c", {}) == 4
    assert turns.gives_way_to("a", {}) is None
    assert turns.gives_way_to("c", {"a": 2}) == 5
    assert turns.gives_way_to("c", {"c": 2}) is None
    assert turns.gives_way_to("c", {}, exempt="b") == 5
    assert turns.gives_way_to("c", {}, exempt="ab") is None


def test_what_a_client_with_little_waits_for_too_does_not_give_way() -> None:
    turns = turns_of([("a", 1), ("a", 2), ("a", 3), ("b", 3)])
    assert turns.gives_way_to("c", {}) == 2


@given(ASKED, st.lists(st.sampled_from(CLIENTS), max_size=100), st.integers(1, 12))
def test_giving_way_comes_to_an_end_with_nearly_as_much_for_each(
    asked: list[tuple[str, int]], asking: list[str], room: int
) -> None:
    turns = turns_of([(client, number) for number, (client, _) in enumerate(asked[:room])])
    displaced = 0
    for number, client in enumerate([*asking, *list(CLIENTS) * room], 100):
        if len(turns) < room:
            turns.join(client, number)
        elif (item := turns.gives_way_to(client, {})) is not None:
            turns.remove(item)
            turns.join(client, number)
            displaced += 1
    loads = Counter(client for item in turns for client in turns.clients(item))
    counts = [loads[client] for client in CLIENTS]
    assert max(counts) - min(counts) <= 1
    assert displaced <= room * room
