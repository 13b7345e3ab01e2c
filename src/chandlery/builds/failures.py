"""How builds failed a moment ago, for all processes that share a data folder.

    <folder>/<key>.failed   the error, and until when it counts

Clients ask more than once for what they can't have, and the next time may be another process's turn; so it is
told what the first one saw. What can't be written is logged and forgotten: then it is built once more.
"""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import structlog

from chandlery import errors
from chandlery.errors import ChandleryError
from chandlery.machine.age import age_of

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_SUFFIX = ".failed"


class _Record(msgspec.Struct, frozen=True):
    """An error: the name of its class in `errors`, its arguments as an exception, and its attributes."""

    until: float  # seconds since the epoch
    kind: str
    arguments: list[Any]
    attributes: dict[str, Any]


class FailedBuilds:
    """Remembers for `seconds` how builds failed, by key."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder = folder
        self._seconds = seconds

    def recent(self, key: str) -> ChandleryError | None:
        """Return how a build failed, if that was a moment ago."""
        try:
            record = msgspec.json.decode(self._file(key).read_bytes(), type=_Record)
        except (OSError, msgspec.DecodeError):
            return None
        return _error(record) if time.time() < record.until <= time.time() + self._seconds else None

    def remember(self, key: str, error: ChandleryError) -> None:
        """Remember how a build failed, and forget those that are over."""
        self.sweep()
        # A class of another module is told as the one that it is a kind of.
        kind = next(each for each in type(error).__mro__ if each.__module__ == errors.__name__)
        aside = self._folder / f"{key}{_SUFFIX}.new"
        try:
            record = _Record(time.time() + self._seconds, kind.__name__, list(error.args), vars(error))
            aside.write_bytes(msgspec.json.encode(record))
            aside.rename(self._file(key))
        except (OSError, TypeError) as reason:  # a full disk; an attribute that JSON has no word for
            log.warning("a failure can't be remembered", key=key, reason=str(reason))

    def sweep(self) -> None:
        """Forget what is over."""
        for file in self._folder.glob(f"*{_SUFFIX}*"):
            with suppress(OSError):
                if age_of(file) > self._seconds:
                    file.unlink()

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"


def _error(record: _Record) -> ChandleryError | None:
    kind = getattr(errors, record.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, ChandleryError)):
        return None
    # Its constructor takes other arguments.
    error = kind.__new__(kind, *record.arguments)
    error.__dict__.update(record.attributes)
    return error
