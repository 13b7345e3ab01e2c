"""Nix's log for programs (`--log-format internal-json`): as text for people, and what took how long. No I/O.

A line is `@nix ` and an object; what isn't comes from a program that Nix calls, and is text as it stands. A
builder can write such lines too, so nothing is concluded from them but times.
"""

import re
from collections.abc import Callable
from typing import Any

import msgspec

from chandlery.telemetry.build_timings import Work

_MARK = b"@nix "
# src/libutil/logging.hh: what an activity is, and what its results are.
_COPY_PATH, _FILE_TRANSFER, _BUILD, _SUBSTITUTE = 100, 101, 105, 108
_BUILD_LOG_LINE, _POST_BUILD_LOG_LINE = 101, 107
# As chatty as Nix's log for people: 3 is what is said without -v.
_VERBOSITY = 3
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# What a builder says is most of a long log, and its text alone is decoded faster than the whole line.
_BUILDERS_LINE = re.compile(
    rb'@nix \{"action":"result","fields":\[("[^"\\]*(?:\\.[^"\\]*)*")\],"id":[0-9]+,"type":10[17]\}'
)
# Derivations that fetch are called as what they fetch.
_FETCHED = re.compile(r"\.(deb|tar|tgz|zip|gz|xz|bz2|zst|lzma|patch|diff|gem|crate|whl|jar)\.drv")
# A line that is longer is no object of Nix's.
_LONGEST_LINE = 1 << 20


OnWork = Callable[[Work, float, float], object]


class NixLog:
    """Takes the log in pieces.

    `on_text` gets what Nix would have said to people; `on_work` the kind, the beginning and the end (seconds
    of `clock`) of whatever has ended.
    """

    def __init__(
        self,
        on_text: Callable[[bytes], object],
        on_work: OnWork = lambda *_: None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._on_text = on_text
        self._on_work = on_work
        self._clock = clock
        self._rest = b""
        self._begun: dict[int, tuple[Work, float]] = {}

    def feed(self, piece: bytes) -> None:
        """Take the next piece, which may end anywhere."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._line(line)
        if len(self._rest) > _LONGEST_LINE:
            self.end()

    def end(self) -> None:
        """Take what came after the last end of line as one."""
        if self._rest:
            self._line(self._rest)
            self._rest = b""

    def _line(self, line: bytes) -> None:
        event: Any = None
        if line.startswith(_MARK):
            builders = _BUILDERS_LINE.fullmatch(line)
            try:
                if builders is not None:
                    self._say(msgspec.json.decode(builders[1], type=str))
                    return
                event = msgspec.json.decode(line[len(_MARK) :])
            except (msgspec.DecodeError, UnicodeDecodeError):
                event = None
        if not isinstance(event, dict):
            self._on_text(line + b"\n")
            return
        match event:
            case {"action": "msg", "msg": str(text), "level": int(level)} if level <= _VERBOSITY:
                self._say(text)
            case {
                "action": "start",
                "id": int(number),
                "type": int(kind),
                "text": str(text),
                "level": int(level),
            }:
                if text and level <= _VERBOSITY:
                    self._say(f"{text}...")
                self._start(number, kind, text)
            case {"action": "result", "type": int(kind), "fields": [str(text), *_]}:
                if kind in (_BUILD_LOG_LINE, _POST_BUILD_LOG_LINE):
                    self._say(text)
            case {"action": "stop", "id": int(number)} if number in self._begun:
                work, begin = self._begun.pop(number)
                self._on_work(work, begin, self._clock())

    def _start(self, number: int, kind: int, text: str) -> None:
        if kind in (_COPY_PATH, _FILE_TRANSFER, _SUBSTITUTE) or (kind == _BUILD and _FETCHED.search(text)):
            self._begun[number] = (Work.FETCH, self._clock())
        elif kind == _BUILD:
            self._begun[number] = (Work.BUILD, self._clock())

    def _say(self, text: str) -> None:
        if "\x1b" in text:
            text = _COLOURS.sub("", text)
        self._on_text(text.encode(errors="replace") + b"\n")
