"""What the workers of one server tell each other: what each has counted, and its builds.

    <folder>/<pid>.report   of one worker, in JSON: renewed every second, and once more at its end

So whichever worker is asked can answer for all of them; what others did in the last second may be missing. A
report that isn't renewed any more is of a worker that has gone: what it has counted stays counted, lest sums
go down, and of its builds those stay that have ended.
"""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import structlog

from chandlery.machine.age import age_of
from chandlery.telemetry.metrics import Figures

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_SUFFIX = ".report"
_INTERVAL = 1.0  # seconds
# A worker that has been silent for so many seconds is none any more.
_SILENCE = 15.0


class ReportedBuild(msgspec.Struct, frozen=True):
    """A build as `/builds` describes it, and when it was asked for, in seconds since the epoch."""

    asked_at: float
    has_ended: bool
    description: dict[str, Any]


class Report(msgspec.Struct, frozen=True):
    """What one worker tells."""

    figures: Figures
    builds: list[ReportedBuild]


class WorkerReports:
    """The reports in a folder that the workers of a server share; `own` makes that of this process."""

    def __init__(self, folder: Path, own: Callable[[], Report]) -> None:
        self._folder = folder
        self._own = own
        self._file = folder / f"{os.getpid()}{_SUFFIX}"

    async def publish_always(self) -> None:
        """Publish this process's report every second, for ever."""
        while True:
            self.publish()
            await asyncio.sleep(_INTERVAL)

    def publish(self) -> None:
        """Publish this process's report; what can't be written is logged, and tried again."""
        aside = self._file.with_suffix(".new")
        try:
            aside.write_bytes(msgspec.json.encode(self._own()))
            aside.rename(self._file)
        except OSError as error:
            log.warning("a worker can't tell the others what it does", reason=str(error))

    def others(self) -> Iterator[Report]:
        """Yield the reports of the other workers, also of those that have gone."""
        for file in sorted(self._folder.glob(f"*{_SUFFIX}")):
            if file == self._file:
                continue
            with suppress(OSError, msgspec.DecodeError):
                is_fresh = age_of(file) < _SILENCE
                report = msgspec.json.decode(file.read_bytes(), type=Report)
                yield report if is_fresh else _left(report)


def _left(report: Report) -> Report:
    return Report(Figures(report.figures.totals, {}), [build for build in report.builds if build.has_ended])
