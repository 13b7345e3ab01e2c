import os
from pathlib import Path

import pytest

from chandlery.builds import popularity_tables
from chandlery.builds.popularity_tables import PopularityTables
from chandlery.machine.download import Address
from chandlery.plan.popularity import Popularity

TABLE = Popularity({"glibc": 9, "zlib": 5}, {"glibc": "glibc", "zlib": "glibc"}, "test")
OTHER = Popularity({"glibc": 8})


def test_a_table_is_found_by_its_identity_after_a_restart(tmp_path: Path) -> None:
    identity = PopularityTables(tmp_path).keep(TABLE)
    found = PopularityTables(tmp_path).table(identity)

    assert identity == TABLE.identity
    assert found.identity == identity
    assert found["zlib"] == 5


def test_no_table_has_the_empty_identity(tmp_path: Path) -> None:
    assert not PopularityTables(tmp_path).table("")


@pytest.mark.parametrize("identity", [OTHER.identity, "../tables", "0"])
def test_what_was_never_kept_is_a_key_error(tmp_path: Path, identity: str) -> None:
    PopularityTables(tmp_path).keep(TABLE)
    with pytest.raises(KeyError):
        PopularityTables(tmp_path).table(identity)


def test_a_file_is_kept_after_it_is_gone(tmp_path: Path) -> None:
    tables, file = PopularityTables(tmp_path), tmp_path / "popularity.json"
    file.write_bytes(TABLE.encode())
    assert tables.keep_file(file) == TABLE.identity
    file.unlink()

    assert tables.keep_file(file) == TABLE.identity
    assert PopularityTables(tmp_path).table(TABLE.identity)["glibc"] == 9


@pytest.mark.parametrize("damage", [b"", b"\x28\xb5\x2f\xfd", OTHER])
def test_a_damaged_table_is_as_good_as_none(tmp_path: Path, damage: bytes | Popularity) -> None:
    tables = PopularityTables(tmp_path)
    tables.keep(TABLE)
    (kept,) = (tmp_path / "popularity").iterdir()
    if isinstance(damage, Popularity):
        tables.keep(damage)
        (other,) = {*(tmp_path / "popularity").iterdir()} - {kept}
        damage = other.read_bytes()
    kept.write_bytes(damage)

    with pytest.raises(KeyError):
        PopularityTables(tmp_path).table(TABLE.identity)


def test_those_that_were_used_the_longest_ago_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(popularity_tables, "_MOST_KEPT", 3)
    monkeypatch.setattr(popularity_tables, "_MOST_READ", 1)
    tables = PopularityTables(tmp_path)
    many = [Popularity({"glibc": number}) for number in range(1, 5)]
    for number, each in enumerate(many[:3]):
        tables.keep(each)
        path = tmp_path / "popularity" / f"{each.identity}.json.zst"
        os.utime(path, (number, number))
    tables.table(many[0].identity)
    tables.keep(many[3])

    assert {each["glibc"] for each in many if _is_kept(tmp_path, each)} == {1, 3, 4}


def _is_kept(folder: Path, table: Popularity) -> bool:
    try:
        return PopularityTables(folder).table(table.identity) is not None
    except KeyError:
        return False


async def test_a_file_that_is_no_table_is_told_though_there_was_one(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_bytes(TABLE.encode())
    await PopularityTables(tmp_path).fetch(Address.parse(str(file)))
    file.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="no table of popularity"):
        await PopularityTables(tmp_path).fetch(Address.parse(str(file)))


async def test_an_endless_table_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(popularity_tables, "_LARGEST", 1 << 20)
    with pytest.raises(ValueError, match="more than 1 MiB"):
        await PopularityTables(tmp_path).fetch(Address.parse("/dev/zero"))
