import subprocess
import sys
from pathlib import Path

import pytest
from anyio import to_process
from hypothesis import example, given, settings

from chandlery.errors import UnsupportedEntryError
from chandlery.layers.archive import (
    pack_store_paths,
)
from chandlery.layers.store_reader import Entry, EntryKind, StoreReader
from chandlery.oci.documents import PackedLayer
from tests.support.archive_entries import (
    HELLO,
    entry_lists,
    tar_of,
)
from tests.support.physical_store import PhysicalStore


@pytest.fixture
def store(tmp_path: Path) -> PhysicalStore:
    return PhysicalStore(tmp_path / "nix/store")


@given(entry_lists())
@example([Entry.directory(b"share", 0o755), Entry.file(b"share/nix-support", b"not at the top", 0o755)])
@settings(max_examples=30)
def test_gnu_tar_reads_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Entry]
) -> None:
    # The store's reader is the judge, and it knows one mode for directories and two for files.
    plain = [
        entry._replace(mode=0o777 if entry.kind is EntryKind.SYMLINK else 0o755, uid=0, gid=0)
        for entry in entries
        if len(entry.path) < 1000
    ]
    store = PhysicalStore(tmp_path_factory.mktemp("store"))
    extracted = store.add_root_layout("extracted", {})

    subprocess.run(
        ["tar", "-xpf-", "--no-same-owner", "-C", store.physical(extracted)], input=tar_of(plain), check=True
    )

    found = [
        entry._replace(source=entry.source.read_bytes() if isinstance(entry.source, Path) else None)
        for entry in StoreReader(store.store_root).entries(extracted)
    ]
    assert found == plain


def test_neither_process_nor_locale_nor_umask_nor_creation_order_reach_the_bytes(
    store: PhysicalStore, tmp_path: Path
) -> None:
    hello = store.add("hello-2.12", HELLO)
    here = pack_store_paths(store.store_root, [hello], "gzip", tmp_path / "here")
    again = PhysicalStore(tmp_path / "again/nix/store")
    again.add("hello-2.12", dict(reversed(HELLO.items())))
    program = (
        "import sys; from pathlib import Path; from chandlery.nix.closure import StorePath;"
        "from chandlery.layers.archive import pack_store_paths;"
        "root, store_path, to = sys.argv[1:];"
        "print(pack_store_paths(Path(root), [StorePath(store_path)], 'gzip', Path(to)).descriptor.digest)"
    )
    for seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", program, again.store_root, hello.text, tmp_path / "there"],
            env={
                "LC_ALL": "C",
                "PYTHONUTF8": "0",
                "PYTHONCOERCECLOCALE": "0",
                "PYTHONHASHSEED": seed,
                "TZ": "Asia/Tokyo",
            },
            umask=0o077,
            check=True,
            capture_output=True,
            text=True,
        )
        assert there.stdout.strip() == str(here.descriptor.digest)


async def test_layers_are_packed_in_another_process_just_as_in_this_one(
    store: PhysicalStore, tmp_path: Path
) -> None:
    arguments = (store.store_root, (store.add("hello-2.12", HELLO),), "zstd")

    there: PackedLayer = await to_process.run_sync(pack_store_paths, *arguments, tmp_path / "there")

    assert there == pack_store_paths(*arguments, tmp_path / "here")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


async def test_errors_come_back_whole_from_another_process(store: PhysicalStore, tmp_path: Path) -> None:
    odd = store.add("odd", {".wh.gone": b""})

    with pytest.raises(UnsupportedEntryError, match="whiteout") as caught:
        await to_process.run_sync(pack_store_paths, store.store_root, (odd,), "gzip", tmp_path / "layer")

    assert caught.value.path.endswith("odd/.wh.gone")
