"""A folder or file of the operator's, pinned by its content: evaluation reads a copy that stays."""

import asyncio
import hashlib
import os
import threading
from pathlib import Path

from chandlery.errors import SourceUnavailableError
from chandlery.sources.folder_content import ContentChangedError, Copied, FolderContent, Snapshot
from chandlery.sources.pins import Resolved
from chandlery.sources.trees import SourceTrees

# Copies that are begun before a folder counts as one that never stands still.
_TRIES = 5
_LARGEST_FILE = 64 << 20


class OperatorFolder:
    """What a path holds now, and its copy among the trees; `text` is what errors call it."""

    def __init__(self, path: Path, trees: SourceTrees, text: str) -> None:
        self._path = path
        self._trees = trees
        self._text = text
        self._content = FolderContent(path)
        self._last: Copied | None = None

    async def resolve(self, _reference: str = "") -> Resolved:
        """Return the content's revision, once its tree is there. Raises `SourceUnavailableError`."""
        for _ in range(_TRIES):
            try:
                # Both at once: it is done for every pull.
                snapshot = await asyncio.to_thread(self._look)
                return await (self._file() if snapshot is None else self._folder(snapshot))
            except (ContentChangedError, FileNotFoundError) as error:
                # A file that goes while the folder is looked at is a change; if the folder itself is gone, it
                # isn't there the next time either.
                changed = error
            except OSError as error:
                raise self._unavailable(error) from error
        if isinstance(changed, OSError):
            raise self._unavailable(changed) from changed
        raise SourceUnavailableError(self._text, f"{self._path} changed each time that it was copied")

    def _look(self) -> Snapshot | None:
        """Return what stands below the folder; None if it is a file."""
        return None if self._path.is_file() else self._content.snapshot()

    async def _folder(self, snapshot: Snapshot) -> Resolved:
        tree = self._trees.get(snapshot.revision)
        if tree is None:
            tree = await self._trees.make(snapshot.revision, lambda target: self._copy(snapshot, target))
        self._last = Copied(tree, snapshot)
        return Resolved(snapshot.revision)

    async def _copy(self, snapshot: Snapshot, target: Path) -> None:
        stopped = threading.Event()
        try:
            await asyncio.to_thread(self._content.copy, snapshot, target, self._last, stopped)
        finally:
            # A thread can't be cancelled.
            stopped.set()

    async def _file(self) -> Resolved:
        content = await asyncio.to_thread(self._read)
        revision = hashlib.sha256(b"file " + content).hexdigest()

        async def write(target: Path) -> None:
            await asyncio.to_thread(target.write_bytes, content)

        if self._trees.get(revision) is None:
            await self._trees.make(revision, write)
        return Resolved(revision)

    def _read(self) -> bytes:
        with self._path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise SourceUnavailableError(self._text, f"{self._path} is larger than {_LARGEST_FILE >> 20} MiB")
        return content

    def _unavailable(self, error: OSError) -> SourceUnavailableError:
        where = os.fsdecode(error.filename or self._path)
        return SourceUnavailableError(self._text, f"{where}: {error.strerror}")
