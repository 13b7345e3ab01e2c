import asyncio
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from chandlery.sources.debian.progress import FetchProgress
from tests.support.tasks import until

SAID = b"""\
dlstatus:1:0.0000:Retrieving file 1 of 2
W: something is odd
dlstatus:3:37.6822:Retrieving file 3 of 5 (10s remaining)
E: dlstatus:9:99.0000:Retrieving file 9 of 9
pmstatus:git:20:Preparing git
"""


async def told(progress: FetchProgress) -> dict[str, object]:
    """Return what is logged first."""
    with capture_logs() as events:
        async with progress.told():
            await until(lambda: events)
    return dict(events[0])


@given(st.lists(st.integers(0, len(SAID)), max_size=5))
def test_what_apt_says_is_understood_however_it_is_cut(cuts: list[int]) -> None:
    progress = FetchProgress("bookworm", "amd64", first=0.0)
    places = [0, *sorted(cuts), len(SAID)]
    for begin, end in pairwise(places):
        progress.heard(SAID[begin:end])
    event = asyncio.run(told(progress))
    assert (event["percent"], event["file"]) == (38, "3 of 5")
    assert event["event"] == "fetching the debian index"


async def test_before_apt_says_anything_it_is_told_that_it_runs() -> None:
    assert await told(FetchProgress("bookworm", "amd64", first=0.0)) == {
        "event": "fetching the debian index",
        "log_level": "info",
        "suite": "bookworm",
        "architecture": "amd64",
    }


async def test_what_was_fetched_is_read() -> None:
    progress = FetchProgress("bookworm", "amd64", first=0.0)
    progress.heard(SAID)
    progress.reading()
    event = await told(progress)
    assert event["event"] == "reading the debian index"
    assert "percent" not in event


def test_a_line_without_an_end_takes_no_memory() -> None:
    progress = FetchProgress("bookworm", "amd64")
    for _ in range(100):
        progress.heard(b"x" * 10_000)
    assert len(progress._unread) <= 1000
