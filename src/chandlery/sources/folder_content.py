"""What stands below a folder: its hash, which is its revision, and a copy that is known to have it.

Names, contents, links and the executable bit count, and nothing else does. `.git` at the top says nothing
about the packages; fifos, sockets and devices hold nothing that a package set could read, and are left out.
"""

import errno
import hashlib
import io
import os
import stat
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_BLOCK = 1 << 20

# Clocks of file systems are coarse.
_COARSE = 2.0


class ContentChangedError(Exception):
    """A folder changed while it was copied."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What stood below a folder, by relative paths; files as `x` or `-` and the sha256 of their content."""

    revision: str
    folders: tuple[bytes, ...] = ()
    files: dict[bytes, bytes] = field(default_factory=dict)
    links: dict[bytes, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Copied:
    """A copy that nobody changes, and what it holds."""

    tree: Path
    snapshot: Snapshot


class FolderContent:
    """A folder that may change; a file of it that doesn't is read once. Blocking: for a thread.

    A file that had changed less than `coarse` seconds before it was read may have changed again without
    showing it, so it is read once more the next time.
    """

    def __init__(self, folder: Path, coarse: float = _COARSE) -> None:
        self._root = os.fsencode(folder)
        self._coarse = coarse
        self._known: dict[bytes, tuple[tuple[int, ...], bytes]] = {}

    def snapshot(self) -> Snapshot:
        """Look at everything, and read what changed. Raises `OSError`."""
        state = hashlib.sha256()
        known: dict[bytes, tuple[tuple[int, ...], bytes]] = {}
        folders, files, links = [], {}, {}
        pending = [b""]
        while pending:
            relative = pending.pop()
            path = os.path.join(self._root, relative) if relative else self._root  # noqa: PTH118
            with os.scandir(path) as entries:
                in_order = sorted(entries, key=lambda entry: entry.name)
            for entry in in_order:
                name = relative + b"/" + entry.name if relative else entry.name
                if name == b".git":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name)
                    folders.append(name)
                    content = b"directory"
                elif entry.is_symlink():
                    links[name] = target = os.readlink(entry.path)  # noqa: PTH115
                    content = b"link " + target
                else:
                    status = entry.stat(follow_symlinks=False)
                    if not stat.S_ISREG(status.st_mode):
                        continue
                    content = files[name] = self._file(entry.path, name, status, known)
                state.update(b"%d:%s%d:%s" % (len(name), name, len(content), content))
        self._known = known
        return Snapshot(state.hexdigest(), tuple(folders), files, links)

    def copy(
        self, snapshot: Snapshot, target: Path, earlier: Copied | None, stopped: threading.Event
    ) -> None:
        """Copy exactly what a snapshot says; a file that an earlier copy has as well becomes a link to that.

        Never a link to the folder's own, which somebody may write to. Raises `ContentChangedError` if the
        folder isn't as it was, `OSError` if the copy can't be written, and ends early once `stopped` is set.
        """
        top = os.fsencode(target)
        # Whatever the umask is, others may not write to what stays as it is.
        os.mkdir(top, 0o755)  # noqa: PTH102
        for name in snapshot.folders:
            os.mkdir(top + b"/" + name, 0o755)  # noqa: PTH102
        for name, link in snapshot.links.items():
            os.symlink(link, top + b"/" + name)  # noqa: PTH211
        old, old_files = (b"", {}) if earlier is None else (os.fsencode(earlier.tree), earlier.snapshot.files)
        for name, content in snapshot.files.items():
            if stopped.is_set():
                raise ContentChangedError
            if old_files.get(name) == content:
                # It may have been removed meanwhile, or have as many links as a file can.
                with suppress(OSError):
                    os.link(old + b"/" + name, top + b"/" + name)
                    continue
            self._copy_file(name, content, top + b"/" + name)

    def _file(
        self,
        path: bytes,
        name: bytes,
        status: os.stat_result,
        known: dict[bytes, tuple[tuple[int, ...], bytes]],
    ) -> bytes:
        # The time of a change of the inode, which nobody can set, tells what was written with an old mtime.
        signature = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        found = self._known.get(name)
        if found is None or found[0] != signature:
            began = time.time()
            with _opened(path) as file:
                digest = hashlib.sha256()
                while block := file.read(_BLOCK):
                    digest.update(block)
            found = (signature, digest.digest())
            if began - status.st_ctime < self._coarse:
                return _content(status, found[1])
        known[name] = found
        return _content(status, found[1])

    def _copy_file(self, name: bytes, content: bytes, target: bytes) -> None:
        digest = hashlib.sha256()
        try:
            source = _opened(self._root + b"/" + name)
        except OSError as error:
            raise ContentChangedError from error
        with source, open(target, "xb", buffering=0) as copy:  # noqa: PTH123
            status = os.fstat(source.fileno())
            while True:
                try:
                    block = source.read(_BLOCK)
                except OSError as error:
                    raise ContentChangedError from error
                if not block:
                    break
                digest.update(block)
                _write(copy.fileno(), block)
            if status.st_mode & stat.S_IXUSR:
                os.fchmod(copy.fileno(), 0o755)
        if _content(status, digest.digest()) != content:
            raise ContentChangedError


def _content(status: os.stat_result, digest: bytes) -> bytes:
    return (b"x" if status.st_mode & stat.S_IXUSR else b"-") + digest


def _opened(path: bytes) -> io.FileIO:
    """Open what may just have become something else: a fifo would wait for who writes, a link lead away."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file any more", os.fsdecode(path))
    return io.FileIO(descriptor)


def _write(descriptor: int, block: bytes) -> None:
    """Write a block whole; a write may be cut short, as by a full disk, and the next one says why."""
    written = os.write(descriptor, block)
    while written < len(block):
        written += os.write(descriptor, block[written:])
