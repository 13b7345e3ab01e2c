"""A Nix package set in a folder of this machine, `path!<folder>`: its revision is its content's hash.

The folder is looked at for every pull, since whoever edits it wants to see what came of it. Evaluation reads
a copy of exactly what was pinned, which also gives the tag of an older revision, as long as its copy is kept.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from chandlery.errors import ReferenceNotFoundError, SourceUnavailableError
from chandlery.image.name import LATEST
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.documents import Platform
from chandlery.sources.arguments import LOCAL_LIMITS, PinnedArguments, SetArguments
from chandlery.sources.operator_folder import OperatorFolder
from chandlery.sources.pin_file import PinFile
from chandlery.sources.pins import Pins
from chandlery.sources.trees import SourceTrees

_REVISION = re.compile(r"[0-9a-f]{12,64}")


class PathSource:
    """One folder; copies of what it held are kept in `data`."""

    kind = "path"

    def __init__(self, folder: Path, data: Path, arguments: SetArguments) -> None:
        self.location = str(folder)
        self.text = f"path!{folder}"
        self._arguments = arguments
        self._trees = SourceTrees(data, self.text)
        operator_folder = OperatorFolder(folder, self._trees, self.text)
        self._pin_file = data / "pins.json"
        self._pins = Pins(PinFile(self._pin_file), self.text, operator_folder.resolve, LOCAL_LIMITS)

    @property
    def platforms(self) -> tuple[Platform, ...]:
        """See `PackageSource.platforms`."""
        return (Platform.of_host(),)

    @property
    def was_pinned(self) -> bool:
        """Whether the folder was ever pinned, so that there is something to serve without it."""
        return self._pin_file.exists()

    def serves(self, location: str) -> bool:
        """See `PackageSource.serves`."""
        return location == self.location

    async def upstreams(self) -> Sequence[str]:
        """See `PackageSource.upstreams`."""
        return ()

    async def pin(self, reference: str, platform: Platform) -> PinnedSource:
        """See `PackageSource.pin`; a tag is `latest` or that of a revision whose copy is kept."""
        arguments = await self._arguments.pin()
        if reference != LATEST:
            kept = self._trees.revision(reference) if _REVISION.fullmatch(reference) else None
            found = None if kept is None else self._at(kept, arguments)
            if found is not None:
                return found
        pin = await self._pins.get(LATEST)
        found = self._at(pin.revision, arguments, pin.stale)
        if found is None:
            raise SourceUnavailableError(self.text, pin.stale or "its copy was removed just now")
        if reference != LATEST and not (
            _REVISION.fullmatch(reference) and pin.revision.startswith(reference)
        ):
            raise ReferenceNotFoundError(
                self.text, reference, f"there is {LATEST!r}, and {found.tag!r} for what the folder holds now"
            )
        return found

    def chosen_by(self, reference: str, pin: PinnedSource | None = None) -> str:
        """See `PackageSource.chosen_by`: a tag chooses a revision of the same folder."""
        return ""

    async def at(self, revision: str, platform: Platform) -> PinnedSource | None:
        """See `PackageSource.at`."""
        if _REVISION.fullmatch(revision) is None:
            return None
        return self._at(revision, await self._arguments.pin())

    async def refresh(self, max_age: float) -> None:
        """See `PackageSource.refresh`: a folder that changed is copied before somebody waits for it."""
        await self._pins.refresh(max_age, always=(LATEST,))

    def keep(self, revisions: Sequence[str]) -> None:
        """See `PackageSource.keep`."""
        self._trees.keep(revisions)

    async def close(self) -> None:
        """See `PackageSource.close`."""
        await self._pins.close()

    def _at(self, revision: str, arguments: PinnedArguments, stale: str = "") -> PinnedSource | None:
        tree = self._trees.get(revision)
        return None if tree is None else arguments.source(self.kind, self.location, revision, tree, stale)
