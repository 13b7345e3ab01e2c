"""The log of a build, which says what Nix says (`nix.log`) as it comes, but only so much of it.

    the first 16 MiB        as they come
    what is left out        a line says so, there and then
    the last 1 MiB          when Nix has ended

It only grows, so a reader can follow it. The last words are kept in memory as well, for the error that a
build may end with. Threads write, since a builder may talk without end, and a disk be slow.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from chandlery.machine.disk_errors import storage_errors
from chandlery.nix.log import NixLog, OnWork

_FIRST, _LAST = 16 << 20, 1 << 20

# Bytes of one line in `last_words`.
_LONGEST_LINE = 8192


class BuildLog:
    """Appends to a file, which gets the `first` and the `last` bytes of what is said; enter it to open it.

    `on_work` is that of `NixLog`, in seconds of `time.monotonic`. `on_line` gets what Nix says by lines.
    """

    def __init__(
        self,
        file: Path,
        on_work: OnWork = lambda *_: None,
        on_line: Callable[[bytes], object] = lambda _: None,
        first: int = _FIRST,
        last: int = _LAST,
    ) -> None:
        self._nix_log = NixLog(self._hear, on_work, time.monotonic)
        self._path = file
        self._on_line = on_line
        self._first = first
        self._last = last
        self._lock = threading.Lock()  # of the file
        self._pending: list[bytes] = []
        self._left_out = 0  # bytes
        self._tail = deque[bytes]()
        self._tail_size = 0

    async def __aenter__(self) -> Self:
        with storage_errors(self._path.parent):
            self._file = await asyncio.to_thread(self._path.open, "ab", buffering=0)
        self._size = self._file.tell()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._on_line = lambda _: None
        self._nix_log.end()
        tail = b"".join(_last_of(self._tail, self._left_out))
        if self._left_out > len(tail):
            self._append(b"[chandlery: %d bytes are left out here]\n" % (self._left_out - len(tail)))
        self._append(tail)
        await asyncio.to_thread(self._write, self._taken(), close=True)

    async def feed(self, piece: bytes) -> None:
        """Take the next piece of Nix's log for programs, and write what it says."""
        self._nix_log.feed(piece)
        await self.flush()

    def add(self, line: bytes) -> None:
        """Take a line; `flush` writes it."""
        self._keep(line)
        if self._left_out == 0 and self._size + len(line) <= self._first:
            self._append(line)
            return
        if self._left_out == 0:
            self._append(
                b"[chandlery: this log is longer than %d MiB: of what follows only the last %d MiB are kept, "
                b"and come when Nix has ended]\n" % (self._first >> 20, self._last >> 20)
            )
        self._left_out += len(line)

    async def flush(self) -> None:
        """Write what was taken. What has no space is lost."""
        if self._pending:
            await asyncio.to_thread(self._write, self._taken())

    def last_words(self) -> str:
        """Return the last lines, of at most as many bytes as the log has at its end; long lines are cut."""
        return b"".join(map(_shortened, self._tail)).decode(errors="replace")

    def _hear(self, line: bytes) -> None:
        self.add(line)
        self._on_line(line)

    def _append(self, text: bytes) -> None:
        self._pending.append(text)
        self._size += len(text)

    def _keep(self, line: bytes) -> None:
        self._tail.append(line)
        self._tail_size += len(line)
        while self._tail_size > self._last and len(self._tail) > 1:
            self._tail_size -= len(self._tail.popleft())

    def _taken(self) -> bytes:
        text = b"".join(self._pending)
        self._pending.clear()
        return text

    def _write(self, text: bytes, *, close: bool = False) -> None:
        with self._lock:
            # Where there is no space for a log there may still be some for what is built. A flush that was
            # cancelled may come to the file when it is closed.
            with suppress(OSError):
                if text and not self._file.closed:
                    self._file.write(text)
            if close:
                self._file.close()


def _last_of(lines: Iterable[bytes], size: int) -> list[bytes]:
    """Return the last lines that have so many bytes together, or as many as there are."""
    found: list[bytes] = []
    for line in reversed(list(lines)):
        if len(line) > size:
            break
        size -= len(line)
        found.append(line)
    return found[::-1]


def _shortened(line: bytes) -> bytes:
    return line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + b"\n"
