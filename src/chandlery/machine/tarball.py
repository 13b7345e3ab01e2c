"""Unpacking a source tarball that comes from elsewhere, while it comes.

What is written is a tree of folders, files and links, below one folder, whatever the tarball says: a name or
a link that leads out of it, a device, or more than the limits allow ends it with `TarballError`. The one
folder that such tarballs have around everything (`nixpkgs-<revision>/`) is left out.

The whole thing may be refused at its last byte. So unpack into a folder that nobody uses yet.
"""

import gzip
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

import zstandard

from chandlery.errors import ChandleryError, StorageFullError
from chandlery.machine.disk_errors import FULL

# Bytes of a file that are in memory at once; what `tarfile` asks for in one piece beyond its blocks is a
# header (long names, PAX records), so that none is as large as it says.
_PIECE = 1 << 20

# Bytes that a zstd frame may ask a decompressor to remember; `zstd --ultra -22` asks for this much.
_LARGEST_WINDOW = 128 << 20


_DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class TarballError(ChandleryError):
    """A tarball can't be unpacked: it isn't one, it is cut off, or it holds what it must not."""


@dataclass(frozen=True, slots=True)
class TarballLimits:
    """How much a tarball may hold: bytes when it is unpacked, and files, folders and links together.

    nixpkgs has about 300 MB in 100,000 of them.
    """

    size: int = 4 << 30
    entries: int = 1_000_000


def unpack(read: Callable[[], bytes], folder: Path, limits: TarballLimits | None = None) -> str:
    """Unpack a tarball (gzip, xz, zstd or none, by its first bytes) into `folder`, which is empty.

    `read` gives the next bytes, and none at the end. Gives the commit that the tarball says it was made of,
    as `git archive` notes it, or an empty text. Raises `TarballError`, `StorageFullError`.
    """
    limits = limits or TarballLimits()
    tree = _Tree(folder, limits.entries)
    try:
        stream = _Stream(read, limits.size)
        # Not tarfile's own "r|": it reads a header of any size into memory.
        with tarfile.TarFile.open(fileobj=cast("IO[bytes]", stream), mode="r:", encoding="utf-8") as archive:
            for member in archive:
                tree.add(member, archive)
                # tarfile remembers every member, for calls that aren't used here.
                archive.members = []  # type: ignore[attr-defined]
            tree.finish()
            stream.drain()
            comment: str = archive.pax_headers.get("comment", "")
    # What tarfile makes of headers that contradict each other is not always an error of its own.
    except (*_DAMAGED, ValueError, RecursionError) as error:
        raise TarballError(f"it can't be unpacked: {error or type(error).__name__}") from error
    except OSError as error:
        if error.errno in FULL:
            raise StorageFullError(str(folder)) from error
        raise TarballError(f"it can't be unpacked: {error.strerror or error}") from error
    return comment


class _Tree:
    """The folder that a tarball is unpacked into."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._root = os.fsencode(folder)
        self._limit = limit
        self._entries = 0
        self._top: bytes | None = None
        # Real folders below the root, each known not to be a link: what is written is written into these.
        self._folders = {b""}
        self._links: list[bytes] = []

    def add(self, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        """Write one entry."""
        self._entries += 1
        if self._entries > self._limit:
            raise TarballError(f"it has more than {self._limit} entries")
        name = self._below_top(member.name)
        if member.isdir():
            self._make_folder(name)
            return
        if not name:
            raise TarballError(f"{member.name!r} stands beside its one folder")
        self._make_folder(os.path.dirname(name))  # noqa: PTH120
        path = os.path.join(self._root, name)  # noqa: PTH118
        try:
            if member.isreg() and not member.issparse():
                self._write(path, member, archive)
            elif member.issym():
                os.symlink(_encoded(member.linkname), path)  # noqa: PTH211
                self._links.append(path)
            elif member.islnk():
                self._link(self._below_top(member.linkname), path, member)
            else:
                raise TarballError(f"{member.name!r} is neither a file, a folder nor a link")
        except FileExistsError as error:
            raise TarballError(f"{member.name!r} is in it twice") from error

    def finish(self) -> None:
        """See that there was something, and that no link leads out of the tree."""
        if self._top is None:
            raise TarballError("there is nothing in it")
        # Only now: where a link leads depends on the links on its way.
        inside = os.path.realpath(self._root)
        for link in self._links:
            target = os.path.realpath(link)
            absolute = os.readlink(link).startswith(b"/")  # noqa: PTH115
            if absolute or not (target == inside or target.startswith(inside + b"/")):
                shown = os.fsdecode(os.path.relpath(link, self._root))
                raise TarballError(f"the link {shown!r} leads out of it")

    def _below_top(self, text: str) -> bytes:
        """Return a name without the one folder around everything."""
        name = _encoded(text)
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        if name.startswith(b"/") or b".." in parts or b"\0" in name:
            raise TarballError(f"{text!r} leads out of it")
        if not parts:
            return b""
        self._top = self._top or parts[0]
        if parts[0] != self._top:
            raise TarballError(f"{text!r} stands beside {os.fsdecode(self._top)!r}, its one folder")
        return b"/".join(parts[1:])

    def _make_folder(self, name: bytes) -> None:
        if name in self._folders:
            return
        self._make_folder(os.path.dirname(name))  # noqa: PTH120
        try:
            os.mkdir(os.path.join(self._root, name), 0o755)  # noqa: PTH102, PTH118
        except FileExistsError as error:
            raise TarballError(f"{os.fsdecode(name)!r} is a folder, and something else") from error
        self._folders.add(name)

    def _write(self, path: bytes, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        content = archive.extractfile(member)
        assert content is not None  # noqa: S101 (it is a file)
        # Of the mode, only whether its owner may run it: no setuid, nothing that others can write.
        mode = 0o755 if member.mode & 0o100 else 0o644
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb", 0) as file:
            left = member.size
            while left:
                piece = content.read(min(left, _PIECE))
                if not piece:
                    raise EOFError("it is cut off")
                file.write(piece)
                left -= len(piece)

    def _link(self, target: bytes, path: bytes, member: tarfile.TarInfo) -> None:
        existing = os.path.join(self._root, target)  # noqa: PTH118
        # Through no link, and to none: both would have to be followed.
        if os.path.dirname(target) not in self._folders or not _is_file(existing):  # noqa: PTH120
            raise TarballError(f"the link {member.name!r} leads to nothing in it")
        os.link(existing, path)


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _is_file(path: bytes) -> bool:
    return os.path.isfile(path) and not os.path.islink(path)  # noqa: PTH113, PTH114


class _Source:
    """What `read` gives, as a file that can only be read."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read
        self._buffer = b""
        self._ended = False

    def peek(self, size: int) -> bytes:
        """Return the next bytes, fewer than `size` only at the end, and leave them to be read."""
        while len(self._buffer) < size and not self._ended:
            piece = self._read()
            self._ended = not piece
            self._buffer += piece
        return self._buffer[:size]

    def read(self, size: int = -1) -> bytes:
        """Return bytes, at most `size`; none at the end."""
        if not self._buffer:
            self.peek(1)
        given = self._buffer if size < 0 else self._buffer[:size]
        self._buffer = self._buffer[len(given) :]
        return given


def _decompressed(source: _Source) -> _Readable:
    first = source.peek(6)
    if first.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=cast("IO[bytes]", source))
    if first == b"\xfd7zXZ\0":
        return lzma.LZMAFile(cast("IO[bytes]", source))
    if first.startswith(b"\x28\xb5\x2f\xfd"):
        reader = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        return reader.stream_reader(cast("IO[bytes]", source), read_across_frames=True)
    return source


class _Stream:
    """A tar as a file that is read from its beginning to its end, and never back."""

    def __init__(self, read: Callable[[], bytes], limit: int) -> None:
        self._file = _decompressed(_Source(read))
        self._limit = limit
        self._position = 0
        self._buffer = b""
        self._begin = 0  # of what hasn't been given, in the buffer
        self.last = b""

    def read(self, size: int) -> bytes:
        """Return `size` bytes, fewer only at the end."""
        if size > _PIECE:
            raise TarballError(f"it has a header of {size} bytes")
        while len(self._buffer) - self._begin < size and self._fill():
            pass
        self.last = self._buffer[self._begin : self._begin + size]
        self._begin += len(self.last)
        self._position += len(self.last)
        return self.last

    def tell(self) -> int:
        """Return how much was read, in bytes."""
        return self._position

    def seek(self, position: int) -> int:
        """Go forwards."""
        if position < self._position:
            raise TarballError("its headers contradict each other")
        while self._position < position:
            if not self.read(min(position - self._position, _PIECE)):
                raise EOFError("it is cut off")
        return self._position

    def drain(self) -> None:
        """Read to the end, where compressed data has its checksum."""
        # tarfile takes whatever is no header for the end, and a tar that was cut off between two files is one
        # for it as well. The end is two blocks of zeros (POSIX, pax, "ustar Interchange Format").
        if self.last != bytes(tarfile.BLOCKSIZE):
            raise EOFError("it is cut off, or damaged")
        while self.read(_PIECE):
            pass

    def _fill(self) -> bool:
        piece = self._file.read(_PIECE)
        self._buffer = self._buffer[self._begin :] + piece
        self._begin = 0
        if self._position + len(self._buffer) > self._limit:
            raise TarballError(f"it has more than {self._limit} bytes when it is unpacked")
        return bool(piece)
