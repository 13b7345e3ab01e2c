import json
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from chandlery.telemetry import logs

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

HOSTILE = "a\x1b[31mred\x9b\x7f\u202ex"


@pytest.fixture(autouse=True)
def configured_as_before() -> Iterator[None]:
    """Undo what a test configures."""
    yield
    structlog.reset_defaults()


def written(capsys: pytest.CaptureFixture[str], **fields: str) -> str:
    log.info("request", **fields)
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("console")
    line = written(capsys, path=HOSTILE)
    assert line.rstrip("\n").isprintable()
    assert r"a\x1b[31mred\x9b\x7f\u202ex" in line


@pytest.mark.parametrize("path", ["/v2/\nforged", "/v2/ \r\nforged", "/v2/é", "/v2/\udcff"])
def test_an_event_is_one_line(capsys: pytest.CaptureFixture[str], path: str) -> None:
    for log_format in ("console", "json"):
        logs.configure(log_format)
        assert written(capsys, path=path).count("\n") == 1


def test_programs_get_what_was_logged(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json")
    event = json.loads(written(capsys, path=HOSTILE))
    assert (event["event"], event["level"], event["path"]) == ("request", "info", HOSTILE)


def test_what_is_bound_to_a_request_is_in_every_event(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json")
    with structlog.contextvars.bound_contextvars(request_id="some-id"):
        assert json.loads(written(capsys))["request_id"] == "some-id"


NAMES = st.sampled_from(["path", "bytes", "status", "reason", "a", "z"])
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.lists(st.text())
)


@given(st.text(), st.dictionaries(NAMES, VALUES))
def test_lines_are_those_of_structlog(event: str, fields: dict[str, object]) -> None:
    renderer = structlog.dev.ConsoleRenderer(colors=False)
    common = {"timestamp": "12:34:56", "level": "info", "event": event}
    lines = logs._Lines(renderer)
    assert lines(None, "info", {**common, **fields}) == renderer(None, "info", {**common, **fields})


def test_the_reason_of_an_error_follows_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("console")
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        log.exception("it failed", path="/v2/")
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.endswith("path=/v2/")
    assert rest[-1] == "ZeroDivisionError"
