"""Passwords that are tried: how many wrong ones, and that whoever has the right one gets in.

Only wrong ones count, each under three limits: of the user and the network together, of the network, and of
the user from wherever. The last two don't count for a user at a network that it has logged in from before,
so that nobody's guesses elsewhere, or at other users from there, keep it out. At a limit nothing is compared
any more, not even with what is remembered as right: that would tell a guess as well. Why it is so, and what
the figures come to: docs/decisions/0015-what-is-counted-of-passwords.md.

A wrong one that is tried again is known to be wrong: it costs no hash and no count, as a machine with an old
password sends it all day. Two are hashed at once; others wait in turns by network, first those at a network
where their user is known.
"""

import hashlib
import math
import secrets
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog
from cachetools import TTLCache

from chandlery.access.authorization import Password
from chandlery.access.client_address import client_network, client_site
from chandlery.access.known_addresses import KnownAddresses
from chandlery.access.users import HASHES_AT_ONCE, Users
from chandlery.errors import CredentialsError, RateLimitError, TooManyLoginsError
from chandlery.machine.fair_slots import FairSlots, NoRoomError
from chandlery.machine.token_buckets import Buckets

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Wrong passwords of one user from one network; from one network; of one user, from all where it isn't known.
_OF_BOTH_PER_MINUTE = 10
_OF_NETWORK_PER_MINUTE = 30
_OF_USER_PER_HOUR = 60

_MOST_WAITING = 500

_WRONG_FOR = 300.0  # seconds
_MOST_WRONG = 1_000


class _Limit(NamedTuple):
    """So many wrong passwords in a period, of one client of these buckets."""

    buckets: Buckets
    client: str
    most: int
    period: str


class Logins:
    """Lets users in; `buckets` makes those of a name that fill in a number of seconds."""

    def __init__(
        self,
        users: Users,
        known: KnownAddresses,
        buckets: Callable[[str, float], Buckets],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._users = users
        self._known = known
        self._of_both = buckets("wrong-passwords", 60.0)
        self._of_network = buckets("wrong-passwords-of-networks", 60.0)
        self._of_user = buckets("wrong-passwords-of-users", 3600.0)
        self._slots = FairSlots(HASHES_AT_ONCE, _MOST_WAITING)
        self._wrong: TTLCache[bytes, bool] = TTLCache(_MOST_WRONG, _WRONG_FOR, timer=clock)
        self._key = secrets.token_bytes(32)

    async def check(self, credentials: Password, address: str) -> None:
        """Raise `CredentialsError` if a password is wrong, `RateLimitError` before too many are tried.

        `TooManyLoginsError` is raised if too many wait to be tried.
        """
        if not await self._is_right(credentials, address):
            # Without the name: people type a password there.
            log.warning("wrong user or password", client=address)
            raise CredentialsError("the user or the password is wrong")
        self._known.note(credentials.user, client_network(address))

    async def _is_right(self, credentials: Password, address: str) -> bool:
        user, network = credentials.user, client_network(address)
        is_known = self._known.knows(user, network)
        limits = self._limits(user, network, is_known=is_known)
        if self._question(credentials) in self._wrong:
            return False
        for limit in limits:
            _raise_if(limit.buckets.wait(limit.client, limit.most), limit)
        if self._users.remembers(user, credentials.password):
            return True
        try:
            async with self._slots.slot(client_site(address), first=is_known):
                return await self._hash(credentials, limits)
        except NoRoomError:
            raise TooManyLoginsError from None

    async def _hash(self, credentials: Password, limits: Sequence[_Limit]) -> bool:
        """Return whether a password is right, and count it if it isn't."""
        question = self._question(credentials)
        if question in self._wrong:
            return False
        # Taken before, so that no more are tried at once than may be wrong.
        _take(limits)
        if not await self._users.check(credentials.user, credentials.password):
            self._wrong[question] = True
            return False
        for limit in limits:
            limit.buckets.give_back(limit.client, limit.most)
        return True

    def _limits(self, user: str, network: str, *, is_known: bool) -> Sequence[_Limit]:
        # No network has a space in it.
        of_both = _Limit(self._of_both, f"{network} {user}", _OF_BOTH_PER_MINUTE, "minute")
        if is_known:
            return (of_both,)
        return (
            of_both,
            _Limit(self._of_network, network, _OF_NETWORK_PER_MINUTE, "minute"),
            _Limit(self._of_user, user, _OF_USER_PER_HOUR, "hour"),
        )

    def _question(self, credentials: Password) -> bytes:
        """Return what is another with each user, password, and change of the user's password."""
        asked = credentials.user, self._users.version(credentials.user), credentials.password
        return hashlib.blake2b(repr(asked).encode(errors="surrogatepass"), key=self._key).digest()


def _take(limits: Sequence[_Limit]) -> None:
    """Take one of each; `RateLimitError` if one has none, and then the others keep theirs."""
    for number, limit in enumerate(limits):
        wait = limit.buckets.take(limit.client, limit.most)
        if wait:
            for taken in limits[:number]:
                taken.buckets.give_back(taken.client, taken.most)
        _raise_if(wait, limit)


def _raise_if(wait: float, limit: _Limit) -> None:
    if wait:
        raise RateLimitError("wrong passwords", limit.most, limit.period, math.ceil(wait))
