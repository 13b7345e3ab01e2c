import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.layers.alternatives import Alternative, AlternativeLink, choose, parse
from tests.support.physical_store import store_path

MAWK = (
    b"/usr/bin/awk\tawk\t/usr/bin/mawk\t5"
    b"\t/usr/share/man/man1/awk.1.gz\tawk.1.gz\t/usr/share/man/man1/mawk.1.gz"
    b"\t/usr/bin/nawk\tnawk\t/usr/bin/mawk\n"
)


def awk(path: bytes, priority: int, name: bytes = b"awk") -> Alternative:
    return Alternative(AlternativeLink(b"/usr/bin/awk", name, path), priority, ())


def test_a_line_is_a_master_and_its_slaves() -> None:
    assert list(parse(MAWK)) == [
        Alternative(
            AlternativeLink(b"/usr/bin/awk", b"awk", b"/usr/bin/mawk"),
            5,
            (
                AlternativeLink(
                    b"/usr/share/man/man1/awk.1.gz", b"awk.1.gz", b"/usr/share/man/man1/mawk.1.gz"
                ),
                AlternativeLink(b"/usr/bin/nawk", b"nawk", b"/usr/bin/mawk"),
            ),
        )
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"/usr/bin/awk\tawk\t/usr/bin/mawk",
        b"/usr/bin/awk\tawk\t/usr/bin/mawk\thigh",
        b"usr/bin/awk\tawk\t/usr/bin/mawk\t5",
        b"/usr/bin/awk\tawk\tmawk\t5",
        b"/usr/bin/awk\t../awk\t/usr/bin/mawk\t5",
        b"/usr/bin/awk\t..\t/usr/bin/mawk\t5",
        b"/usr/../../awk\tawk\t/usr/bin/mawk\t5",
        b"/usr/bin/awk/\tawk\t/usr/bin/mawk\t5",
        b"/usr//bin/awk\tawk\t/usr/bin/mawk\t5",
        b"\t\t\t5",
    ],
)
def test_what_update_alternatives_would_refuse_is_left_out(line: bytes) -> None:
    assert list(parse(line + b"\n" + MAWK)) == list(parse(MAWK))


def test_a_slave_that_makes_no_sense_does_not_take_its_master_along() -> None:
    [alternative] = parse(b"/usr/bin/vi\tvi\t/usr/bin/vim\t-30\t/usr/bin/view\tview\n")

    assert (alternative.priority, alternative.slaves) == (-30, ())


@given(st.binary())
def test_any_bytes_can_be_read(content: bytes) -> None:
    assert all(alternative.master.link.startswith(b"/") for alternative in parse(content))


def test_the_highest_priority_that_exists_wins() -> None:
    gawk, mawk, gone = awk(b"/usr/bin/gawk", 10), awk(b"/usr/bin/mawk", 5), awk(b"/usr/bin/gone", 99)
    known = [(store_path("a"), each) for each in (mawk, gone, gawk)]

    assert choose(known, lambda path: path != b"/usr/bin/gone") == [gawk.master]


def test_equal_priorities_are_decided_by_the_path_then_by_the_store_path() -> None:
    one = (store_path("b"), awk(b"/usr/bin/original-awk", 5))
    two = (store_path("a"), Alternative(AlternativeLink(b"/second", b"awk", b"/usr/bin/mawk"), 5, ()))
    three = (store_path("c"), Alternative(AlternativeLink(b"/third", b"awk", b"/usr/bin/mawk"), 5, ()))

    for known in ([one, two, three], [three, two, one]):
        assert [link.link for link in choose(known, lambda _: True)] == [b"/second"]


def test_only_the_winners_slaves_come_along_and_only_those_that_exist() -> None:
    [mawk] = parse(MAWK)
    loser = Alternative(
        AlternativeLink(b"/usr/bin/awk", b"awk", b"/usr/bin/old"),
        1,
        (AlternativeLink(b"/usr/bin/oawk", b"oawk", b"/usr/bin/old"),),
    )

    chosen = choose([(store_path("a"), loser), (store_path("b"), mawk)], lambda path: b"man" not in path)

    assert [link.name for link in chosen] == [b"awk", b"nawk"]


def test_names_are_independent_and_ordered() -> None:
    known = [(store_path("a"), awk(b"/x", 1, name)) for name in (b"vi", b"awk", b"nc")]

    assert [link.name for link in choose(known, lambda _: True)] == [b"awk", b"nc", b"vi"]
