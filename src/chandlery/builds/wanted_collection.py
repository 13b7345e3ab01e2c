"""How a build in any process tells the one that collects garbage not to wait for its time.

    <data folder>/collect-now   there while somebody wants it

A build that was refused or stopped leaves in Nix's store what it has fetched and built by then, and nothing
needs it. What can't be written is forgotten: the collector comes anyway.
"""

from contextlib import suppress
from pathlib import Path


class WantedCollection:
    """The wish for a garbage collection in a data folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "collect-now"

    def want(self) -> None:
        """Ask for a collection; once more changes nothing."""
        with suppress(OSError):
            self._file.touch()

    @property
    def is_wanted(self) -> bool:
        """Return whether somebody wants one."""
        return self._file.exists()

    def take(self) -> bool:
        """Return whether somebody wants one; from now on nobody does."""
        try:
            self._file.unlink()
        except OSError:
            return False
        return True
