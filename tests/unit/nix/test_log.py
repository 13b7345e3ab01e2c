import json
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.nix.log import NixLog
from chandlery.telemetry.build_timings import Work


def line(**event: object) -> str:
    return f"@nix {json.dumps(event)}\n"


def start(number: int, kind: int, text: str = "", level: int = 3) -> str:
    return line(action="start", id=number, level=level, text=text, type=kind, fields=[])


def stop(number: int) -> str:
    return line(action="stop", id=number)


def read(log: str, piece: int = 1 << 20) -> tuple[str, list[tuple[Work, float, float]]]:
    """Return what people are told, and the works; the clock ticks each time that it is asked."""
    said: list[bytes] = []
    works: list[tuple[Work, float, float]] = []
    ticks = count()
    reader = NixLog(said.append, lambda *work: works.append(work), lambda: float(next(ticks)))
    content = log.encode()
    for begin in range(0, len(content), piece):
        reader.feed(content[begin : begin + piece])
    reader.end()
    return b"".join(said).decode(), works


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_people_are_told_what_nix_would_have_told_them(piece: int) -> None:
    log = (
        line(action="msg", level=3, msg="this derivation will be built:")
        + line(action="msg", level=5, msg="chatter")
        + start(1, 0, "querying info about missing paths", level=6)
        + start(2, 105, "building '/nix/store/x-git.drv'")
        + line(action="result", fields=["it is ä"], id=2, type=101)
        + line(action="result", fields=[1, 2], id=2, type=105)
        + stop(2)
        + "ssh: a host key\n"
        + line(action="msg", level=0, msg="\x1b[31;1merror:\x1b[0m it failed", raw_msg="it failed")
        + "no end"
    )
    said, _ = read(log, piece)
    assert said == (
        "this derivation will be built:\nbuilding '/nix/store/x-git.drv'...\nit is ä\nssh: a host key\n"
        "error: it failed\nno end\n"
    )


def test_works_are_downloads_and_builders_apart_from_those_that_fetch() -> None:
    log = (
        start(1, 105, "building '/nix/store/x-git_2.39_amd64.deb.drv'")
        + start(2, 101, "downloading 'http://mirror/git.deb'", level=4)
        + start(3, 105, "building '/nix/store/x-git-2.39.drv'")
        + stop(2)
        + stop(1)
        + stop(3)
        + start(4, 100, "copying path '/nix/store/x-jq' from 'https://cache'")
        + start(5, 105, "building '/nix/store/x-never-ends.drv'")
        + stop(4)
        + stop(99)
    )
    assert read(log)[1] == [
        (Work.FETCH, 1.0, 3.0),
        (Work.FETCH, 0.0, 4.0),
        (Work.BUILD, 2.0, 5.0),
        (Work.FETCH, 6.0, 8.0),
    ]


@pytest.mark.parametrize(
    "text", ["@nix {", "@nix []", "@nix null", '@nix {"action":"stop"}x', "@nix \x00", "@nix"]
)
def test_what_is_no_event_is_text(text: str) -> None:
    assert read(f"{text}\n") == (f"{text}\n", [])


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"action": "start"},
        {"action": "start", "id": "a", "type": []},
        {"action": "start", "id": 1, "type": 105, "text": 7, "level": None},
        {"action": "msg", "msg": 5, "level": "x"},
        {"action": "result", "type": 101, "fields": []},
        {"action": "stop", "id": []},
        {"action": ["start"]},
    ],
)
def test_events_of_another_shape_say_nothing(event: dict[str, object]) -> None:
    assert read(line(**event) + stop(1)) == ("", [])


@given(st.text())
def test_builders_may_write_whatever_they_like(text: str) -> None:
    said, _ = read(f"{text}\n@nix {text}\nthe end\n")
    assert said.endswith("the end\n")


def test_a_line_without_end_is_not_kept_in_memory() -> None:
    said: list[bytes] = []
    reader = NixLog(said.append)
    for _ in range(3):
        reader.feed(b"x" * (1 << 20))
    assert sum(map(len, said)) >= 2 << 20
