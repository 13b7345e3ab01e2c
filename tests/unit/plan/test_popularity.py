import json

import pytest

from chandlery.plan.popularity import Popularity, known_name, output_name

TABLE = Popularity({"glibc": 9, "gcc": 3, "gcc-12": 2, "gcc-12-base": 2}, {"gcc": "a", "gcc-12": "a"}, "here")


def test_what_was_written_is_read() -> None:
    assert Popularity.parse(TABLE.encode()) == TABLE


def test_a_table_is_a_mapping_of_its_counts() -> None:
    assert dict(TABLE) == TABLE.counts
    assert TABLE.get("nothing", 0) == 0


def test_the_same_table_has_the_same_bytes_and_identity() -> None:
    turned = Popularity(
        dict(reversed(list(TABLE.counts.items()))), dict(reversed(list(TABLE.groups.items()))), TABLE.source
    )
    assert turned.encode() == TABLE.encode()
    assert turned.identity == TABLE.identity


@pytest.mark.parametrize(
    "other",
    [
        Popularity({**TABLE.counts, "glibc": 10}, TABLE.groups),
        Popularity({**TABLE.counts, "jq": 1}, TABLE.groups),
        Popularity(TABLE.counts, {}),
        Popularity(TABLE.counts, {"gcc": "a", "gcc-12": "b"}),
    ],
)
def test_whatever_a_plan_can_see_is_in_the_identity(other: Popularity) -> None:
    assert other.identity != TABLE.identity


def test_where_a_table_comes_from_is_not_in_the_identity() -> None:
    assert Popularity(TABLE.counts, TABLE.groups, "elsewhere").identity == TABLE.identity


def test_nixerys_table_is_read() -> None:
    table = Popularity.parse(json.dumps({"glibc-2.38-27": 900, "glibc-2.38-27-bin": 4, "jq-1.6": 2}).encode())

    assert table["glibc-2.38-27"] == 900
    assert (table["glibc"], table["glibc-bin"], table["jq"]) == (900, 4, 2)
    assert not table.groups
    assert known_name("glibc-2.39-1", table) == "glibc"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"glibc": "many"}', b'{"version": 1}', b'{"version": "one", "counts": {}}']
)
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="no table of popularity"):
        Popularity.parse(content)


def test_a_later_version_is_refused() -> None:
    content = TABLE.encode().replace(b'"version":1', b'"version":2')
    with pytest.raises(ValueError, match="version is 2"):
        Popularity.parse(content)


@pytest.mark.parametrize(
    ("store_name", "name"),
    [
        ("glibc-2.38-27", "glibc"),
        ("glibc-2.38-27-bin", "glibc"),
        ("gcc-12.2.0-3", "gcc"),
        ("gcc-12-12.2.0-14", "gcc-12"),
        ("gcc-12-base-12.2.0-14", "gcc-12-base"),
        ("gcc-12", "gcc-12"),
        ("unknown-1.0-dev", "unknown-dev"),
        ("unknown-1.0", "unknown"),
        ("unknown", "unknown"),
    ],
)
def test_the_longest_name_that_a_table_knows_counts(store_name: str, name: str) -> None:
    assert known_name(store_name, TABLE) == name


@pytest.mark.parametrize(
    ("store_name", "name"),
    [
        ("openssl-3.0.12-bin", "openssl-bin"),
        ("openssl-3.0.12", "openssl"),
        ("glibc-2.38-27-dev", "glibc-dev"),
        ("git-2.39.5-1+deb12u2", "git"),
        ("source", "source"),
        ("python3.11-numpy-1.24.2", "python3.11-numpy"),
    ],
)
def test_an_output_is_a_package_of_its_own(store_name: str, name: str) -> None:
    assert output_name(store_name) == name
