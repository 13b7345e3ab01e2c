"""The revisions of a suite that a folder keeps, one folder each, and which of them go first.

The time of a revision's folder says how much it is wanted: the oldest are removed. In version 0.1 each
architecture had revisions of its own, in a folder of its own (`EarlierIndex`). Images were made at those, so
they are kept while they are wanted, and the last one serves until the suite can be fetched anew.
"""

import os
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from chandlery.machine.age import age_of

POPULARITY = "popularity.json"
_REVISION_LENGTH = 64

REVISION = re.compile("[0-9a-f]{12,64}")


@dataclass(frozen=True, slots=True)
class PinnedIndex:
    """A suite as it stood once: the folder with its snapshot, and the addresses its repositories have now."""

    revision: str
    snapshot: Path
    mirrors: tuple[str, ...]

    @property
    def popularity(self) -> Path:
        """The file with the popularity of its packages (see `Popularity`)."""
        return self.snapshot / POPULARITY


def revision_in(folder: Path, beginning: str) -> str | None:
    """Return the revision in a folder that begins so (12 digits at least), if it is there."""
    if REVISION.fullmatch(beginning) is None:
        return None
    if len(beginning) == _REVISION_LENGTH:
        return beginning if (folder / beginning).exists() else None
    return next((each.name for each in sorted(folder.glob(f"{beginning}*"))), None)


def remove_last(folder: Path, revisions: Sequence[str]) -> None:
    """Let these revisions be the last that are removed from a folder; the most wanted comes first."""
    now = time.time()
    for number, revision in enumerate(revisions):
        with suppress(OSError):
            os.utime(folder / revision, (now - number, now - number))


def remove_oldest(folder: Path, kept: int) -> None:
    """Remove the oldest revisions in a folder, all but as many as `kept`."""
    by_age = sorted(folder.glob("*"), key=lambda each: each.stat().st_mtime, reverse=True)
    for old in by_age[kept:]:
        shutil.rmtree(old, ignore_errors=True)


def kept_mirrors(folder: Path) -> tuple[str, ...]:
    """Return the addresses of the repositories that the snapshots in a folder count."""
    return msgspec.json.decode((folder / "mirrors.json").read_bytes(), type=tuple[str, ...])


class EarlierIndex:
    """What version 0.1 kept of a suite for one architecture; nothing is added to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def current(self) -> PinnedIndex | None:
        """Return the last state of the suite that is kept here, if there is one."""
        try:
            return self.at((self._folder / "current").read_text().strip())
        except FileNotFoundError:
            return None

    def at(self, revision: str) -> PinnedIndex | None:
        """Return the suite as it stood at a revision (or the beginning of one), if it is still kept."""
        whole = revision_in(self._folder / "locks", revision)
        # One that a still older version made has no table.
        if whole is None or not (self._folder / "locks" / whole / POPULARITY).exists():
            return None
        return PinnedIndex(whole, self._folder / "locks" / whole, kept_mirrors(self._folder))

    def keep(self, revisions: Sequence[str]) -> None:
        """Let these revisions be the last that are removed; the most wanted comes first."""
        remove_last(self._folder / "locks", revisions)

    def age(self) -> float:
        """Return how many seconds ago the index was last fetched; infinity if never, see `age_of`."""
        return age_of(self._folder / "current")

    def shrink(self, kept: int) -> None:
        """Remove what only a fetch needed, and the oldest revisions, all but as many as `kept`."""
        shutil.rmtree(self._folder / "apt", ignore_errors=True)
        remove_oldest(self._folder / "locks", kept)
