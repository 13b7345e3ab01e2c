"""What stands in a store path, entry by entry, in the order of a layer.

Nothing here depends on where it runs: paths are bytes, so no locale matters; the order is that of the names'
bytes, never the file system's; and of a file's mode only one bit counts, whether its owner may execute it, as
in a NAR. Entries have the paths of the image, wherever on this machine the store is.

A store path chooses its place in an image. By default it stands at its own path. If its file
`nix-support/image-layout` says `root`, its content stands at `/` instead, and `nix-support` stays out;
`nix-support/permissions` then gives modes and owners that a Nix store can't keep, a line each:
`MODE UID GID PATH`, as in `4755 0 0 usr/bin/su`. Lines for paths that don't exist are ignored.

Entries are ordered by the parts of their paths, so a directory is followed by all that is in it: `lib`,
`lib/a`, `lib-2`. (By whole paths, `lib-2` would come between the others, because `-` is less than `/`.)
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple, Protocol

from chandlery.errors import StorePathContentError, UnsupportedEntryError
from chandlery.nix.closure import StorePath

_STORE = b"/nix/store/"
_SUPPORT = b"nix-support"
_PERMISSION = re.compile(rb"([0-7]{1,5}) ([0-9]{1,10}) ([0-9]{1,10}) ([^/].*)")
# As the kernel: more links than this are taken for a loop (path_resolution(7)).
_MOST_LINKS = 40


class EntryKind(Enum):
    """What a layer can hold; hard links are files of their own."""

    DIRECTORY = auto()
    FILE = auto()
    SYMLINK = auto()


class Layout(Enum):
    """Where a store path's content stands in an image."""

    STORE = b"store"
    ROOT = b"root"


class Entry(NamedTuple):
    """One file, directory or symlink of a layer. A tuple, because layers have many and it is made fast."""

    path: bytes  # relative to the image's root, without a slash at its start or end
    kind: EntryKind
    mode: int  # the permission bits, 0 to 0o7777
    uid: int = 0
    gid: int = 0
    size: int = 0  # bytes of a file's content
    target: bytes = b""  # where a symlink leads
    source: Path | bytes | None = None  # a file's content: where it is on disk, or the bytes themselves

    @classmethod
    def directory(cls, path: bytes, mode: int = 0o755, uid: int = 0, gid: int = 0) -> "Entry":
        """Make a directory."""
        return cls(path, EntryKind.DIRECTORY, mode, uid, gid)

    @classmethod
    def file(cls, path: bytes, content: bytes, mode: int = 0o644, uid: int = 0, gid: int = 0) -> "Entry":
        """Make a file of some bytes."""
        return cls(path, EntryKind.FILE, mode, uid, gid, len(content), source=content)

    @classmethod
    def symlink(cls, path: bytes, target: bytes, uid: int = 0, gid: int = 0) -> "Entry":
        """Make a symlink; its mode means nothing on Linux."""
        return cls(path, EntryKind.SYMLINK, 0o777, uid, gid, target=target)

    @property
    def is_directory(self) -> bool:
        """Tell a directory from the rest."""
        return self.kind is EntryKind.DIRECTORY

    @property
    def order(self) -> bytes:
        """What entries are sorted by: no name has a NUL, so it puts shorter names and their content first."""
        return self.path.replace(b"/", b"\0")


class Reader(Protocol):
    """Where store paths are read from. Paths are relative to the store path; links are not followed."""

    def layout(self, store_path: StorePath) -> Layout:
        """Say where the content stands in an image."""
        ...

    def entries(self, store_path: StorePath) -> Iterator[Entry]:
        """Return everything that the store path adds to an image, in order, parent directories included."""
        ...

    def entry(self, store_path: StorePath, path: bytes) -> Entry | None:
        """Return what stands at one path; None if nothing does. The empty path is the store path itself."""
        ...

    def names(self, store_path: StorePath, path: bytes) -> Sequence[bytes]:
        """Return the sorted names in a directory; none if it isn't a directory."""
        ...

    def read(self, store_path: StorePath, path: bytes) -> bytes | None:
        """Return a whole small file; None if it isn't one."""
        ...


@dataclass(frozen=True, slots=True)
class _Modes:
    """The modes of a layout."""

    directory: int
    executable: int
    file: int


# Nix takes the write bits away in its store; at / they are wanted.
_MODES = {Layout.STORE: _Modes(0o555, 0o555, 0o444), Layout.ROOT: _Modes(0o755, 0o755, 0o644)}


class StoreReader:
    """Reads a Nix store on this machine's file system; the store need not be at `/nix/store`.

    Raises `UnsupportedEntryError` for what no layer can hold, and `StorePathContentError` for a file below
    `nix-support` that can't be understood.
    """

    def __init__(self, store_root: Path) -> None:
        """Take the folder that holds the `<hash>-<name>` entries."""
        self._store_root = os.fsencode(store_root)

    def layout(self, store_path: StorePath) -> Layout:
        """Say where the content stands in an image."""
        said = self.read(store_path, b"nix-support/image-layout")
        if said is None:
            return Layout.STORE
        try:
            return Layout(said.removesuffix(b"\n"))
        except ValueError:
            raise StorePathContentError(
                store_path.text,
                "nix-support/image-layout",
                f"no layout: {said[:40]!r}, expected root or store",
            ) from None

    def entries(self, store_path: StorePath) -> Iterator[Entry]:
        """Yield everything that the store path adds to an image, in order, parent directories included."""
        base_name = os.fsencode(store_path.base_name)
        if self.layout(store_path) is Layout.STORE:
            yield Entry.directory(b"nix")
            yield Entry.directory(b"nix/store")
            yield from self._walk(base_name, b"nix/store/" + base_name, _MODES[Layout.STORE])
            return
        permissions = self._permissions(store_path)
        inside_support = _SUPPORT + b"/"
        for entry in self._walk(base_name, b"", _MODES[Layout.ROOT]):
            if entry.path == _SUPPORT or entry.path.startswith(inside_support):
                continue
            given = permissions.get(entry.path)
            if given is None:
                yield entry
            else:
                mode, uid, gid = given
                is_link = entry.kind is EntryKind.SYMLINK
                yield entry._replace(mode=entry.mode if is_link else mode, uid=uid, gid=gid)

    def entry(self, store_path: StorePath, path: bytes) -> Entry | None:
        """Return what stands at one path, with the modes of the store layout; None if nothing does."""
        found = self._find(store_path, path)
        if found is None:
            return None
        physical, status = found
        return _entry(path, status.st_mode, status.st_size, physical, _MODES[Layout.STORE])

    def names(self, store_path: StorePath, path: bytes) -> Sequence[bytes]:
        """Return the sorted names in a directory; none if it isn't a directory."""
        found = self._find(store_path, path)
        return sorted(os.listdir(found[0])) if found and stat.S_ISDIR(found[1].st_mode) else ()

    def read(self, store_path: StorePath, path: bytes) -> bytes | None:
        """Return a whole small file; None if it isn't one."""
        found = self._find(store_path, path)
        if found is None or not stat.S_ISREG(found[1].st_mode):
            return None
        with open(found[0], "rb") as file:  # noqa: PTH123 (bytes)
            return file.read()

    def _find(self, store_path: StorePath, path: bytes) -> tuple[bytes, os.stat_result] | None:
        """Find a path on this machine, without going through symlinks: they lead where the image says."""
        base = b"%s/%s" % (self._store_root, os.fsencode(store_path.base_name))
        whole = b"%s/%s" % (base, path) if path else base
        # Most paths that are asked for don't exist, and this is all that it takes to know.
        try:
            status = os.lstat(whole)
        except (OSError, ValueError):
            return None
        cut = len(whole)
        while cut > len(base):
            cut = whole.rfind(b"/", 0, cut)
            if stat.S_ISLNK(os.lstat(whole[:cut]).st_mode):
                return None
        return whole, status

    def _walk(self, base_name: bytes, archived: bytes, modes: _Modes) -> Iterator[Entry]:
        """Yield what is at and below a store path, as paths that start with `archived`.

        The root of the image (an empty path) is not an entry. A stack, not recursion: trees may be deep.
        """
        top = b"%s/%s" % (self._store_root, base_name)
        found = os.lstat(top)
        if archived:
            yield _entry(archived, found.st_mode, found.st_size, top, modes)
        if not stat.S_ISDIR(found.st_mode):
            if not archived:
                raise UnsupportedEntryError(os.fsdecode(base_name), "it is no directory, so it can't be at /")
            return
        cut = len(top) + 1
        prefix = archived + b"/" if archived else b""
        pending = _children(top)
        while pending:
            child = pending.pop()
            path = prefix + child.path[cut:]
            if child.name.startswith(b".wh."):
                # image-spec, layer.md, "Whiteouts": such a name says that a lower layer's file is gone.
                raise UnsupportedEntryError(os.fsdecode(path), "its name would be read as a whiteout")
            if child.is_dir(follow_symlinks=False):
                yield Entry(path, EntryKind.DIRECTORY, modes.directory)
                pending += _children(child.path)
            else:
                found = child.stat(follow_symlinks=False)
                yield _entry(path, found.st_mode, found.st_size, child.path, modes)

    def _permissions(self, store_path: StorePath) -> Mapping[bytes, tuple[int, int, int]]:
        """Read `nix-support/permissions`: mode, uid and gid by path; what isn't there is never asked for."""
        content = self.read(store_path, b"nix-support/permissions") or b""
        permissions = {}
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line:
                continue
            match = _PERMISSION.fullmatch(line)
            if match is None or int(match[1], 8) > 0o7777:
                raise StorePathContentError(
                    store_path.text,
                    "nix-support/permissions",
                    f"line {number}: expected MODE UID GID PATH, as in 4755 0 0 usr/bin/su: {line[:80]!r}",
                )
            permissions[match[4]] = (int(match[1], 8), int(match[2]), int(match[3]))
        return permissions


def join(folder: bytes, name: bytes) -> bytes:
    """Return the path of a name in a folder; the empty folder is the root."""
    return b"/".join(filter(None, (folder, name)))


def follow(reader: Reader, store_path: StorePath, path: bytes) -> tuple[StorePath, bytes] | None:
    """Return where a path leads when links inside the Nix store are followed, as a container would.

    None if it leads to nothing, or out of the store.
    """
    pending = [*reversed(path.split(b"/")), os.fsencode(store_path.base_name)]
    parts: list[bytes] = []  # where we are, below /nix/store
    links = 0
    while pending:
        part = pending.pop()
        if part in (b"", b"."):
            continue
        if part == b"..":
            parts = parts[:-1]
            continue
        parts.append(part)
        found = _find(reader, parts)
        if found is None:
            return None
        if found.kind is EntryKind.SYMLINK:
            links += 1
            absolute = found.target.startswith(b"/")
            if links > _MOST_LINKS or (absolute and not found.target.startswith(_STORE)):
                return None
            parts = [] if absolute else parts[:-1]
            pending += reversed(found.target.removeprefix(_STORE).split(b"/"))
    return (_store_path(parts[0]), b"/".join(parts[1:])) if parts else None


def _find(reader: Reader, parts: Sequence[bytes]) -> Entry | None:
    """Return what stands at a path below /nix/store; None also if its first part can't be a store path."""
    try:
        return reader.entry(_store_path(parts[0]), b"/".join(parts[1:]))
    except ValueError:
        return None


def _store_path(base_name: bytes) -> StorePath:
    return StorePath.parse(os.fsdecode(_STORE + base_name))


def _children(folder: bytes) -> "list[os.DirEntry[bytes]]":
    """Return a folder's entries, last name first."""
    with os.scandir(folder) as found:
        return sorted(found, key=_name, reverse=True)


def _name(child: "os.DirEntry[bytes]") -> bytes:
    return child.name


def _entry(path: bytes, mode: int, size: int, physical: bytes, modes: _Modes) -> Entry:
    """Make an entry from what lstat(2) says."""
    if stat.S_ISREG(mode):
        permissions = modes.executable if mode & stat.S_IXUSR else modes.file
        # By position: by name it takes half as long again, and most of what layers have is files.
        return Entry(path, EntryKind.FILE, permissions, 0, 0, size, b"", Path(os.fsdecode(physical)))
    if stat.S_ISLNK(mode):
        # Not Path.readlink, which would tidy the target up.
        return Entry.symlink(path, os.readlink(physical))  # noqa: PTH115
    if stat.S_ISDIR(mode):
        return Entry(path, EntryKind.DIRECTORY, modes.directory)
    raise UnsupportedEntryError(os.fsdecode(path), "it is neither a file, a directory nor a symlink")
