import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bcrypt
import pytest

from chandlery.access.authorization import Password
from chandlery.access.known_addresses import KnownAddresses
from chandlery.access.logins import Logins
from chandlery.access.users import Users
from chandlery.errors import ChandleryError, CredentialsError, RateLimitError, TooManyLoginsError
from chandlery.machine.token_buckets import SharedTokenBuckets, TokenBuckets
from tests.support.clock import Clock

HERE, ELSEWHERE = "192.0.2.7", "198.51.100.1"
RIGHT, WRONG, REFUSED = None, CredentialsError, RateLimitError


class Office:
    """Users whose password is their own name, and what lets them in; `hashed` is what was compared."""

    def __init__(self, folder: Path, users: int = 1) -> None:
        self.folder = folder
        self.file = folder / "users"
        stored = bcrypt.hashpw(b"", bcrypt.gensalt(4)).decode()
        names = ["alice", "bob", *(f"user-{number}" for number in range(users))]
        self.file.write_text("".join(f"{name}:{stored}\n" for name in names))
        self.clock = Clock(1000.0)
        self.known = KnownAddresses()
        self.hashed: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.step: threading.Barrier | None = None  # of what is compared at once

    def logins(self, *, shared: bool = False) -> Logins:
        def buckets(what: str, period: float) -> SharedTokenBuckets | TokenBuckets:
            if shared:
                return SharedTokenBuckets(self.folder / what, period, clock=self.clock)
            return TokenBuckets(period, clock=self.clock)

        users = Users(self.file, checkpw=self._compare, clock=self.clock)
        return Logins(users, self.known, buckets, clock=self.clock)

    def _compare(self, password: bytes, _: bytes) -> bool:
        assert self.gate.wait(20)
        if self.step:
            self.step.wait(20)
        self.hashed.append(password.decode())
        return password.startswith(b"right")


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path, 300)


async def outcome(logins: Logins, user: str, password: str, address: str = HERE) -> type | None:
    """Return the class of the error that a login ends with, None if it is let in."""
    try:
        await logins.check(Password(user, password), address)
    except ChandleryError as error:
        return type(error)
    return RIGHT


async def guesses(logins: Logins, user: str, number: int, address: str = HERE) -> int:
    """Try different wrong passwords; return how many were compared."""
    found = [await outcome(logins, user, f"guess {each} from {address}", address) for each in range(number)]
    assert set(found) <= {WRONG, REFUSED}
    return found.count(WRONG)


# What counts


async def test_right_passwords_are_no_tries(office: Office) -> None:
    logins = office.logins()
    for number in range(300):
        assert await outcome(logins, f"user-{number}", "right") is RIGHT
    assert [await outcome(logins, "alice", f"right {number}") for number in range(100)] == [RIGHT] * 100


async def test_who_logs_in_at_once_with_others_is_let_in(office: Office) -> None:
    logins = office.logins()
    ends = await asyncio.gather(*(outcome(logins, f"user-{number}", "right") for number in range(300)))
    assert ends == [RIGHT] * 300


async def test_guesses_at_one_user_keep_out_nobody_else_and_not_that_user_elsewhere(office: Office) -> None:
    logins = office.logins()
    assert await guesses(logins, "alice", 100) == 10
    assert await outcome(logins, "bob", "right") is RIGHT
    assert await outcome(logins, "alice", "right", ELSEWHERE) is RIGHT
    assert await outcome(logins, "alice", "right") is REFUSED
    office.clock.now += 6.0
    assert await outcome(logins, "alice", "right") is RIGHT


async def test_guesses_at_many_users_are_limited_by_address(office: Office) -> None:
    logins = office.logins()
    # Those of a /64 are one client's.
    for addresses in ([HERE] * 100, [f"2001:db8::{number:x}" for number in range(100)]):
        each = [await guesses(logins, f"user-{n}", 1, address) for n, address in enumerate(addresses)]
        assert sum(each) == 30


async def test_guesses_at_many_users_keep_out_no_user_who_is_known_there(office: Office) -> None:
    logins = office.logins()
    assert await outcome(logins, "alice", "right") is RIGHT
    for number in range(100):
        await outcome(logins, f"user-{number}", "wrong")
    assert await outcome(logins, "bob", "right") is REFUSED
    assert await outcome(logins, "alice", "right") is RIGHT
    # A mistyped password is told, and hashed: this is no memory of the right one alone.
    assert await outcome(logins, "alice", "wrong") is WRONG


async def test_guesses_at_a_user_are_limited_wherever_they_come_from(office: Office) -> None:
    logins = office.logins()
    addresses = [f"2001:db8:0:{number:x}::1" for number in range(200)]
    compared = [await guesses(logins, "alice", 1, address) for address in addresses]
    assert sum(compared) == 60
    assert await guesses(logins, "alice", 100, ELSEWHERE) == 0
    office.clock.now += 3600.0
    assert sum([await guesses(logins, "alice", 1, f"203.0.113.{number}") for number in range(200)]) == 60


async def test_guesses_from_everywhere_do_not_keep_a_user_out_where_it_is_known(office: Office) -> None:
    logins = office.logins()
    assert await outcome(logins, "alice", "right") is RIGHT
    for number in range(100):
        await guesses(logins, "alice", 1, f"203.0.113.{number}")
    assert await outcome(logins, "alice", "right", ELSEWHERE) is REFUSED
    assert await outcome(logins, "alice", "right") is RIGHT
    # After a restart too.
    assert await outcome(office.logins(), "alice", "right another") is RIGHT


async def test_what_is_remembered_as_right_tells_no_guess_beyond_the_limit(office: Office) -> None:
    logins = office.logins()
    assert await outcome(logins, "alice", "right") is RIGHT
    for address, most in ((HERE, 10), (ELSEWHERE, 10)):
        assert await guesses(logins, "alice", 100, address) == most
        assert await outcome(logins, "alice", "right", address) is REFUSED


async def test_a_user_who_is_not_there_is_counted_as_others_are(office: Office) -> None:
    logins = office.logins()
    assert await guesses(logins, "nobody", 100) == await guesses(logins, "alice", 100) == 10


async def test_an_old_password_that_is_sent_all_day_is_one_guess(office: Office) -> None:
    logins = office.logins()
    for user in ("alice", "nobody"):
        assert [await outcome(logins, user, "old") for _ in range(1000)] == [WRONG] * 1000
    assert len(office.hashed) == 2
    assert await outcome(logins, "alice", "right") is RIGHT
    # In five minutes it is asked anew; and as soon as the user has another password.
    office.clock.now += 301.0
    assert await outcome(logins, "alice", "old") is WRONG
    office.file.write_text(f"alice:{bcrypt.hashpw(b'other', bcrypt.gensalt(4)).decode()}\n")
    assert await outcome(logins, "alice", "old") is WRONG
    assert office.hashed == ["old", "old", "right", "old", "old"]


async def test_workers_of_a_server_count_together(office: Office) -> None:
    first, second = office.logins(shared=True), office.logins(shared=True)
    assert await guesses(first, "alice", 6) == 6
    found = [await outcome(second, "alice", f"other guess {each}") for each in range(100)]
    assert found.count(WRONG) == 4


# How they wait


@contextmanager
def busy(office: Office) -> Iterator[None]:
    """Let whatever is compared wait until the end of the block."""
    office.gate.clear()
    try:
        yield
    finally:
        office.gate.set()


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0.001)


async def test_a_flood_does_not_starve_who_logs_in(office: Office) -> None:
    logins = office.logins()
    # No thread runs ahead of the other.
    office.step = threading.Barrier(2)
    with busy(office):
        # A /48 has 65,536 networks, and is one site.
        flood = [
            asyncio.create_task(
                outcome(logins, f"user-{number}", f"guess {number}", f"2001:db8:0:{number:x}::1")
            )
            for number in range(199)
        ]
        await settle()
        honest = asyncio.create_task(outcome(logins, "bob", "right", ELSEWHERE))
        await settle()
    assert await honest is RIGHT
    await asyncio.gather(*flood)
    # The two that were being hashed, and at most one of each of the two slots' next turns.
    assert office.hashed.index("right") <= 4


async def test_who_is_known_goes_before_sites_that_are_not(office: Office) -> None:
    logins = office.logins()
    assert await outcome(logins, "alice", "right") is RIGHT
    office.clock.now += 301.0
    office.hashed.clear()
    with busy(office):
        flood = [
            asyncio.create_task(outcome(logins, f"user-{number}", "guess", f"203.0.113.{number}"))
            for number in range(200)
        ]
        await settle()
        honest = asyncio.create_task(outcome(logins, "alice", "right"))
        await settle()
    assert await honest is RIGHT
    await asyncio.gather(*flood)
    assert office.hashed.index("right") <= 4


async def test_what_waits_is_bounded(office: Office) -> None:
    logins = office.logins()
    with busy(office):
        flood = [asyncio.create_task(outcome(logins, f"user-{n}", "right")) for n in range(600)]
        await settle()
        assert [task.result() for task in flood if task.done()] == [TooManyLoginsError] * 98
        # One site fills it, and another has its place nonetheless.
        honest = asyncio.create_task(outcome(logins, "bob", "right", ELSEWHERE))
        await settle()
    assert await honest is RIGHT
    await asyncio.gather(*flood)


async def test_two_are_hashed_at_once(office: Office) -> None:
    logins = office.logins()
    most, running, lock, step = 0, 0, threading.Lock(), threading.Barrier(2)

    def compare(password: bytes, _: bytes) -> bool:
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
        step.wait(20)
        with lock:
            running -= 1
        return True

    logins._users._checkpw = compare
    await asyncio.gather(*(outcome(logins, f"user-{number}", "right") for number in range(50)))
    assert most == 2
