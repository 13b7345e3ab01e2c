import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from chandlery.errors import (
    ChandleryError,
    ReferenceNotFoundError,
    SourceUnavailableError,
    StorageFullError,
    TooManyReferencesError,
)
from chandlery.sources.negative_cache import MissingReferences
from chandlery.sources.pin_file import PinFile
from chandlery.sources.pins import Pin, PinLimits, Pins, Resolved
from tests.support.clock import Clock

SOURCE = "git!https://example.com/set"
LIMITS = PinLimits(lifetime=3600, patience=0.25, back_off=30)
NOON = 1_700_000_000.0


class Upstream:
    """What references mean, how often that was asked, and what is wrong with it."""

    def __init__(self) -> None:
        self.references = {"main": "a" * 40}
        self.asked: list[str] = []
        self._is_asked = asyncio.Event()
        self.fault: ChandleryError | None = None
        self.answers = asyncio.Event()
        self.answers.set()

    async def resolve(self, reference: str) -> Resolved:
        self.asked.append(reference)
        self._is_asked.set()
        await self.answers.wait()
        if self.fault is not None:
            raise self.fault
        if reference not in self.references:
            raise ReferenceNotFoundError(SOURCE, reference, "there is main")
        return Resolved(self.references[reference], {"reference": reference})

    async def was_asked(self, times: int) -> None:
        """Wait until it was asked so often, which takes a few turns of threads."""
        async with asyncio.timeout(10):
            while len(self.asked) < times:
                self._is_asked.clear()
                await self._is_asked.wait()

    def dies(self) -> None:
        self.fault = SourceUnavailableError(SOURCE, "connection\n refused")


@pytest.fixture
def clock() -> Clock:
    return Clock(NOON)


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sources" / "pins.json"


@pytest.fixture
def pins(file: Path, upstream: Upstream, clock: Clock) -> Pins:
    return Pins(PinFile(file), SOURCE, upstream.resolve, LIMITS, clock=clock)


async def expired(pins: Pins, clock: Clock) -> Pin:
    """Pin, and wait until the pin's lifetime is over."""
    pin = await pins.get("main")
    clock.now += LIMITS.lifetime + 1
    return pin


# While upstream answers


async def test_within_its_lifetime_a_pin_is_used_without_asking(
    pins: Pins, upstream: Upstream, clock: Clock
) -> None:
    first = await pins.get("main")
    upstream.references["main"] = "b" * 40
    clock.now += LIMITS.lifetime

    assert await pins.get("main") == first == Pin("a" * 40, NOON, {"reference": "main"})
    assert upstream.asked == ["main"]


async def test_an_expired_pin_is_resolved_anew(pins: Pins, upstream: Upstream, clock: Clock) -> None:
    await expired(pins, clock)
    upstream.references["main"] = "b" * 40

    assert await pins.get("main") == Pin("b" * 40, clock.now, {"reference": "main"})


async def test_a_clock_that_is_set_back_makes_no_pin_live_for_ever(
    pins: Pins, upstream: Upstream, clock: Clock
) -> None:
    await pins.get("main")
    clock.now -= 1000 * LIMITS.lifetime

    assert (await pins.get("main")).resolved == clock.now


async def test_many_who_wait_share_one_resolution_also_if_the_first_goes_away(
    pins: Pins, upstream: Upstream
) -> None:
    upstream.answers.clear()
    waiting = [asyncio.create_task(pins.get("main")) for _ in range(5)]
    await upstream.was_asked(1)
    waiting[0].cancel()
    await asyncio.sleep(0)
    upstream.answers.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)

    assert isinstance(results[0], asyncio.CancelledError)
    assert [each.revision for each in results[1:] if isinstance(each, Pin)] == ["a" * 40] * 4
    assert upstream.asked == ["main"]


async def test_without_a_lifetime_what_somebody_changed_before_he_asked_is_seen(
    file: Path, upstream: Upstream, clock: Clock
) -> None:
    pins = Pins(PinFile(file), SOURCE, upstream.resolve, PinLimits(0.0, 5.0, 1.0), clock=clock)
    upstream.answers.clear()
    before = asyncio.create_task(pins.get("main"))
    await upstream.was_asked(1)
    clock.now += 1
    after = [asyncio.create_task(pins.get("main")) for _ in range(3)]
    await asyncio.sleep(0)
    upstream.answers.set()

    assert (await before).resolved == NOON
    assert {(await each).resolved for each in after} == {clock.now}
    assert len(upstream.asked) == 2


# While it doesn't


async def test_a_dead_upstream_leaves_the_last_good_pin_which_says_since_when_and_why(
    pins: Pins, upstream: Upstream, clock: Clock
) -> None:
    last = await expired(pins, clock)
    upstream.dies()

    stale = await pins.get("main")

    assert (stale.revision, stale.resolved) == (last.revision, last.resolved)
    assert stale.stale == (
        "as of 2023-11-14 22:13:20 UTC, because the source could not be asked since: connection refused"
    )


async def test_after_a_failure_upstream_is_left_alone_for_a_moment(
    pins: Pins, upstream: Upstream, clock: Clock
) -> None:
    await expired(pins, clock)
    upstream.dies()
    for _ in range(10):
        assert (await pins.get("main")).stale
    assert len(upstream.asked) == 2

    upstream.fault = None
    clock.now += LIMITS.back_off + 1
    assert not (await pins.get("main")).stale
    assert len(upstream.asked) == 3


async def test_an_upstream_that_says_nothing_holds_no_request_for_long_and_is_not_asked_again(
    pins: Pins, upstream: Upstream, clock: Clock
) -> None:
    await expired(pins, clock)
    upstream.answers.clear()

    assert "it has not answered within 0.25 s" in (await pins.get("main")).stale
    clock.now += 1
    # Others don't wait at all.
    async with asyncio.timeout(LIMITS.patience / 2):
        assert (await pins.get("main")).stale
    assert len(upstream.asked) == 2

    # What was begun goes on.
    upstream.references["main"] = "b" * 40
    upstream.answers.set()
    await asyncio.gather(*(each.task for each in pins._attempts.values()))
    assert (await pins.get("main")).revision == "b" * 40
    assert len(upstream.asked) == 2


async def test_a_full_disk_leaves_the_last_good_pin_too(pins: Pins, upstream: Upstream, clock: Clock) -> None:
    await expired(pins, clock)
    upstream.fault = StorageFullError("/data")

    assert "no space left on the device" in (await pins.get("main")).stale


async def test_without_a_pin_a_dead_upstream_is_told_and_not_asked_at_the_rate_of_requests(
    pins: Pins, upstream: Upstream, clock: Clock
) -> None:
    upstream.dies()
    for _ in range(10):
        with pytest.raises(SourceUnavailableError, match="refused"):
            await pins.get("main")
    assert len(upstream.asked) == 1


async def test_a_reference_that_is_gone_is_not_found_although_there_was_a_pin(
    pins: Pins, upstream: Upstream, clock: Clock
) -> None:
    last = await expired(pins, clock)
    del upstream.references["main"]

    with pytest.raises(ReferenceNotFoundError):
        await pins.get("main")
    assert await pins.last("main") is None
    # But what it was pinned to can still be named.
    assert await pins.revision(last.revision[:16]) == last.revision


async def test_stale_serving_and_recovery_are_logged_once(
    pins: Pins, upstream: Upstream, clock: Clock
) -> None:
    await expired(pins, clock)
    upstream.dies()
    with capture_logs() as logs:
        for _ in range(5):
            await pins.get("main")
            clock.now += LIMITS.back_off + 1
        upstream.fault = None
        for _ in range(5):
            await pins.get("main")

    assert len(upstream.asked) == 7
    assert [(each["log_level"], each["event"]) for each in logs] == [
        ("warning", "the package source can't be asked: its last good pin is served"),
        ("info", "the package source answers again"),
    ]


async def test_closing_stops_what_is_resolved_and_tells_those_who_wait(
    pins: Pins, upstream: Upstream
) -> None:
    upstream.answers.clear()
    waiting = asyncio.create_task(pins.get("main"))
    await upstream.was_asked(1)
    await pins.close()

    with pytest.raises(SourceUnavailableError, match="being stopped"):
        await waiting


# In the background


async def test_a_refresh_renews_what_is_about_to_expire_and_was_used_lately(
    pins: Pins, upstream: Upstream, clock: Clock
) -> None:
    upstream.references.update({"idle": "c" * 40, "default": "d" * 40})
    await pins.get("idle")
    clock.now += 86400
    await pins.get("main")
    clock.now += LIMITS.lifetime / 2
    upstream.asked.clear()
    await pins.refresh(LIMITS.lifetime, always=("default",))
    assert upstream.asked == ["default"]

    clock.now += LIMITS.lifetime / 3
    upstream.asked.clear()
    await pins.refresh(LIMITS.lifetime, always=("default",))
    assert upstream.asked == ["main"]

    upstream.asked.clear()
    await pins.refresh(0, always=("default",))
    assert sorted(upstream.asked) == ["default", "main"]


async def test_a_refresh_is_no_use(pins: Pins, upstream: Upstream, clock: Clock) -> None:
    """What nobody asks for any more isn't asked for in the background for ever."""
    await pins.get("main")
    for _ in range(60):
        clock.now += LIMITS.lifetime
        await pins.refresh(LIMITS.lifetime)

    assert len(upstream.asked) == 1 + 86400 / LIMITS.lifetime


async def test_a_refresh_that_fails_is_told_although_no_failure_is_remembered(
    file: Path, upstream: Upstream, clock: Clock
) -> None:
    pins = Pins(PinFile(file), SOURCE, upstream.resolve, PinLimits(back_off=0.0), clock=clock)
    upstream.dies()
    with pytest.raises(SourceUnavailableError):
        await pins.refresh(0, always=("main",))


async def test_a_refresh_that_fails_is_told_only_if_there_is_nothing_to_serve(
    pins: Pins, upstream: Upstream, clock: Clock
) -> None:
    upstream.dies()
    with pytest.raises(SourceUnavailableError):
        await pins.refresh(LIMITS.lifetime, always=("main",))
    upstream.fault = None
    clock.now += LIMITS.back_off + 1
    await pins.refresh(LIMITS.lifetime, always=("main",))
    upstream.dies()
    await pins.refresh(0, always=("main",))

    assert upstream.asked == ["main"] * 3
    # It is known to be stale before its lifetime is over, and served as what it is.
    assert (await pins.get("main")).revision == "a" * 40


# On disk


async def test_another_process_knows_the_pins_and_what_each_wrote_stays(
    file: Path, pins: Pins, upstream: Upstream, clock: Clock
) -> None:
    upstream.references["next"] = "b" * 40
    other = Pins(PinFile(file), SOURCE, upstream.resolve, LIMITS, clock=clock)
    await pins.get("main")
    await other.get("next")
    upstream.dies()

    third = Pins(PinFile(file), SOURCE, upstream.resolve, LIMITS, clock=clock)

    assert await third.get("main") == await pins.get("main")
    assert await third.get("next") == await other.get("next")
    assert await third.details("b" * 40) == {"reference": "next"}


async def test_what_another_process_has_renewed_is_not_asked_for_again(
    file: Path, pins: Pins, upstream: Upstream, clock: Clock
) -> None:
    await pins.get("main")
    clock.now += LIMITS.lifetime + 1
    other = Pins(PinFile(file), SOURCE, upstream.resolve, LIMITS, clock=clock)
    upstream.references["main"] = "b" * 40
    await other.refresh(LIMITS.lifetime, ["main"])

    assert (await pins.get("main")).revision == "b" * 40
    assert upstream.asked == ["main"] * 2


async def test_references_at_one_revision_have_their_own_details(
    file: Path, pins: Pins, upstream: Upstream, clock: Clock
) -> None:
    upstream.references["v1"] = upstream.references["main"]
    await pins.get("main")
    await pins.get("v1")

    for each in (pins, Pins(PinFile(file), SOURCE, upstream.resolve, LIMITS, clock=clock)):
        assert (await each.get("main")).details == {"reference": "main"}
        assert (await each.get("v1")).details == {"reference": "v1"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pins": {"main": 3}}', b"\xff\xfe"])
async def test_a_damaged_file_is_moved_aside(
    file: Path, upstream: Upstream, content: bytes, clock: Clock
) -> None:
    file.parent.mkdir()
    file.write_bytes(content)

    pins = Pins(PinFile(file), SOURCE, upstream.resolve, LIMITS, clock=clock)

    assert (await pins.get("main")).revision == "a" * 40
    assert file.with_name("pins.json.damaged").read_bytes() == content
    assert json.loads(file.read_bytes())["pins"]["main"]["revision"] == "a" * 40


async def test_a_file_that_cannot_be_written_leaves_pins_in_memory(
    tmp_path: Path, upstream: Upstream, clock: Clock
) -> None:
    (tmp_path / "no-folder").touch()
    pins = Pins(PinFile(tmp_path / "no-folder" / "pins.json"), SOURCE, upstream.resolve, LIMITS, clock=clock)
    with capture_logs() as logs:
        await pins.get("main")
    upstream.dies()

    assert (await pins.get("main")).revision == "a" * 40
    assert "pins can't be kept" in [each["event"] for each in logs]


# Clients that ask for anything


async def test_unknown_references_are_not_written_and_memory_is_bounded(
    file: Path, upstream: Upstream, clock: Clock
) -> None:
    missing = MissingReferences(SOURCE, per_minute=10**9, clock=clock)
    pins = Pins(PinFile(file), SOURCE, upstream.resolve, LIMITS, missing=missing, clock=clock)
    for number in range(3000):
        with pytest.raises(ReferenceNotFoundError):
            await pins.get(f"unknown-{number}")
    upstream.dies()
    for number in range(3000):
        with pytest.raises(SourceUnavailableError):
            await pins.get(f"dead-{number}")

    assert not file.exists()
    assert len(missing) <= 1024
    assert len(pins._failures) <= 1024
    assert not pins._attempts


async def test_the_references_used_last_are_remembered(
    file: Path, pins: Pins, upstream: Upstream, clock: Clock
) -> None:
    for number in range(300):
        clock.now += 1
        upstream.references[f"v{number}"] = f"{number:040x}"
        await pins.get(f"v{number}")
        await pins.get("v0")

    kept = set(json.loads(file.read_bytes())["pins"])
    assert kept == {"v0", *(f"v{number}" for number in range(45, 300))}
    assert await pins.revision(f"{1:040x}") == f"{1:040x}"


async def test_an_unknown_reference_is_asked_for_once_in_a_while_and_few_of_them(
    file: Path, upstream: Upstream, clock: Clock
) -> None:
    missing = MissingReferences(SOURCE, seconds=60, per_minute=5, clock=clock)
    pins = Pins(PinFile(file), SOURCE, upstream.resolve, LIMITS, missing=missing, clock=clock)
    for _ in range(10):
        with pytest.raises(ReferenceNotFoundError):
            await pins.get("unknown")
    assert upstream.asked == ["unknown"]

    refused = 0
    for number in range(20):
        try:
            await pins.get(f"unknown-{number}")
        except TooManyReferencesError:
            refused += 1
        except ReferenceNotFoundError:
            pass
    assert refused >= 14

    # A minute later there is room again, and what exists by then is found.
    clock.now += 61
    upstream.references["unknown"] = "b" * 40
    assert (await pins.get("unknown")).revision == "b" * 40


async def test_few_are_resolved_at_once_and_few_wait(pins: Pins, upstream: Upstream) -> None:
    upstream.answers.clear()
    waiting = [asyncio.create_task(pins.get(f"unknown-{number}")) for number in range(100)]
    await upstream.was_asked(4)
    # The others have been refused, or wait.
    async with asyncio.timeout(10):
        pending = {*waiting}
        while len(pending) > 64:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    assert len(upstream.asked) == 4
    upstream.answers.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)

    assert sum(isinstance(each, TooManyReferencesError) for each in results) == 36


steps = st.lists(
    st.sampled_from(["get", "get other", "pass", "expire", "die", "revive", "move", "delete", "reopen"]),
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(steps)
async def test_whatever_happens_a_pin_is_what_upstream_said_last_or_says_that_it_is_not(
    tmp_path_factory: pytest.TempPathFactory, steps: Sequence[str]
) -> None:
    clock, upstream = Clock(NOON), Upstream()
    file = tmp_path_factory.mktemp("pins") / "pins.json"

    def opened() -> Pins:
        return Pins(PinFile(file), SOURCE, upstream.resolve, LIMITS, clock=clock)

    pins, said, moves = opened(), {"main": {"a" * 40}}, 0
    moved_at = float("-inf")
    for step in steps:
        match step:
            case "pass":
                clock.now += 31
            case "expire":
                clock.now += LIMITS.lifetime + 1
            case "die":
                upstream.dies()
            case "revive":
                upstream.fault = None
            case "delete":
                upstream.references.pop("main", None)
            case "reopen":
                pins = opened()
            case "move":
                moves += 1
                upstream.references["main"] = f"{moves:040x}"
                said["main"].add(f"{moves:040x}")
                moved_at = clock.now
            case "get other":
                with pytest.raises(ChandleryError):
                    await pins.get("other")
            case "get":
                try:
                    pin = await pins.get("main")
                except ReferenceNotFoundError:
                    assert "main" not in upstream.references
                except SourceUnavailableError:
                    continue
                else:
                    assert pin.revision in said["main"]
                    fresh = clock.now - pin.resolved <= LIMITS.lifetime
                    assert fresh or pin.stale
                    if not pin.stale and pin.resolved > moved_at and "main" in upstream.references:
                        assert pin.revision == upstream.references["main"]
