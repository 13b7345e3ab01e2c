import os
from pathlib import Path

import pytest

from chandlery.builds.sqlite.index import IndexCounts, SqliteIndex
from chandlery.machine.temporary_folder import TemporaryFolder
from chandlery.maintenance.run_marker import RunMarker
from chandlery.maintenance.status import DataFolderStatus, examine

LARGE = 100_000


def write(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a data folder with something in each part."""
    write(tmp_path / "blobs/sha256/ab/abcd", b"1" * LARGE)
    write(tmp_path / "nix/nix/store/aaa-git/bin/git", b"2" * LARGE)
    write(tmp_path / "nix/nix/store/aaa-git.drv", b"Derive()")
    write(tmp_path / "nix/nix/var/nix/db/db.sqlite", b"3" * LARGE)
    write(tmp_path / "debian/suites/bookworm/current", b"revision")
    write(tmp_path / "sources/path-x/revision/source/default.nix", b"{}")
    write(tmp_path / "popularity/x.json.zst", b"table")
    write(tmp_path / "builds/20240101-120000-0123abcd.log", b"made\n")
    write(tmp_path / "token-key", b"secret")
    with SqliteIndex(tmp_path):
        pass
    return tmp_path


def numbers(status: DataFolderStatus) -> dict[str, int]:
    return {part.name: part.number for part in status.parts}


def test_every_file_is_in_one_part(folder: Path) -> None:
    status = examine(folder)
    assert numbers(status) == {
        "blobs": 1,
        "Nix store": 1,
        "build index": 1,
        "package indexes": 1,
        "source trees": 1,
        "popularity tables": 1,
        "logs": 1,
        "temporary files": 0,
        "other files": 1,
    }
    on_disk = sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
    assert status.bytes == on_disk
    assert status.part("blobs").bytes >= LARGE
    assert status.part("Nix store").bytes >= 2 * LARGE
    assert (status.twice, status.counts, status.server_runs, status.unreadable) == (
        (),
        IndexCounts(),
        False,
        0,
    )


def test_looking_changes_nothing(folder: Path) -> None:
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    examine(folder)
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_running_server_and_its_temporary_files_are_seen(folder: Path) -> None:
    marker = RunMarker(folder)
    marker.begin()
    with TemporaryFolder(folder / "tmp"):
        status = examine(folder)
    marker.end()
    assert status.server_runs
    assert numbers(status)["temporary files"] == 1


def test_a_file_with_several_names_counts_once_and_is_not_kept_twice(folder: Path) -> None:
    before = examine(folder).bytes
    os.link(folder / "nix/nix/store/aaa-git/bin/git", folder / "nix/nix/store/aaa-git/bin/git-again")
    status = examine(folder)
    assert status.bytes == before
    assert status.twice == ()


def test_content_that_is_there_twice_is_told(folder: Path) -> None:
    for name in ("bbb-git", "ccc-git"):
        write(folder / f"nix/nix/store/{name}/bin/git", b"2" * LARGE)
    write(folder / "nix/nix/store/ddd-other/bin/git", b"4" * LARGE)
    archive = write(folder / "nix/nix/store/eee-git_2.39_amd64.deb", b"archive")
    alike, fetched = examine(folder).twice
    assert (alike.number, alike.bytes) == (2, 2 * LARGE)
    assert alike.why.startswith("Nix store: ")
    assert (fetched.number, fetched.bytes) == (1, archive.stat().st_size)


def test_the_nix_stores_of_all_sources_are_one_part(folder: Path) -> None:
    before = examine(folder).part("Nix store")
    other = folder / "nix-stores/git-0123456789abcdef"
    write(other / "nix/store/aaa-git/bin/git", b"2" * LARGE)
    write(other / "nix/var/nix/db/db.sqlite", b"5" * LARGE)
    status = examine(folder)
    assert status.part("Nix store").number == before.number + 1
    assert status.part("Nix store").bytes >= before.bytes + 2 * LARGE
    assert numbers(status)["other files"] == 1
    [alike] = status.twice
    assert (alike.number, alike.bytes) == (1, LARGE)


def test_an_empty_folder_has_nothing_in_it(tmp_path: Path) -> None:
    status = examine(tmp_path)
    assert set(numbers(status).values()) == {0}
    assert (status.bytes, status.counts) == (0, IndexCounts())


def test_of_an_index_that_can_not_be_read_nothing_is_told(folder: Path) -> None:
    (index,) = folder.glob("build-index-*.sqlite")
    index.write_bytes(b"no database" * 1000)
    assert examine(folder).counts is None
