import shutil
import sqlite3
from pathlib import Path

import pytest
import pytest_asyncio

from chandlery.nix.configuration import host_paths
from chandlery.nix.database import DatabaseUnreadableError, NixDatabase
from chandlery.nix.nix import Nix, NixLimits, NixOptions, Resolution
from tests.support.nix_package_set import packages, requires_nix, resolve

pytestmark = [requires_nix, pytest.mark.asyncio(loop_scope="module")]

# `top` needs `middle` at run time, and that `low`; `fetched` is needed for building alone.
PACKAGES = """
  low = build "low" "echo low > $out";
  fetched = derivation ((build "fetched.deb" "echo hello > $out").drvAttrs // {
    outputHashAlgo = "sha256"; outputHashMode = "flat";
    outputHash = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
  });
  middle = build "middle" "cat ${fetched} > /dev/null; echo ${low} > $out";
  top = build "top" "echo ${middle} > $out; echo ${middle} >> $out";
  lonely = build "lonely" "echo alone > $out";
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nix-database")


@pytest.fixture(scope="module")
def nix(folder: Path) -> Nix:
    options = NixOptions(("https:",), (), (), tuple(host_paths()))
    return Nix(folder / "nix", NixLimits(), options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def resolved(nix: Nix, folder: Path) -> dict[str, Resolution]:
    await nix.check()
    pin = packages(folder / "set", PACKAGES)
    return {name: await resolve(nix, pin, name) for name in ("top", "middle", "low", "lonely")}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def built(nix: Nix, folder: Path, resolved: dict[str, Resolution]) -> dict[str, Resolution]:
    await nix.realise([resolved["top"].derivation], folder / "roots", folder / "log", own=False)
    return resolved


@pytest.fixture
def database(folder: Path) -> NixDatabase:
    return NixDatabase(folder / "nix")


async def test_the_closure_is_the_one_that_nix_tells(
    nix: Nix, database: NixDatabase, built: dict[str, Resolution], monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = [built["top"].store_path]
    closure = database.closure(roots)
    monkeypatch.setattr(nix, "_database", None)
    assert closure == await nix.closure(roots)
    assert [node.path.name for node in closure.nodes] == ["low", "middle", "top"]


async def test_of_what_is_not_there_nothing_is_told(
    database: NixDatabase, built: dict[str, Resolution]
) -> None:
    there, missing = built["low"].store_path, built["lonely"].store_path
    assert database.valid([there.text, missing.text, "/nix/store/nonsense"]) == {there.text}
    closure = database.closure([there, missing])
    assert closure.roots == (there,)
    assert [node.path for node in closure.nodes] == [there]
    assert database.closure([missing]).nodes == ()


async def test_what_derivations_will_make_is_told_without_what_they_fetch(
    database: NixDatabase, built: dict[str, Resolution]
) -> None:
    wanted = [built["top"], built["lonely"]]
    closure, there = database.made_by([each.derivation for each in wanted])
    made = {node.path.name: node for node in closure.nodes}
    assert sorted(made) == ["middle", "top"]
    assert [path.name for path in made["top"].references] == ["middle"]
    assert made["top"].nar_size > 0
    assert sorted(path.name for path in there) == ["middle", "top"]


async def test_what_derivations_have_added_is_told_with_what_they_fetch_and_what_is_not_finished(
    nix: Nix, folder: Path, tmp_path: Path, built: dict[str, Resolution], database: NixDatabase
) -> None:
    before = database.newest()
    pin = packages(
        tmp_path / "set",
        f"""
        {PACKAGES}
        added = build "added" "head -c 5000 ${{middle}} /dev/zero > $out";
        later = build "later" "echo ${{added}} ${{lonely}} > $out";
        """,
    )
    added, later = [await resolve(nix, pin, name) for name in ("added", "later")]
    # The derivations themselves aren't what they make.
    assert database.added([later.derivation], before).registered == 0
    await nix.realise([added.derivation], tmp_path / "roots", tmp_path / "log", own=False)
    [node] = [each for each in database.closure([added.store_path]).nodes if each.path.name == "added"]
    since = database.added([later.derivation], before)
    assert since.registered == node.nar_size > 5000
    assert sorted(output.name for _, output in since.unfinished) == ["later", "lonely"]
    assert all(derivation.name == f"{output.name}.drv" for derivation, output in since.unfinished)
    # All of it has been built, and what was fetched for that is among it.
    made = sum(each.nar_size for each in database.closure([built["top"].store_path]).nodes)
    assert database.added([built["top"].derivation], 0).registered > made
    assert database.added([later.derivation], database.newest()).registered == 0


async def test_a_database_of_another_schema_is_left_to_nix(
    folder: Path, tmp_path: Path, built: dict[str, Resolution]
) -> None:
    shutil.copytree(folder / "nix/nix/var/nix/db", tmp_path / "nix/var/nix/db")
    other = NixDatabase(tmp_path)
    assert other.valid([built["low"].store_path.text])
    (tmp_path / "nix/var/nix/db/schema").write_text("11")
    with pytest.raises(DatabaseUnreadableError, match="schema is 11"):
        other.valid([])


@pytest.mark.parametrize("content", [None, b"", b"no database" * 100])
async def test_what_can_not_be_read_is_left_to_nix(tmp_path: Path, content: bytes | None) -> None:
    folder = tmp_path / "nix/var/nix/db"
    folder.mkdir(parents=True)
    (folder / "schema").write_text("10")
    if content is not None:
        (folder / "db.sqlite").write_bytes(content)
    with pytest.raises(DatabaseUnreadableError):
        NixDatabase(tmp_path).closure([])
    with pytest.raises(DatabaseUnreadableError):
        NixDatabase(tmp_path / "nowhere").made_by([])


async def test_nix_is_asked_where_its_database_can_not_be_read(
    nix: Nix, folder: Path, built: dict[str, Resolution], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nix, "_database", NixDatabase(tmp_path))
    path = built["top"].store_path
    assert len((await nix.closure([path])).nodes) == 3
    assert not await nix.protect_known([path], folder / "no-roots")
    assert await nix.made_by([built["top"].derivation]) is None


async def test_what_is_known_to_be_there_is_protected_as_nix_does_it(
    nix: Nix, built: dict[str, Resolution], tmp_path: Path
) -> None:
    await nix.realise([built["lonely"].derivation], tmp_path / "first", tmp_path / "log", own=False)
    path = built["lonely"].store_path
    assert await nix.protect_known([path], tmp_path / "roots")
    shutil.rmtree(tmp_path / "first")
    await nix.collect_garbage(1 << 40)
    assert (nix.store_root / path.base_name).exists()

    shutil.rmtree(tmp_path / "roots")
    await nix.collect_garbage(1 << 40)
    assert not (nix.store_root / path.base_name).exists()
    # Nix has removed its links to those links, too.
    assert not list((nix.store_root.parent / "var/nix/gcroots/auto").glob(f"*{tmp_path.name}*"))
    assert not await nix.protect_known([path], tmp_path / "again")


async def test_a_database_that_is_being_written_is_read_as_it_was(
    folder: Path, database: NixDatabase, built: dict[str, Resolution]
) -> None:
    writer = sqlite3.connect(folder / "nix/nix/var/nix/db/db.sqlite", isolation_level=None)
    try:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM Refs")
        assert len(database.closure([built["top"].store_path]).nodes) == 3
    finally:
        writer.execute("ROLLBACK")
        writer.close()
