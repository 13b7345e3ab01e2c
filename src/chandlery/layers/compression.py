"""How a layer's tar is compressed. Adding a compression touches only this file.

A compression is a streaming compressor, the media type of what it makes (OCI image-spec, layer.md), and a
fingerprint: everything that its bytes depend on, so that a new version of a library makes new layers instead
of other bytes under an old layer's key. What is fed must always be cut into blocks of the same size, because
isal's bytes depend on that too; `layers.archive` does it.

One thing can't be seen from here: isal chooses its code by the processor. x86-64 from SSE4.2 on is one
behaviour, older processors and other architectures may be another. `diff_id` is the same everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import isal
import zstandard
from isal import isal_zlib

from chandlery.oci.documents import OCI_LAYER

_GZIP_LEVEL = 2
_ZSTD_LEVEL = 3
# Other numbers of threads give other bytes; layers are compressed side by side instead.
_ZSTD_THREADS = 0
# zlib's way to ask for a gzip header; it has no time and no file name (RFC 1952, MTIME and FLG are 0).
_GZIP_WINDOW = 16 + 15


class Compressor(Protocol):
    """One stream; what it gives, joined, is the compressed form of what it was fed."""

    def compress(self, data: bytes, /) -> bytes:
        """Take some more bytes; the answer may be empty."""
        ...

    def flush(self) -> bytes:
        """Return what is left. Nothing may be fed afterwards."""
        ...


class Compression(Protocol):
    """A way to compress layers."""

    @property
    def name(self) -> str:
        """What the setting calls it."""
        ...

    @property
    def media_type(self) -> str:
        """The OCI media type of a layer compressed so."""
        ...

    @property
    def fingerprint(self) -> str:
        """Everything that the compressed bytes depend on."""
        ...

    def compressor(self) -> Compressor:
        """Start a stream."""
        ...


class _Copy:
    """Gives what it gets."""

    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


@dataclass(frozen=True, slots=True)
class NoCompression:
    """The tar as it is."""

    name: str = "none"
    media_type: str = OCI_LAYER
    fingerprint: str = "none"

    def compressor(self) -> Compressor:
        """Start a stream."""
        return _Copy()


@dataclass(frozen=True, slots=True)
class Gzip:
    """Gzip by Intel's ISA-L: every client reads it, and it is ten times as fast as zlib."""

    name: str = "gzip"
    media_type: str = f"{OCI_LAYER}+gzip"
    fingerprint: str = f"gzip isal={isal.__version__} isa-l={isal.ISAL_VERSION} level={_GZIP_LEVEL}"

    def compressor(self) -> Compressor:
        """Start a stream."""
        return isal_zlib.compressobj(_GZIP_LEVEL, isal_zlib.DEFLATED, _GZIP_WINDOW)


@dataclass(frozen=True, slots=True)
class Zstd:
    """Zstandard: smaller and faster to unpack; Docker before 23 and containerd before 1.5 can't read it."""

    name: str = "zstd"
    media_type: str = f"{OCI_LAYER}+zstd"
    fingerprint: str = (
        f"zstd zstandard={zstandard.__version__} libzstd={'.'.join(map(str, zstandard.ZSTD_VERSION))} "
        f"level={_ZSTD_LEVEL} threads={_ZSTD_THREADS}"
    )

    def compressor(self) -> Compressor:
        """Start a stream."""
        return zstandard.ZstdCompressor(level=_ZSTD_LEVEL, threads=_ZSTD_THREADS).compressobj()


_ALL: tuple[Compression, ...] = (NoCompression(), Gzip(), Zstd())
COMPRESSIONS: Mapping[str, Compression] = MappingProxyType({each.name: each for each in _ALL})
