"""Where pins are kept: a protocol, so that the servers of one registry can have one place for them.

A stored pin is small: a revision, two times, and a few texts that are needed to get the revision.
"""

from collections.abc import Mapping
from typing import Protocol

import msgspec


class StoredPin(msgspec.Struct, frozen=True):
    """What a reference was resolved to; times are in seconds since 1970.

    `resolved` is when that was true, and `used` when somebody asked for it last. `details` is what else has
    to be known to get the revision, such as a flake's lock.
    """

    revision: str
    resolved: float
    used: float
    details: dict[str, str] = {}


class PinStore(Protocol):
    """The pins of one source by reference, and every revision that was pinned once, with its details.

    Several processes share what is in it. How many it keeps is bounded: those that were used last, and of
    revisions those that are pinned and those that came last. What can't be written is logged, and known here
    as long as the process lives: a pull that got its pin doesn't fail for it.
    """

    async def pin(self, reference: str, *, latest: bool = False) -> StoredPin | None:
        """Return the pin of a reference, if there is one.

        Another process may have changed it within the last second, unless it has to be the `latest`.
        """
        ...

    async def pins(self) -> Mapping[str, StoredPin]:
        """Return all pins by reference, as they are now."""
        ...

    async def put(self, reference: str, pin: StoredPin) -> None:
        """Pin a reference, and remember the revision.

        A pin that is only a little younger may stay unknown to other processes.
        """
        ...

    async def remove(self, reference: str) -> None:
        """Let a reference have no pin; its revision is remembered."""
        ...

    def note_use(self, reference: str, at: float) -> None:
        """Note when a pin was used (seconds since 1970); it is kept with the next change of any pin."""
        ...

    async def remember(self, revision: str, details: Mapping[str, str]) -> None:
        """Remember a revision that no reference was resolved to."""
        ...

    async def revisions(self, beginning: str) -> Mapping[str, Mapping[str, str]]:
        """Return the details of all revisions that begin so."""
        ...
