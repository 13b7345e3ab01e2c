"""How far the fetch of an index is, in the log: at first after a second, and then every few.

A fetch that is quicker says nothing. How far it is apt writes in lines such as `dlstatus:3:37.5000:Retrieving
file 3 of 5`, among others (its README.progress-reporting).
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import structlog

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Of apt; it writes there what goes wrong, too.
STATUS_OPTION = "APT::Status-Fd=2"

_STATUS = re.compile(rb"^dlstatus:[0-9]+:([0-9]+(?:\.[0-9]+)?):[^\n]*?([0-9]+ of [0-9]+)", re.MULTILINE)
# Bytes; a line of a status is shorter.
_LONGEST_LINE = 1000

# Seconds.
_FIRST, _AGAIN = 1.0, 5.0


class FetchProgress:
    """What is done for the index of a suite just now; `first` and `again` are seconds."""

    def __init__(
        self, suite: str, architecture: str, *, first: float = _FIRST, again: float = _AGAIN
    ) -> None:
        self._log = log.bind(suite=suite, architecture=architecture)
        self._first, self._again = first, again
        self._work = "fetching the debian index"
        self._fields: dict[str, object] = {}
        self._unread = b""

    def heard(self, piece: bytes) -> None:
        """Take in what apt writes, which may end within a line."""
        lines, _, unfinished = (self._unread + piece).rpartition(b"\n")
        self._unread = unfinished[-_LONGEST_LINE:]
        said = _STATUS.findall(lines)
        if said:
            percent, file = said[-1]
            self._fields = {"percent": round(float(percent)), "file": file.decode()}

    def begins(self, piece: bytes) -> None:
        """Take in what apt writes while it is not known yet how much there is to fetch."""
        self.heard(piece)
        self._fields.pop("percent", None)

    def reading(self) -> None:
        """Note that all is fetched, and it is computed what the packages need."""
        self._work, self._fields = "reading the debian index", {}

    @asynccontextmanager
    async def told(self) -> AsyncIterator[None]:
        """Log how far it is, until the end of the block."""
        telling = asyncio.create_task(self._tell())
        try:
            yield
        finally:
            telling.cancel()
            with suppress(asyncio.CancelledError):
                await telling

    async def _tell(self) -> None:
        await asyncio.sleep(self._first)
        while True:
            self._log.info(self._work, **self._fields)
            await asyncio.sleep(self._again)
