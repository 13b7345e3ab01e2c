import gzip
from collections.abc import Sequence

import isal
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from chandlery.layers.compression import COMPRESSIONS, Compression

compressions = pytest.mark.parametrize("compression", COMPRESSIONS.values(), ids=list(COMPRESSIONS))
pieces = st.lists(st.binary(max_size=200) | st.binary(max_size=20).map(lambda some: some * 300), max_size=8)


def compress(compression: Compression, fed: Sequence[bytes]) -> bytes:
    compressor = compression.compressor()
    return b"".join([*map(compressor.compress, fed), compressor.flush()])


def decompress(compression: Compression, content: bytes) -> bytes:
    """Read it with a library other than the one that wrote it, where there is one."""
    match compression.name:
        case "gzip":
            return gzip.decompress(content)
        case "zstd":
            return zstandard.ZstdDecompressor().decompressobj().decompress(content)
        case _:
            return content


@compressions
@given(fed=pieces)
def test_what_was_compressed_can_be_read_back(compression: Compression, fed: list[bytes]) -> None:
    assert decompress(compression, compress(compression, fed)) == b"".join(fed)


@compressions
@given(fed=pieces)
def test_the_same_blocks_give_the_same_bytes(compression: Compression, fed: list[bytes]) -> None:
    assert compress(compression, fed) == compress(compression, fed)


def test_a_gzip_header_has_no_time_and_no_name() -> None:
    header = compress(COMPRESSIONS["gzip"], [b"content"])[:10]

    # RFC 1952: magic, deflate, FLG, MTIME
    assert header[:8] == b"\x1f\x8b\x08" + bytes(5)


def test_names_and_media_types_are_those_of_the_specification() -> None:
    layer = "application/vnd.oci.image.layer.v1.tar"

    assert {name: each.media_type for name, each in COMPRESSIONS.items()} == {
        "none": layer,
        "gzip": f"{layer}+gzip",
        "zstd": f"{layer}+zstd",
    }
    assert all(each.name == name for name, each in COMPRESSIONS.items())


def test_a_fingerprint_says_all_that_the_bytes_depend_on() -> None:
    fingerprints = {name: each.fingerprint for name, each in COMPRESSIONS.items()}

    assert isal.__version__ in fingerprints["gzip"]
    assert isal.ISAL_VERSION in fingerprints["gzip"]
    assert zstandard.__version__ in fingerprints["zstd"]
    assert "threads=0" in fingerprints["zstd"]
    assert len(set(fingerprints.values())) == len(fingerprints)
