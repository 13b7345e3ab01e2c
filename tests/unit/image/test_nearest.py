from hypothesis import given
from hypothesis import strategies as st

from chandlery.image.nearest import nearest

NAMES = st.text("abc", min_size=1, max_size=6)


def test_swapped_letters_are_one_mistake() -> None:
    assert nearest("hotp", ["hop", "htop", "otp", "hotspot"])[0] == "htop"
    assert nearest("gti", ["bti", "git", "gitit", "gtick"])[0] == "git"


def test_what_is_unlike_is_not_meant() -> None:
    assert nearest("xyzzy", ["git", "jq"]) == []
    assert nearest("prto", ["port"], similar_enough=0.6) == []
    assert nearest("prot", ["port"], similar_enough=0.6) == ["port"]


@given(NAMES, st.lists(NAMES, unique=True, max_size=8))
def test_what_is_there_is_nearest_and_no_order_counts(name: str, known: list[str]) -> None:
    found = nearest(name, [*known, name])
    assert found[0] == name
    assert nearest(name, sorted({*known, name})) == nearest(name, sorted({*known, name}, reverse=True))
    assert len(found) <= 3
