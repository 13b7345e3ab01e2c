import gzip
import io
import os
import random
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.errors import StorageError, StorageFullError, UnsupportedEntryError
from chandlery.layers.archive import (
    BLOCK_SIZE,
    archive,
    layer_entries,
    layer_key,
    merge,
    pack,
    pack_store_paths,
)
from chandlery.layers.compression import COMPRESSIONS
from chandlery.layers.store_reader import Entry, EntryKind, StoreReader
from chandlery.oci.digest import Digest
from tests.support.archive_entries import (
    HELLO,
    entry_lists,
    in_order,
    tar_of,
)
from tests.support.physical_store import Executable, PhysicalStore, store_path

NONE = COMPRESSIONS["none"]
GIB = 1 << 30


def read_back(tar: bytes) -> Iterator[Entry]:
    """Read an archive with the standard library."""
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:", encoding="utf-8", errors="surrogateescape") as file:
        for member in file:
            assert (member.mtime, member.uname, member.gname) == (1, "", "")
            path = os.fsencode(member.name)
            if member.isdir():
                yield Entry.directory(path, member.mode, member.uid, member.gid)
            elif member.issym():
                yield Entry.symlink(path, os.fsencode(member.linkname), member.uid, member.gid)
            else:
                content = file.extractfile(member)
                assert content is not None
                yield Entry.file(path, content.read(), member.mode, member.uid, member.gid)


@pytest.fixture
def store(tmp_path: Path) -> PhysicalStore:
    return PhysicalStore(tmp_path / "nix/store")


@given(entry_lists())
def test_tarfile_reads_back_what_was_written(entries: list[Entry]) -> None:
    assert list(read_back(tar_of(entries))) == entries


@given(entry_lists())
def test_pax_headers_are_written_only_where_ustar_is_too_small(entries: list[Entry]) -> None:
    with tarfile.open(
        fileobj=io.BytesIO(tar_of(entries)), encoding="utf-8", errors="surrogateescape"
    ) as file:
        for entry, member in zip(entries, file, strict=True):
            expected = set()
            if entry.uid > 0o7777777:
                expected.add("uid")
            if entry.gid > 0o7777777:
                expected.add("gid")
            if len(entry.target) > 100:
                expected.add("linkpath")
            written = entry.path + b"/" * entry.is_directory
            cuts = [index for index in range(1, len(written) - 1) if written[index : index + 1] == b"/"]
            if len(written) > 100 and not any(c <= 155 and len(written) - c - 1 <= 100 for c in cuts):
                expected.add("path")
            assert set(member.pax_headers) - {"hdrcharset"} == expected


@pytest.mark.parametrize(
    ("path", "pax_headers"),
    [
        (b"\xff" * 100, {}),
        (b"\xff" * 101, {"path": "\udcff" * 101, "hdrcharset": "BINARY"}),
        ("é".encode() * 51, {"path": "é" * 51}),
        (b"p" * 155 + b"/" + b"n" * 100, {}),
        (b"p" * 156 + b"/" + b"n" * 99, {"path": "p" * 156 + "/" + "n" * 99}),
        (b"/".join([b"deep"] * 2000), {"path": "/".join(["deep"] * 2000)}),
    ],
)
def test_a_path_that_ustar_cannot_hold_is_in_a_pax_header(path: bytes, pax_headers: dict[str, str]) -> None:
    tar = tar_of([Entry.file(path, b"content")])

    with tarfile.open(fileobj=io.BytesIO(tar), encoding="utf-8", errors="surrogateescape") as file:
        [member] = file
    assert os.fsencode(member.name) == path
    assert member.pax_headers == pax_headers
    assert (tar[156:157] == b"x") == bool(pax_headers)


@pytest.mark.parametrize("length", [*range(985, 996), *range(9984, 9996)])
def test_a_pax_record_counts_the_digits_of_its_own_length(length: int) -> None:
    entries = [Entry.symlink(b"link", b"t" * (length - 4)), Entry.file(b"p" * length, b"")]

    assert list(read_back(tar_of(entries))) == entries


def test_a_file_of_8_gib_has_its_size_in_a_pax_header(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    sparse.touch()
    os.truncate(sparse, 8 * GIB)
    entry = Entry(b"large", EntryKind.FILE, 0o644, size=8 * GIB, source=sparse)

    start = next(archive([entry]))

    with tarfile.open(fileobj=io.BytesIO(start)) as file:
        member = file.next()
    assert member is not None
    assert (member.size, member.pax_headers["size"]) == (8 * GIB, str(8 * GIB))
    # One byte less fits.
    os.truncate(sparse, 8 * GIB - 1)
    assert next(archive([entry._replace(size=8 * GIB - 1)]))[124:136] == b"77777777777\0"


def test_blocks_have_one_size_whatever_files_have(tmp_path: Path) -> None:
    sizes = [0, 1, BLOCK_SIZE - 512, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE + 7]
    entries = []
    for number, size in enumerate(sizes):
        file = tmp_path / str(number)
        file.write_bytes(bytes([number]) * size)
        entries.append(Entry(b"%d" % number, EntryKind.FILE, 0o644, size=size, source=file))

    blocks = list(archive(entries))

    assert {len(block) for block in blocks[:-1]} == {BLOCK_SIZE}
    assert 0 < len(blocks[-1]) <= BLOCK_SIZE
    found = list(read_back(b"".join(blocks)))
    assert [entry.source for entry in found] == [bytes([n]) * size for n, size in enumerate(sizes)]


def test_an_archive_ends_with_two_blocks_of_zeros_and_nothing_more() -> None:
    assert tar_of([]) == bytes(1024)
    assert len(tar_of([Entry.file(b"a", b"1")])) == 512 + 512 + 1024


@pytest.mark.parametrize("paths", [[b"b", b"a"], [b"a", b"a"], [b"a/b", b"a"], [b"a-b", b"a/b"]])
def test_entries_out_of_order_are_refused(paths: list[bytes]) -> None:
    with pytest.raises(ValueError, match="out of order"):
        tar_of(map(Entry.directory, paths))


@pytest.mark.parametrize("size", [0, 1, 999, 1001, BLOCK_SIZE + 1])
def test_a_file_whose_size_changed_is_an_error(tmp_path: Path, size: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1000))
    entry = Entry(b"share/changing", EntryKind.FILE, 0o644, size=size, source=file)

    with pytest.raises(UnsupportedEntryError, match=r"share/changing .* changed while it was read"):
        tar_of([Entry.directory(b"share"), entry])


# Golden digests: they change only with ARCHIVE_VERSION and a line in CHANGELOG.md.


def test_the_bytes_of_a_layer_are_those_of_every_earlier_version(
    store: PhysicalStore, tmp_path: Path
) -> None:
    hello = store.add("hello-2.12", HELLO)
    su = store.add_root_layout(
        "su-1", {"usr/bin/su": Executable(b"su"), "nix-support/permissions": b"4755 0 0 usr/bin/su\n"}
    )

    layer = pack_store_paths(store.store_root, [hello, su], "none", tmp_path / "layer")

    assert str(layer.diff_id) == "sha256:86af3c6ac27c22e2c70db0bf9aed047cac20da699271e7bb1fdf694dae608b07"
    assert layer.descriptor.digest == layer.diff_id


# Packing


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_packed_layer_is_described_as_it_is(store: PhysicalStore, tmp_path: Path, name: str) -> None:
    noise = random.Random(1).randbytes(BLOCK_SIZE)  # noqa: S311
    large = store.add("large", {"noise": noise, "zeros": bytes(3 * BLOCK_SIZE)})
    reader = StoreReader(store.store_root)
    tar = tar_of(layer_entries(reader, [large]))

    layer = pack(layer_entries(reader, [large]), COMPRESSIONS[name], tmp_path / "layer")

    blob = (tmp_path / "layer").read_bytes()
    assert layer.diff_id == Digest.of(tar)
    assert layer.descriptor.digest == Digest.of(blob)
    assert layer.descriptor.size == len(blob)
    assert layer.descriptor.media_type == COMPRESSIONS[name].media_type
    if name == "gzip":
        assert gzip.decompress(blob) == tar


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    destination = tmp_path / "layer"

    def failing() -> Iterator[Entry]:
        # More than can wait to be written.
        yield Entry.file(b"large", bytes(32 * BLOCK_SIZE))
        assert destination.stat().st_size > 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(failing(), NONE, destination)

    assert not destination.exists()


def test_a_full_disk_is_a_full_storage(tmp_path: Path) -> None:
    destination = tmp_path / "layer"
    destination.symlink_to("/dev/full")

    with pytest.raises(StorageFullError, match="no space left"):
        pack([Entry.file(b"a", b"1")], NONE, destination)

    assert not destination.is_symlink()


def test_a_store_path_that_is_gone_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone"):
        pack_store_paths(tmp_path, [store_path("gone")], "none", tmp_path / "layer")


def test_a_layer_key_says_all_that_a_layer_depends_on() -> None:
    git, jq = store_path("git"), store_path("jq")

    assert layer_key([git, jq], NONE) == layer_key([jq, git], NONE)
    others = [([git], NONE), ([git, jq], COMPRESSIONS["gzip"]), ([], NONE)]
    keys = {layer_key([git, jq], NONE), *(layer_key(*other) for other in others)}
    assert len(keys | {layer_key([git, jq], NONE, "git!x"), layer_key([git, jq], NONE, "git!y")}) == 6


# Merging

small_names = st.sampled_from([b"a", b"b", b"a-", b"c"])
small_trees = st.recursive(
    st.dictionaries(small_names, st.sampled_from([EntryKind.FILE, EntryKind.SYMLINK]), max_size=3),
    lambda below: st.dictionaries(small_names, st.sampled_from(list(EntryKind)) | below, max_size=3),
    max_leaves=8,
)


def stream_of(tree: Mapping[bytes, object], number: int, folder: bytes = b"") -> Iterator[Entry]:
    """Yield a tree's entries; the uid says which stream they are of."""
    for name, what in tree.items():
        match what:
            case EntryKind.FILE:
                yield Entry.file(folder + name, b"", uid=number)
            case EntryKind.SYMLINK:
                yield Entry.symlink(folder + name, b"x", uid=number)
            case _:
                yield Entry.directory(folder + name, uid=number)
                if isinstance(what, dict):
                    yield from stream_of(what, number, folder + name + b"/")


@given(st.lists(small_trees, min_size=1, max_size=4))
def test_merging_is_like_putting_layers_on_top_of_each_other(several: list[dict[bytes, object]]) -> None:
    streams = [in_order(stream_of(tree, number)) for number, tree in enumerate(several)]
    stacked: dict[bytes, Entry] = {}
    for stream in streams:
        for entry in stream:
            if not entry.is_directory:
                for below in [path for path in stacked if path.startswith(entry.path + b"/")]:
                    del stacked[below]
            stacked[entry.path] = entry

    assert list(merge(streams)) == in_order(stacked.values())


def test_store_paths_that_share_a_layer_share_its_directories(store: PhysicalStore) -> None:
    first = store.add("a-1", {"bin/a": Executable()})
    second = store.add("b-1", b"b")
    below = store.add_root_layout("c-1", {"etc/c": b"c", "etc/both": b"lost"})
    above = store.add_root_layout("d-1", {"etc/d": b"d", "etc/both": b"kept"})

    entries = list(layer_entries(StoreReader(store.store_root), [above, second, below, first, second]))

    assert [entry.path for entry in entries if b"store" not in entry.path] == [
        b"etc",
        b"etc/both",
        b"etc/c",
        b"etc/d",
        b"nix",
    ]
    assert sum(entry.path == b"nix/store" for entry in entries) == 1
    [both] = [entry for entry in entries if entry.path == b"etc/both"]
    assert isinstance(both.source, Path)
    assert both.source.read_bytes() == b"kept"
    assert len(list(read_back(tar_of(entries)))) == len(entries)
