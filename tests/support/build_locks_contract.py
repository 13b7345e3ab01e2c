"""What all implementations of `BuildLocks` keep."""

import pytest

from chandlery.builds.locks import BuildLocks


class BuildLocksContract:
    """Subclasses have a fixture `locks`: those of two processes, which may run two builds at once."""

    @pytest.fixture
    def locks(self) -> tuple[BuildLocks, BuildLocks]:
        raise NotImplementedError

    @pytest.fixture
    def reserving(self) -> tuple[BuildLocks, BuildLocks]:
        """Return likewise, with one of the two slots reserved."""
        raise NotImplementedError

    async def test_a_key_is_locked_once_and_again_when_it_was_released(
        self, locks: tuple[BuildLocks, BuildLocks]
    ) -> None:
        here, there = locks
        lock = await here.acquire("git", "build-1")
        assert lock
        assert await there.acquire("git", "build-2") is None
        assert await here.acquire("git", "build-3") is None
        assert await there.owner("git") == "build-1"
        assert await there.owner("jq") is None
        await lock.release()
        assert await there.owner("git") is None
        again = await there.acquire("git", "build-2")
        assert again
        assert await here.owner("git") == "build-2"
        await again.release()

    async def test_releasing_twice_releases_once(self, locks: tuple[BuildLocks, BuildLocks]) -> None:
        here, there = locks
        lock = await here.acquire("git")
        assert lock
        await lock.release()
        other = await there.acquire("git")
        assert other
        await lock.release()
        assert await here.acquire("git") is None
        await other.release()

    async def test_there_are_as_many_slots_as_may_be_taken_at_once_over_all(
        self, locks: tuple[BuildLocks, BuildLocks]
    ) -> None:
        here, there = locks
        first, second = await here.slot(), await there.slot()
        assert first
        assert second
        assert await here.slot() is None
        assert await there.slot() is None
        await second.release()
        third = await here.slot()
        assert third
        for each in (first, third):
            await each.release()

    async def test_the_process_that_has_waited_longest_has_the_next_slot(
        self, locks: tuple[BuildLocks, BuildLocks]
    ) -> None:
        here, there = locks
        held = [await here.slot(), await here.slot()]
        assert await there.slot() is None
        assert await here.slot() is None
        for each in held:
            assert each
            await each.release()
        assert await here.slot() is None
        first = await there.slot()
        second = await here.slot()
        for each in (first, second):
            assert each
            await each.release()

    async def test_the_last_slot_is_reserved_for_a_client_that_has_none(
        self, reserving: tuple[BuildLocks, BuildLocks]
    ) -> None:
        here, there = reserving
        first = await here.slot("a", "b")
        assert first
        assert first.client == "a"
        assert await here.slot("a") is None
        assert await there.slot("a") is None
        second = await there.slot("a", "b", "c")
        assert second
        assert second.client == "b"
        assert await here.slot("c") is None
        await first.release()
        assert await here.slot("b") is None
        third = await here.slot("b", "a")
        assert third
        assert third.client == "a"
        for each in (second, third):
            await each.release()
        alone = await there.slot("b")
        assert alone
        await alone.release()

    async def test_the_last_waiter_in_another_process_is_known(
        self, locks: tuple[BuildLocks, BuildLocks]
    ) -> None:
        here, there = locks
        lock = await here.acquire("git")
        assert lock
        await there.note_waiter("git")
        assert await here.last_waiter("git") < 900
        assert await here.last_waiter("jq") == float("inf")
        await lock.release()
