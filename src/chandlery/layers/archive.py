"""The only writer of layer tars: entries in order, to bytes that never vary.

The format is POSIX ustar, by hand (pax(1), "ustar Interchange Format"; OCI image-spec, layer.md):

- every time is 1, as in the Nix store; there are no user and group names, only numbers; nothing else comes
  from this machine
- names are the raw bytes of the path, a directory's with a slash at its end. More than 100 bytes are split
  over the fields `prefix` and `name`
- what a field can't hold (a longer path or link target, 8 GiB or more, a uid or gid over 0o7777777) is in a
  PAX header before the entry, and nothing else is. PAX text is UTF-8; if a path isn't, `hdrcharset=BINARY`
  says so
- two blocks of zeros end the archive; it is not padded to a larger record
- paths strictly ascend (`Entry.order`), so a directory comes before its content and nothing comes twice

Store paths that share a layer are merged as if each had a layer of its own, stacked in their sorted order:
for the same path the last one wins, and a file or symlink in place of a directory hides what was in that
directory.

`ARCHIVE_VERSION` is part of every layer's key. It goes up with any change here or in `layers.store_reader`
that changes bytes, and so do the golden digests in the tests, with a line in CHANGELOG.md.
"""

import errno
import hashlib
import heapq
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from chandlery.errors import StorageError, StorageFullError, UnsupportedEntryError
from chandlery.layers.compression import COMPRESSIONS, Compression
from chandlery.layers.prefetch import ahead
from chandlery.layers.store_reader import Entry, EntryKind, Reader, StoreReader
from chandlery.nix.closure import StorePath
from chandlery.nix.pinned_source import OWN_DOMAIN
from chandlery.oci.digest import Digest
from chandlery.oci.documents import Descriptor, PackedLayer

ARCHIVE_VERSION = 1

# Every piece that leaves here but the last has this size: compressed bytes depend on it (see `compression`).
BLOCK_SIZE = 1 << 20
# So many wait between reading and compressing, and between that and writing.
_BLOCKS_AHEAD = 4

_RECORD = 512
_END = bytes(2 * _RECORD)
_PADDING = tuple(bytes(length) for length in range(_RECORD))
_MTIME = 1
_LARGEST_SIZE = 0o77777777777
_LARGEST_ID = 0o7777777
_NAME = 100
_PREFIX = 155

# name; mode, uid, gid, size and mtime; checksum, typeflag; linkname; magic to devminor; prefix, to 512 bytes
_HEADER = struct.Struct(f"{_NAME}s 48s 8s c {_NAME}s 88s {_PREFIX}s 12x")
_NUMBERS = b"%07o\0%07o\0%07o\0%011o\0%011o\0"
# No user and group name; device numbers are given, though only devices have them, as GNU tar and Go do.
_CONSTANT = b"ustar\x0000" + bytes(64) + b"0000000\x000000000\x00"
# The checksum is computed as if its own field held spaces.
_CONSTANT_SUM = sum(_CONSTANT) + sum(b" " * 8)

_TYPE = {EntryKind.FILE: b"0", EntryKind.SYMLINK: b"2", EntryKind.DIRECTORY: b"5"}
_PAX_TYPE = b"x"
_PAX_NAME = b"PaxHeader"


def layer_key(store_paths: Iterable[StorePath], compression: Compression, domain: str = OWN_DOMAIN) -> str:
    """Return the key under which a layer of these store paths is remembered: all that its bytes depend on.

    What a store path holds is known of one store alone, hence the trust domain (`PinnedSource.trust_domain`).
    """
    texts = sorted(path.text for path in store_paths)
    domains = [domain] if domain != OWN_DOMAIN else []
    return Digest.of_parts([str(ARCHIVE_VERSION), compression.fingerprint, *domains, *texts]).hex


def pack_store_paths(
    store_root: Path, store_paths: Sequence[StorePath], compression: str, destination: Path
) -> PackedLayer:
    """Pack store paths into one layer at `destination`. All arguments can be sent to another process.

    Raises what `pack` and `StoreReader` raise.
    """
    reader = StoreReader(store_root)
    return pack(layer_entries(reader, store_paths), COMPRESSIONS[compression], destination)


def layer_entries(reader: Reader, store_paths: Iterable[StorePath]) -> Iterator[Entry]:
    """Return what a layer of these store paths holds, in order; their own order doesn't matter."""
    return merge([reader.entries(path) for path in sorted(set(store_paths))])


def pack(entries: Iterable[Entry], compression: Compression, destination: Path) -> PackedLayer:
    """Write a layer in one pass: archive, compress, and digest both; nothing is synced.

    Reading, compressing and writing have a thread each, so one large layer keeps two processors busy, and
    neither waits for the disk.

    If it fails, for whatever reason, `destination` doesn't exist. Raises `StorageFullError` when there is no
    space left, `StorageError` for any other trouble with reading or writing, and what `archive` raises.
    """
    try:
        return _pack(entries, compression, destination)
    except BaseException as error:
        destination.unlink(missing_ok=True)
        if isinstance(error, OSError):
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFullError(str(destination.parent)) from error
            raise StorageError(f"a layer could not be packed: {error}") from error
        raise


def _pack(entries: Iterable[Entry], compression: Compression, destination: Path) -> PackedLayer:
    archive_sha256 = hashlib.sha256()
    blob_sha256 = hashlib.sha256()
    size = 0
    with (
        destination.open("wb", buffering=0) as blob,
        ahead(_digested(archive(entries), archive_sha256), _BLOCKS_AHEAD) as blocks,
        ahead(_compressed(blocks, compression), _BLOCKS_AHEAD) as pieces,
    ):
        for piece in _digested(pieces, blob_sha256):
            size += len(piece)
            unwritten = memoryview(piece)
            while unwritten:
                unwritten = unwritten[blob.write(unwritten) :]
    return PackedLayer(
        Descriptor(compression.media_type, Digest(blob_sha256.hexdigest()), size),
        Digest(archive_sha256.hexdigest()),
    )


def _digested(pieces: Iterable[bytes], state: "hashlib._Hash") -> Iterator[bytes]:
    for piece in pieces:
        state.update(piece)
        yield piece


def _compressed(blocks: Iterable[bytes], compression: Compression) -> Iterator[bytes]:
    compressor = compression.compressor()
    for block in blocks:
        yield compressor.compress(block)
    yield compressor.flush()


def archive(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Yield the tar of these entries in blocks of `BLOCK_SIZE`; only the last may be smaller.

    Raises `UnsupportedEntryError` for a file that was changed while it was read, and `ValueError` if the
    entries are not in order.
    """
    cutter = _Cutter()
    previous = b""
    for entry in entries:
        order = entry.order
        if order <= previous:
            raise ValueError(f"{entry.path!r} is out of order")
        previous = order
        cutter.add(_header(entry))
        if entry.kind is EntryKind.FILE:
            for piece in _content(entry, cutter):
                cutter.add(piece)
                if cutter.room <= 0:
                    yield from cutter.blocks()
            cutter.add(_PADDING[-entry.size % _RECORD])
        if cutter.room <= 0:
            yield from cutter.blocks()
    cutter.add(_END)
    yield from cutter.blocks()
    yield from cutter.rest()


class _Cutter:
    """Cuts what is added into blocks. Bytes that are a block by themselves are not copied."""

    __slots__ = ("_pieces", "room")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.room = BLOCK_SIZE  # bytes that the next block lacks

    def add(self, piece: bytes) -> None:
        """Add some bytes; when no room is left, `blocks` should be taken."""
        self._pieces.append(piece)
        self.room -= len(piece)

    def blocks(self) -> Iterator[bytes]:
        """Yield the blocks that are whole."""
        joined = b"".join(self._pieces)
        whole = len(joined) - len(joined) % BLOCK_SIZE
        for start in range(0, whole, BLOCK_SIZE):
            yield joined[start : start + BLOCK_SIZE]
        self._pieces = [joined[whole:]]
        self.room = BLOCK_SIZE - len(self._pieces[0])

    def rest(self) -> Iterator[bytes]:
        """Yield what is no whole block, unless that is nothing."""
        yield from filter(None, self._pieces)


def _content(entry: Entry, cutter: _Cutter) -> Iterator[bytes]:
    """Yield a file's content; what is read from disk never goes beyond the end of a block."""
    left = entry.size
    if isinstance(entry.source, bytes):
        yield entry.source
        left -= len(entry.source)
    elif entry.source is not None:
        file = os.open(entry.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            ended = False
            while not ended and left >= 0:
                # One byte more than there should be, to see that there isn't.
                wanted = min(left + 1, cutter.room)
                piece = os.read(file, wanted)
                ended = len(piece) < wanted
                left -= len(piece)
                yield piece
        finally:
            os.close(file)
    if left:
        raise UnsupportedEntryError(os.fsdecode(entry.path), "the file was changed while it was read")


def _header(entry: Entry) -> bytes:
    """Return what stands before an entry's content: its ustar header, after a PAX header if it needs one."""
    path, kind, mode, uid, gid, size, target, _ = entry
    if kind is EntryKind.DIRECTORY:
        path += b"/"
    prefix, name = (b"", path) if len(path) <= _NAME else _split(path)
    if name and len(target) <= _NAME and size <= _LARGEST_SIZE and uid <= _LARGEST_ID and gid <= _LARGEST_ID:
        return _ustar(prefix, name, mode, uid, gid, size, _TYPE[kind], target)
    records: list[tuple[bytes, bytes]] = []
    if not name:
        records.append((b"path", path))
        name = path[:_NAME]
    if len(target) > _NAME:
        records.append((b"linkpath", target))
        target = target[:_NAME]
    if size > _LARGEST_SIZE:
        records.append((b"size", b"%d" % size))
        size = 0
    if uid > _LARGEST_ID:
        records.append((b"uid", b"%d" % uid))
        uid = 0
    if gid > _LARGEST_ID:
        records.append((b"gid", b"%d" % gid))
        gid = 0
    return _pax(records) + _ustar(prefix, name, mode, uid, gid, size, _TYPE[kind], target)


def _split(path: bytes) -> tuple[bytes, bytes]:
    """Split a path at a slash so that `prefix` and `name` hold it; two empty parts if no slash does."""
    cut = path.rfind(b"/", 0, min(len(path) - 1, _PREFIX + 1))
    if cut < 1 or len(path) - cut - 1 > _NAME:
        return b"", b""
    return path[:cut], path[cut + 1 :]


def _ustar(
    prefix: bytes, name: bytes, mode: int, uid: int, gid: int, size: int, typeflag: bytes, target: bytes
) -> bytes:
    numbers = _NUMBERS % (mode, uid, gid, size, _MTIME)
    # Only of what varies: the sum over all 512 bytes would take most of the time that a header takes.
    checksum = sum(name) + sum(numbers) + typeflag[0] + sum(target) + sum(prefix) + _CONSTANT_SUM
    return _HEADER.pack(name, numbers, b"%06o\0 " % checksum, typeflag, target, _CONSTANT, prefix)


def _pax(records: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return a PAX header (pax(1), "pax Extended Header"): records start with their own length."""
    try:
        b"".join(value for _, value in records).decode()
    except UnicodeDecodeError:
        records = [(b"hdrcharset", b"BINARY"), *records]
    content = b"".join(_pax_record(keyword, value) for keyword, value in records)
    header = _ustar(b"", _PAX_NAME, 0o644, 0, 0, len(content), _PAX_TYPE, b"")
    return header + content + bytes(-len(content) % _RECORD)


def _pax_record(keyword: bytes, value: bytes) -> bytes:
    without_length = b" %s=%s\n" % (keyword, value)
    length = len(without_length)
    # The length counts its own digits.
    while length != len(without_length) + len(str(length)):
        length = len(without_length) + len(str(length))
    return b"%d" % length + without_length


def merge(streams: Sequence[Iterable[Entry]]) -> Iterator[Entry]:
    """Merge what several store paths hold into one order, as layers on top of each other are.

    What isn't a directory hides what lower streams hold below it, though an upper one has a directory there:

        lower: d/, d/x    middle: d -> e    upper: d/, d/y    merged: d/, d/y
        lower: d/, d/x    middle: d -> e                      merged: d -> e
        lower: d/, d/x                      upper: d/, d/y    merged: d/, d/x, d/y
    """
    if len(streams) == 1:
        yield from streams[0]
        return
    hidden: list[tuple[bytes, int]] = []  # below this, what streams before this one hold is hidden
    merged = heapq.merge(*(_numbered(stream, number) for number, stream in enumerate(streams)))
    for order, same in groupby(merged, key=itemgetter(0)):
        while hidden and not order.startswith(hidden[-1][0]):
            hidden.pop()
        first = hidden[-1][1] if hidden else 0
        last, covering = None, 0
        for _, number, entry in same:
            if number >= first:
                last = entry
                if entry.kind is not EntryKind.DIRECTORY:
                    covering = number
        if covering > first:
            hidden.append((order + b"\0", covering))
        if last is not None:
            yield last


def _numbered(stream: Iterable[Entry], number: int) -> Iterator[tuple[bytes, int, Entry]]:
    for entry in stream:
        yield entry.order, number, entry
