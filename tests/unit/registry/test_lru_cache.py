from hypothesis import given
from hypothesis import strategies as st

from chandlery.registry.lru_cache import BoundedMemory

KEYS = st.integers(0, 5)


@given(st.integers(0, 30), st.lists(st.tuples(KEYS, st.integers(0, 12)), max_size=30))
def test_it_never_holds_more_than_the_limit_and_knows_what_it_holds(
    most: int, puts: list[tuple[int, int]]
) -> None:
    memory: BoundedMemory[int, int] = BoundedMemory(most)
    for key, size in puts:
        memory.put(key, size, size)
        assert memory.get(key) == (size if size <= most else None)
        assert memory.size == sum(memory.get(each) or 0 for each in range(6)) <= most


def test_what_was_used_the_longest_ago_makes_room() -> None:
    memory: BoundedMemory[str, int] = BoundedMemory(20)
    memory.put("a", 1, 10)
    memory.put("b", 2, 10)
    memory.get("a")
    memory.put("c", 3, 10)
    assert (memory.get("a"), memory.get("b"), memory.get("c")) == (1, None, 3)


def test_what_is_too_large_takes_the_place_of_nothing_but_its_own() -> None:
    memory: BoundedMemory[str, int] = BoundedMemory(20)
    memory.put("a", 1, 10)
    memory.put("b", 2, 10)
    memory.put("a", 3, 21)
    assert (memory.get("a"), memory.get("b"), memory.size) == (None, 2, 10)


def test_what_is_forgotten_takes_no_room() -> None:
    memory: BoundedMemory[str, int] = BoundedMemory(20)
    memory.put("a", 1, 10)
    memory.forget("a")
    memory.forget("b")
    assert (memory.get("a"), memory.size) == (None, 0)
