"""How log events look; they go to stderr, so that stdout is for answers alone."""

import sys
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
    return (
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        _show_controls,
        # Not its own choice of tracebacks: those show local variables, and passwords are among them.
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        ),
    )


def _show_controls(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Write control characters as escapes: what a client sends must not drive whoever's terminal shows it."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            shown = (char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in value)
            event[name] = "".join(shown)
    return event
