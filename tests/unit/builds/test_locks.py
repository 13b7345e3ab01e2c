import os
import time
from pathlib import Path

import pytest

from chandlery.builds.locks import BuildLocks, FileBuildLocks
from chandlery.machine import locks as machine_locks
from tests.support.build_locks_contract import BuildLocksContract


@pytest.fixture
async def here(tmp_path: Path) -> FileBuildLocks:
    locks = FileBuildLocks(tmp_path, 2)
    await locks.open()
    return locks


class TestFileBuildLocks(BuildLocksContract):
    @pytest.fixture
    def locks(self, tmp_path: Path, here: FileBuildLocks) -> tuple[BuildLocks, BuildLocks]:
        return here, FileBuildLocks(tmp_path, 2)

    @pytest.fixture
    async def reserving(self, tmp_path: Path, here: FileBuildLocks) -> tuple[BuildLocks, BuildLocks]:
        return FileBuildLocks(tmp_path, 2, 1), FileBuildLocks(tmp_path, 2, 1)


async def test_a_lock_that_was_released_leaves_nothing(tmp_path: Path, here: FileBuildLocks) -> None:
    lock = await here.acquire("git")
    assert lock
    assert list(tmp_path.glob("*.building"))
    await lock.release()
    assert not list(tmp_path.glob("*.building"))


async def test_a_key_that_is_released_while_it_is_being_locked_is_locked_once(
    tmp_path: Path, here: FileBuildLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner removes the file, which another one has opened by then, and locks in vain."""
    before = await here.acquire("git", "build-1")
    assert before
    opened = os.open(tmp_path / "git.building", os.O_RDWR)
    await before.release()
    openings = iter([opened])

    def open_earlier(file: Path) -> int | None:
        descriptor = next(openings, None)
        return machine_locks.open_locked(file) if descriptor is None else descriptor

    monkeypatch.setattr("chandlery.builds.locks.open_locked", open_earlier)
    now = await FileBuildLocks(tmp_path, 2).acquire("git", "build-2")
    assert now
    assert await here.acquire("git", "build-3") is None
    assert await here.owner("git") == "build-2"
    await now.release()


async def test_when_a_client_last_waited_for_a_build_is_the_time_of_its_file(
    tmp_path: Path, here: FileBuildLocks
) -> None:
    assert await here.acquire("git")
    long_ago = time.time() - 1000
    os.utime(tmp_path / "git.building", (long_ago, long_ago))
    assert await here.last_waiter("git") > 900
    await FileBuildLocks(tmp_path, 2).note_waiter("git")
    assert await here.last_waiter("git") < 900
    ahead = time.time() + 1000
    os.utime(tmp_path / "git.building", (ahead, ahead))
    assert await here.last_waiter("git") == float("inf")


async def test_where_nothing_can_be_written_builds_are_not_kept_apart(tmp_path: Path) -> None:
    locks = FileBuildLocks(tmp_path / "missing", 1)
    for _ in range(2):
        assert await locks.acquire("git")
        assert await locks.slot()
    assert await locks.owner("git") is None
