"""How log events look; they go to stderr, so that stdout is for answers alone."""

import re
import sys
import time
from collections.abc import Sequence
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger


def configure(log_format: Literal["console", "json"]) -> None:
    """Log for people (`console`) or for programs (`json`)."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            *(_FOR_PROGRAMS if log_format == "json" else _for_people()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )


_FOR_PROGRAMS: Sequence[Processor] = (
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
    structlog.processors.JSONRenderer(),
)


def _for_people() -> Sequence[Processor]:
    # Not its own choice of tracebacks: those show local variables, and passwords are among them.
    renderer = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    return _TimeOfDay(), _show_controls, renderer if sys.stderr.isatty() else _Lines(renderer)


class _TimeOfDay:
    """Stamps events with the time of day here, which is worked out once a second."""

    def __init__(self) -> None:
        self._last = 0, ""

    def __call__(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        now = int(time.time())
        second, text = self._last
        if now != second:
            text = time.strftime("%H:%M:%S", time.localtime(now))
            self._last = now, text
        event["timestamp"] = text
        return event


class _Lines:
    """Writes events of one line as `renderer` does without colors, and fast: there is one per request."""

    def __init__(self, renderer: structlog.dev.ConsoleRenderer) -> None:
        self._renderer = renderer

    def __call__(self, logger: WrappedLogger, name: str, event: EventDict) -> str:
        if not _MORE_LINES.isdisjoint(event):
            return str(self._renderer(logger, name, event))
        line = f"{event.pop('timestamp')} [{event.pop('level'):<9}] {event.pop('event')!s:<30}"
        for key in sorted(event):
            value = event[key]
            plain = isinstance(value, str) and not _QUOTED.search(value)
            line += f" {key}={value}" if plain else f" {key}={value!r}"
        return line.rstrip(" ")


_MORE_LINES = frozenset({"exc_info", "exception", "stack"})
_QUOTED = re.compile(r"""[ \t=\r\n"']""")


def _show_controls(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Write control characters as escapes: what a client sends must not drive whoever's terminal shows it."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            shown = (char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in value)
            event[name] = "".join(shown)
    return event
