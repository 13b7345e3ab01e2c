"""Reads layer blobs as any client does, for the tests of what is in them."""

import gzip
import tarfile
from io import BytesIO
from pathlib import Path

import zstandard


def uncompressed(blob: Path) -> bytes:
    content = blob.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        return gzip.decompress(content)
    if content.startswith(b"\x28\xb5\x2f\xfd"):
        return zstandard.ZstdDecompressor().decompressobj().decompress(content)
    return content


def layer(blob: Path) -> tarfile.TarFile:
    return tarfile.open(fileobj=BytesIO(uncompressed(blob)))


def text(archive: tarfile.TarFile, name: str) -> str:
    """Return the content of a file in an archive."""
    file = archive.extractfile(name)
    assert file is not None, f"{name} is no file"
    return file.read().decode()
