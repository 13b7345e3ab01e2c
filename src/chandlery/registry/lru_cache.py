"""What is kept in memory up to a number of bytes: what was used last stays."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class BoundedMemory(Generic[Key, Value]):
    """Values by key; together they have at most `most` bytes, as far as those who put them tell the truth."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = 0
        self._kept: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    @property
    def size(self) -> int:
        """The bytes of all that is kept."""
        return self._size

    def get(self, key: Key) -> Value | None:
        """Give what is kept under a key; that is a use."""
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found[0]

    def put(self, key: Key, value: Value, size: int) -> None:
        """Keep something of `size` bytes, if it isn't too large; what was used the longest ago makes room."""
        self.forget(key)
        if size > self._most:
            return
        self._kept[key] = value, size
        self._size += size
        while self._size > self._most:
            self.forget(next(iter(self._kept)))

    def forget(self, key: Key) -> None:
        """Keep something no longer, if it is kept."""
        _, size = self._kept.pop(key, (None, 0))
        self._size -= size
