"""Builds that a process began and didn't end, so that another one takes them over.

    builds/<key>.unfinished   what is built, and how many began with it; who builds it has claimed the key

A server that is stopped leaves the files of what it was building; so does one that is killed. A build that
has brought down server after server is not begun a third time by itself: whoever wants it must ask for it.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import structlog

from chandlery.builds.locks import BuildClaims
from chandlery.builds.recipe import ImageOrigin

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_SUFFIX = ".unfinished"
# How many processes begin with a build, the one that was asked for it included.
_MOST_BEGINNINGS = 2


class _Record(msgspec.Struct, frozen=True):
    origin: ImageOrigin
    beginnings: int


class UnfinishedBuilds:
    """The builds in a folder that have begun and not ended. What can't be written is logged and forgotten."""

    def __init__(self, folder: Path, claims: BuildClaims) -> None:
        self._folder = folder
        self._claims = claims
        self._beginnings: dict[str, int] = {}

    @contextmanager
    def begun(self, origin: ImageOrigin) -> Iterator[None]:
        """Keep a record of a build until it ends, well or not; if it is cancelled the record stays."""
        self._record(_Record(origin, self._beginnings.pop(origin.key, 0) + 1))
        try:
            yield
        except asyncio.CancelledError:
            raise
        except BaseException:
            self.forget(origin)
            raise
        self.forget(origin)

    def forget(self, origin: ImageOrigin) -> None:
        """Remove the record of a build that has ended."""
        with suppress(OSError):
            self._file(origin).unlink()

    def take_over(self) -> list[ImageOrigin]:
        """Give what the dead have left, and remove the records: whoever begins with one makes a new one."""
        taken = []
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            with suppress(OSError):
                claim = self._claims.claim(path.name.removesuffix(_SUFFIX))
                if claim is None:
                    continue  # somebody is at it
                with claim:
                    record = _decode(path.read_bytes(), path)
                    path.unlink()
                if record is None:
                    continue
                if record.beginnings < _MOST_BEGINNINGS:
                    self._beginnings[record.origin.key] = record.beginnings
                    taken.append(record.origin)
                else:
                    log.warning("a build is given up", image=record.origin.title, begun=record.beginnings)
        return taken

    def _file(self, origin: ImageOrigin) -> Path:
        return self._folder / f"{origin.key}{_SUFFIX}"

    def _record(self, record: _Record) -> None:
        try:
            # With a buffer, what had no space would be tried again when the file is closed.
            with self._file(record.origin).open("wb", buffering=0) as file:
                file.write(msgspec.json.encode(record))
        except OSError as error:
            log.warning("a build can't be recorded", image=record.origin.title, reason=str(error))


def _decode(content: bytes, path: Path) -> _Record | None:
    try:
        return msgspec.json.decode(content, type=_Record)
    except msgspec.DecodeError as error:
        log.warning("the record of a build can't be read", file=str(path), reason=str(error))
        return None
