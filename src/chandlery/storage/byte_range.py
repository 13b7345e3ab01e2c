"""A byte range of a blob; pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class ByteRange:
    """The bytes from `start` to `stop`, as in a slice: `stop` is the first one left out."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many bytes these are."""
        return self.stop - self.start

    def content_range(self, size: int) -> str:
        """Return the Content-Range of this part of `size` bytes."""
        return f"bytes {self.start}-{self.stop - 1}/{size}"
