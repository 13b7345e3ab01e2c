"""What every store of pins keeps; a store's tests subclass this and give an `opened` fixture.

The store is to keep MOST_PINS and MOST_REVISIONS at most.
"""

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from chandlery.sources.pin_store import PinStore, StoredPin

NOON = 1_700_000_000.0
# Bytes, with all that a flake's lock needs.
LARGEST = 1024

MOST_PINS, MOST_REVISIONS = 32, 40

Opened = Callable[[], PinStore]


def pin(letter: str = "a", resolved: float = NOON, used: float = NOON, **details: str) -> StoredPin:
    return StoredPin(letter * 40, resolved, used, details)


class PinStoreContract:
    @pytest.fixture
    def opened(self) -> Opened:
        """Return what gives the store as another process sees it, each time that it is called."""
        raise NotImplementedError

    async def test_nothing_is_pinned_at_first(self, opened: Opened) -> None:
        store = opened()
        assert await store.pin("main") is None
        assert await store.pins() == {}
        assert await store.revisions("") == {}

    async def test_a_pin_comes_back_as_it_was_put_here_and_elsewhere(self, opened: Opened) -> None:
        store, other = opened(), opened()
        assert await other.pin("main") is None
        put = pin(reference="git+https://example.com", location="x")
        await store.put("main", put)
        for each in (store, other, opened()):
            assert await each.pin("main", latest=True) == put
            assert [*await each.pins()] == ["main"]

    async def test_a_reference_that_moves_leaves_the_revisions_that_it_had(self, opened: Opened) -> None:
        store = opened()
        for letter in "ab":
            await store.put("main", pin(letter, details=letter))
        assert await opened().pin("main") == pin("b", details="b")
        assert await opened().revisions("") == {"a" * 40: {"details": "a"}, "b" * 40: {"details": "b"}}

    async def test_references_at_one_revision_have_their_own_details(self, opened: Opened) -> None:
        store = opened()
        for reference in ("main", "v1"):
            await store.put(reference, pin(reference=reference))
        for reference in ("main", "v1"):
            assert await opened().pin(reference) == pin(reference=reference)

    async def test_a_pin_that_is_removed_is_gone_and_its_revision_is_not(self, opened: Opened) -> None:
        store, other = opened(), opened()
        await store.put("main", pin())
        assert await other.pin("main")
        await store.remove("main")
        await store.remove("never")
        for each in (store, other, opened()):
            assert await each.pin("main", latest=True) is None
            assert [*await each.revisions("a")] == ["a" * 40]

    async def test_revisions_are_found_by_how_they_begin(self, opened: Opened) -> None:
        store = opened()
        for revision in ("abc1", "abc2", "b"):
            await store.remember(revision, {"is": revision})
        for each in (store, opened()):
            assert await each.revisions("abc") == {"abc1": {"is": "abc1"}, "abc2": {"is": "abc2"}}
            assert await each.revisions("c") == {}
        assert await store.pins() == {}

    async def test_what_each_writes_at_once_stays(self, opened: Opened) -> None:
        stores = [opened() for _ in range(4)]
        await asyncio.gather(
            *(
                store.put(f"v{number}-{turn}", pin(str(number)))
                for turn in range(5)
                for number, store in enumerate(stores)
            )
        )
        assert len(await opened().pins()) == 20

    async def test_when_a_pin_was_used_is_kept_with_the_next_change(self, opened: Opened) -> None:
        store = opened()
        await store.put("main", pin())
        store.note_use("main", NOON + 7)
        assert (await store.pins())["main"].used == NOON + 7
        await store.put("other", pin("b"))
        found = await opened().pin("main")
        assert found is not None
        assert found.used == NOON + 7
        # One that has an older pin of it knows no better.
        store.note_use("main", NOON + 8)
        await store.put("main", pin("c", used=NOON + 1))
        assert (await opened().pins())["main"].used == NOON + 8

    async def test_a_younger_pin_of_the_same_revision_is_known_here_at_once(self, opened: Opened) -> None:
        store = opened()
        for resolved in (NOON, NOON + 1, NOON + 100):
            await store.put("main", pin(resolved=resolved))
            assert await store.pin("main", latest=True) == pin(resolved=resolved)
        assert await opened().pin("main") == pin(resolved=NOON + 100)

    async def test_what_was_used_last_and_what_is_pinned_is_kept(self, opened: Opened) -> None:
        store = opened()
        for number in range(50):
            await store.remember(f"{number:040x}", {})
        await store.put("first", pin("f", used=NOON + 1000))
        for number in range(40):
            await store.put(f"v{number}", pin("e", used=NOON + number))
        kept, revisions = await opened().pins(), await opened().revisions("")
        assert len(kept) <= MOST_PINS
        assert {"first", "v39", "v38"} <= kept.keys()
        assert "v0" not in kept
        assert {"f" * 40, "e" * 40, f"{49:040x}"} <= revisions.keys()
        assert len(revisions) <= MOST_REVISIONS

    def test_a_pin_is_small(self) -> None:
        reference = f"github:NixOS/nixpkgs/{'a' * 40}?narHash=sha256-{'b' * 44}"
        details = {"reference": reference, "location": "x" * 100}
        assert len(msgspec.json.encode(StoredPin("a" * 40, NOON, NOON, details))) < LARGEST
