"""Whether a server can do its work: checks that run at once, and not more often than they need to.

Whoever asks, and however often, the checks run at most every few seconds, so that asking costs nothing.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

import structlog

from chandlery.errors import ChandleryError

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

Check = Callable[[], Awaitable[object]]


class Readiness:
    """Named checks, each of which raises what is wrong; times are in seconds."""

    def __init__(self, checks: Mapping[str, Check], timeout: float = 5.0, max_age: float = 5.0) -> None:
        self._checks = checks
        self._timeout = timeout
        self._max_age = max_age
        self._lock = asyncio.Lock()
        self._checked_at = float("-inf")
        self._found: Mapping[str, str | None] = {}

    async def problems(self) -> Mapping[str, str | None]:
        """Return for every check what is wrong, None if nothing is."""
        async with self._lock:
            if time.monotonic() - self._checked_at >= self._max_age:
                found = await asyncio.gather(*(self._run(name) for name in self._checks))
                self._found = dict(zip(self._checks, found, strict=True))
                self._checked_at = time.monotonic()
            return self._found

    async def _run(self, name: str) -> str | None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._checks[name]()
        except TimeoutError:
            return f"no answer within {self._timeout:g} s"
        except ChandleryError as error:
            return str(error)
        except Exception:
            log.exception("check failed", check=name)
            return "the check itself failed: the log says why"
        return None
