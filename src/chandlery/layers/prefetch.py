"""Iterators that work in threads of their own, ahead of whoever takes what they give.

The stages of one pass run side by side so, wherever they leave the interpreter, as reading, hashing and
compressing do; bounded queues between them bound the memory.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    """Nothing more comes; with an error it isn't all."""

    error: BaseException | None = None


@contextmanager
def ahead(items: Iterable[T], count: int) -> Iterator[Iterator[T]]:
    """Return the same items, `count` of which may wait to be taken; what is raised comes when they would.

    When the context is left, early or not, the thread has ended.
    """
    queue: Queue[T | _End] = Queue(count)
    left = Event()
    ended = False

    def work() -> None:
        try:
            for item in items:
                queue.put(item)
                if left.is_set():
                    break
        except BaseException as error:
            queue.put(_End(error))
        else:
            queue.put(_End())

    def take() -> Generator[T, None, None]:
        nonlocal ended
        while not ended:
            item = queue.get()
            if not isinstance(item, _End):
                yield item
                continue
            ended = True
            if item.error is not None:
                raise item.error

    thread = Thread(target=work, name="ahead")
    thread.start()
    try:
        yield take()
    finally:
        left.set()
        while not ended:
            ended = isinstance(queue.get(), _End)
        thread.join()
