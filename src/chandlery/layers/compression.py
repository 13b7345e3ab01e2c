"""How a layer's tar is compressed. Adding a compression touches only this file.

A compression is a streaming compressor, the media type of what it makes (OCI image-spec, layer.md), and a
fingerprint: everything that its bytes depend on, so that a new version of a library makes new layers instead
of other bytes under an old layer's key. What is fed must always be cut into blocks of the same size, because
isal's bytes depend on that too; `layers.archive` does it.

isal chooses its code by the processor: x86-64 with SSE4.2 (2008 and later) compresses one way, x86-64 without
it another, and arm64 a third, so the fingerprint tells them apart. zstd's bytes are the same on all of them,
and a `diff_id` is the same whatever compresses (docs/decisions/0019-gzip-differs-between-architectures.md).
"""

import functools
import hashlib
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
# What `_gzip_code` gives with SSE4.2, which nearly every server has, in isal 1.9.1.
_USUAL_GZIP_CODE = "4b9d28402e00cdb0"


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

    @property
    def fingerprint(self) -> str:
        """Everything that the compressed bytes depend on; the code only where it isn't the usual one."""
        code = _gzip_code()
        unusual = f" code={code}" if code != _USUAL_GZIP_CODE else ""
        return f"gzip isal={isal.__version__} isa-l={isal.ISAL_VERSION} level={_GZIP_LEVEL}{unusual}"

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


@functools.cache
def _gzip_code() -> str:
    """Return a hash of what isal makes of a sample: it tells which code it has chosen for this processor."""
    sample = b"".join(b"%d " % (number * number) for number in range(4000))
    compressor = Gzip().compressor()
    return hashlib.sha256(compressor.compress(sample) + compressor.flush()).hexdigest()[:16]


_ALL: tuple[Compression, ...] = (NoCompression(), Gzip(), Zstd())
COMPRESSIONS: Mapping[str, Compression] = MappingProxyType({each.name: each for each in _ALL})
