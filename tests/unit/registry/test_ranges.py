from email.parser import BytesParser
from email.policy import HTTP

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.registry.ranges import MOST_RANGES, Multipart, UnsatisfiableRangeError, parse
from chandlery.storage.byte_range import ByteRange

SIZE = 100


@pytest.mark.parametrize(
    ("header", "slices"),
    [
        ("bytes=0-0", [(0, 1)]),
        ("bytes=10-19", [(10, 20)]),
        ("bytes=90-", [(90, 100)]),
        ("bytes=-10", [(90, 100)]),
        ("bytes=-1000", [(0, 100)]),
        ("bytes=50-1000", [(50, 100)]),
        ("Bytes = 0-0 , -1", [(0, 1), (99, 100)]),
        ("bytes=50-59,0-9", [(50, 60), (0, 10)]),
        ("bytes=0-9,10-19", [(0, 10), (10, 20)]),
        ("bytes=0-9,200-", [(0, 10)]),
    ],
)
def test_ranges_as_rfc_9110_has_them(header: str, slices: list[tuple[int, int]]) -> None:
    assert parse(header, SIZE) == tuple(ByteRange(start, stop) for start, stop in slices)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=0-1,x",
        "bytes=0-1,",
        "bytes=1",
        "bytes=+1-2",
        "bytes=²-3",
        "lines=0-1",
        "bytes=0-9,5-14",
        "bytes=0-,0-",
        f"bytes=0-{'9' * 5000}",
        "bytes=" + ",".join(f"{number}-{number}" for number in range(MOST_RANGES + 1)),
    ],
)
def test_what_is_malformed_or_sends_bytes_twice_asks_for_everything(header: str) -> None:
    assert parse(header, 10 * MOST_RANGES) == ()


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ("bytes=100-", 100),
        ("bytes=-0", 100),
        ("bytes=0-", 0),
        ("bytes=5-2", 100),
        ("bytes=500-200", 1000),
        ("bytes=0-9,5-2", 100),
    ],
)
def test_a_range_outside_the_blob_or_backwards_is_an_error(header: str, size: int) -> None:
    with pytest.raises(UnsatisfiableRangeError) as caught:
        parse(header, size)
    assert caught.value.size == size


@given(st.text(alphabet="bytes=-,0123456789 ", max_size=40), st.integers(0, 10**6))
def test_ranges_lie_within_the_blob_and_never_overlap(listed: str, size: int) -> None:
    try:
        ranges = parse(f"bytes={listed}", size)
    except UnsatisfiableRangeError:
        return
    assert all(0 <= part.start < part.stop <= size for part in ranges)
    assert sum(part.size for part in ranges) <= size


@given(st.binary(min_size=10, max_size=200), st.data())
def test_a_multipart_body_has_the_announced_length_and_the_ranges(
    content: bytes, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(content)), min_size=4, max_size=4)))
    ranges = [ByteRange(cuts[0], cuts[1]), ByteRange(cuts[2], cuts[3])]
    multipart = Multipart(ranges, len(content), "application/octet-stream", "b0undary")
    body = b"".join(multipart.head(part) + content[part.start : part.stop] for part in ranges) + multipart.end
    assert len(body) == multipart.content_length
    head = f"Content-Type: {multipart.media_type}\r\n\r\n".encode()
    first, second = body.split(b"\r\n--b0undary")[1:-1]
    assert [first.partition(b"\r\n\r\n")[2], second.partition(b"\r\n\r\n")[2]] == [
        content[part.start : part.stop] for part in ranges
    ]
    parts = list(BytesParser(policy=HTTP).parsebytes(head + body).iter_parts())
    assert [part["Content-Range"] for part in parts] == [part.content_range(len(content)) for part in ranges]
