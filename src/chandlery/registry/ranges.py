"""Range headers (RFC 9110, section 14), and the multipart body that answers several; pure.

A server may ignore any Range header and send everything, so whatever is malformed, or would make it send a
byte twice, asks for the whole blob. A range that lies outside the blob is an error, and so is one that ends
before it begins: RFC 9110 leaves that open (section 14.2), but distribution-spec's conformance tests don't.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from chandlery.storage.byte_range import ByteRange

# containers/image asks for up to 1024 ranges of a blob at once.
MOST_RANGES = 1024

_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18})")


class UnsatisfiableRangeError(Exception):
    """None of the ranges that were asked for lies in the blob; `size` in bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(f"no such range: the blob has {size} bytes")
        self.size = size


def parse(header: str, size: int) -> tuple[ByteRange, ...]:
    """Read a Range header for a blob of `size` bytes: the ranges as they were asked; none means everything.

    Raises `UnsatisfiableRangeError`.
    """
    unit, _, listed = header.partition("=")
    texts = [text.strip() for text in listed.split(",")]
    matches = [match for match in map(_RANGE.fullmatch, texts) if match]
    if unit.strip().lower() != "bytes" or len(matches) < len(texts) or len(texts) > MOST_RANGES:
        return ()
    ranges = []
    for first, last, suffix in (match.groups() for match in matches):
        if last and int(last) < int(first):
            raise UnsatisfiableRangeError(size)
        start = max(size - int(suffix), 0) if suffix else int(first)
        stop = min(int(last) + 1, size) if last else size
        if start < stop:
            ranges.append(ByteRange(start, stop))
    if not ranges:
        raise UnsatisfiableRangeError(size)
    if any(earlier.stop > later.start for earlier, later in pairwise(sorted(ranges))):
        return ()
    return tuple(ranges)


@dataclass(frozen=True, slots=True)
class Multipart:
    """How several ranges go in one body, as multipart/byteranges (RFC 9110, section 14.6)."""

    ranges: Sequence[ByteRange]
    size: int
    content_type: str
    boundary: str

    @property
    def media_type(self) -> str:
        """The Content-Type of the whole body."""
        return f"multipart/byteranges; boundary={self.boundary}"

    @property
    def content_length(self) -> int:
        """The size of the whole body in bytes."""
        return sum(len(self.head(part)) + part.size for part in self.ranges) + len(self.end)

    @property
    def end(self) -> bytes:
        """What follows the last range."""
        return f"\r\n--{self.boundary}--\r\n".encode()

    def head(self, part: ByteRange) -> bytes:
        """Return what stands before the bytes of a range."""
        return (
            f"\r\n--{self.boundary}\r\n"
            f"Content-Type: {self.content_type}\r\n"
            f"Content-Range: {part.content_range(self.size)}\r\n\r\n"
        ).encode()
