import os
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.errors import StorePathContentError, UnsupportedEntryError
from chandlery.layers.store_reader import Entry, EntryKind, Layout, StoreReader, follow
from tests.support.physical_store import Executable, Link, PhysicalStore, store_path

names = st.binary(min_size=1, max_size=4).filter(lambda name: not {b"/"[0], 0} & set(name))
paths = st.lists(names, min_size=1, max_size=4).map(b"/".join)


@pytest.fixture
def store(tmp_path: Path) -> PhysicalStore:
    return PhysicalStore(tmp_path / "nix/store")


@pytest.fixture
def reader(store: PhysicalStore) -> StoreReader:
    return StoreReader(store.store_root)


def shown(entry: Entry) -> tuple[str, str, int]:
    return os.fsdecode(entry.path), entry.kind.name, entry.mode


def test_the_store_layout_has_the_modes_of_a_nix_store(store: PhysicalStore, reader: StoreReader) -> None:
    jq = store.add("jq-1", {"bin/jq": Executable(), "share/doc": b"read me", "lib": None})
    own = f"nix/store/{jq.base_name}"

    assert [shown(entry) for entry in reader.entries(jq)] == [
        ("nix", "DIRECTORY", 0o755),
        ("nix/store", "DIRECTORY", 0o755),
        (own, "DIRECTORY", 0o555),
        (f"{own}/bin", "DIRECTORY", 0o555),
        (f"{own}/bin/jq", "FILE", 0o555),
        (f"{own}/lib", "DIRECTORY", 0o555),
        (f"{own}/share", "DIRECTORY", 0o555),
        (f"{own}/share/doc", "FILE", 0o444),
    ]


def test_an_entry_knows_its_size_and_where_its_content_is(store: PhysicalStore, reader: StoreReader) -> None:
    doc = store.add("doc", {"text": b"four", "link": Link("text")})
    link, text = list(reader.entries(doc))[-2:]

    assert (text.size, text.source) == (4, store.physical(doc) / "text")
    assert (link.target, link.mode, link.size) == (b"text", 0o777, 0)


@pytest.mark.parametrize(
    ("tree", "kind"), [(b"content", EntryKind.FILE), (Link("/nix/store/elsewhere"), EntryKind.SYMLINK)]
)
def test_a_store_path_can_be_a_file_or_a_link(
    store: PhysicalStore, reader: StoreReader, tree: bytes | Link, kind: EntryKind
) -> None:
    alone = store.add("alone", tree)

    last = list(reader.entries(alone))[-1]

    assert (last.path, last.kind) == (f"nix/store/{alone.base_name}".encode(), kind)


def test_the_root_layout_stands_at_the_root_without_nix_support(
    store: PhysicalStore, reader: StoreReader
) -> None:
    dash = store.add_root_layout(
        "dash", {"usr/bin/dash": Executable(), "etc/shells": b"", "usr/share/nix-support/kept": b""}
    )

    assert [shown(entry) for entry in reader.entries(dash)] == [
        ("etc", "DIRECTORY", 0o755),
        ("etc/shells", "FILE", 0o644),
        ("usr", "DIRECTORY", 0o755),
        ("usr/bin", "DIRECTORY", 0o755),
        ("usr/bin/dash", "FILE", 0o755),
        ("usr/share", "DIRECTORY", 0o755),
        ("usr/share/nix-support", "DIRECTORY", 0o755),
        ("usr/share/nix-support/kept", "FILE", 0o644),
    ]


def test_permissions_override_modes_and_owners(store: PhysicalStore, reader: StoreReader) -> None:
    su = store.add_root_layout(
        "su",
        {
            "usr/bin/su": Executable(),
            "usr/a file": b"",
            "usr/link": Link("bin/su"),
            "nix-support/permissions": b"4755 0 0 usr/bin/su\n0640 0 42 usr/a file\n"
            b"2755 1 2 usr\n0644 3 4 usr/link\n0755 9 9 usr/not/there\n",
        },
    )

    found = {entry.path: (entry.mode, entry.uid, entry.gid) for entry in reader.entries(su)}

    assert found == {
        b"usr": (0o2755, 1, 2),
        b"usr/a file": (0o640, 0, 42),
        b"usr/bin": (0o755, 0, 0),
        b"usr/bin/su": (0o4755, 0, 0),
        b"usr/link": (0o777, 3, 4),
    }


@pytest.mark.parametrize(
    "line", [b"u+s 0 0 usr", b"4755 0 usr", b"0755 0 0 /usr", b"17777 0 0 usr", b"0755 -1 0 usr"]
)
def test_a_line_of_permissions_that_makes_no_sense_is_named(
    store: PhysicalStore, reader: StoreReader, line: bytes
) -> None:
    odd = store.add_root_layout("odd", {"nix-support/permissions": b"0755 0 0 usr\n" + line})

    with pytest.raises(StorePathContentError, match=r"odd/nix-support/permissions: line 2"):
        list(reader.entries(odd))


def test_an_unknown_layout_is_an_error(store: PhysicalStore, reader: StoreReader) -> None:
    odd = store.add("odd", {"nix-support/image-layout": b"sideways"})

    with pytest.raises(StorePathContentError, match="sideways"):
        reader.layout(odd)


def test_a_file_cannot_stand_at_the_root_itself(store: PhysicalStore, reader: StoreReader) -> None:
    assert reader.layout(store.add("plain", b"root\n")) is Layout.STORE


def test_a_name_that_would_be_a_whiteout_is_refused(store: PhysicalStore, reader: StoreReader) -> None:
    with pytest.raises(UnsupportedEntryError, match="whiteout"):
        list(reader.entries(store.add("odd", {"lib/.wh.gone": b""})))


def test_what_is_no_file_directory_or_link_is_refused(store: PhysicalStore, reader: StoreReader) -> None:
    fifo = store.add("fifo", {"lib": None})
    os.mkfifo(store.physical(fifo) / "lib/fifo")
    with pytest.raises(UnsupportedEntryError, match="lib/fifo"):
        list(reader.entries(fifo))

    # The path of a socket has at most 107 bytes, so it is moved to where it should be.
    listening = store.add("socket", {"lib": None})
    with socket.socket(socket.AF_UNIX) as unix:
        short = Path(f"/tmp/chandlery-test-{os.getpid()}")
        unix.bind(str(short))
        short.rename(store.physical(listening) / "lib/socket")
    with pytest.raises(UnsupportedEntryError, match="lib/socket"):
        list(reader.entries(listening))


@given(st.sets(paths, min_size=2, max_size=6))
def test_the_order_puts_a_directory_directly_before_all_that_is_in_it(some: set[bytes]) -> None:
    every = {b"/".join(path.split(b"/")[:depth]) for path in some for depth in range(1, 5)}
    ordered = sorted(map(Entry.directory, every), key=lambda entry: entry.order)

    for index, entry in enumerate(ordered):
        inside = [other.path.startswith(entry.path + b"/") for other in ordered]
        count = sum(inside)
        assert inside[index + 1 : index + 1 + count] == [True] * count


@given(st.sets(paths.filter(lambda path: not {b".", b"..", b".wh."} & set(path.split(b"/"))), max_size=12))
def test_a_walk_is_in_order(tmp_path_factory: pytest.TempPathFactory, some: set[bytes]) -> None:
    store = PhysicalStore(tmp_path_factory.mktemp("store"))
    walked = store.add("walked", {})
    for path in some:
        store.physical(walked).joinpath(os.fsdecode(path)).mkdir(parents=True, exist_ok=True)

    orders = [entry.order for entry in StoreReader(store.store_root).entries(walked)]

    assert orders == sorted(set(orders))


def test_a_very_deep_tree_is_walked(store: PhysicalStore, reader: StoreReader) -> None:
    depth = sys.getrecursionlimit() + 300
    deep = store.add("deep", {})
    folders = [f"{store.physical(deep)}{'/d' * (number + 1)}" for number in range(depth)]
    for folder in folders:
        os.mkdir(folder)  # noqa: PTH102 (pathlib and shutil.rmtree are recursive)
    try:
        assert len(list(reader.entries(deep))) == 3 + depth
    finally:
        for folder in reversed(folders):
            os.rmdir(folder)  # noqa: PTH106


def test_facts_do_not_go_through_links(store: PhysicalStore, reader: StoreReader) -> None:
    # What the link leads to on this machine is not what it leads to in the image.
    outside = store.store_root.parent / "outside"
    (outside / "bin").mkdir(parents=True)
    (outside / "bin/sh").touch()
    odd = store.add("odd", {"usr": Link(str(outside)), "here/bin/sh": Executable()})
    linked = store.add("linked", Link(str(store.physical(odd))))

    assert reader.entry(odd, b"usr/bin/sh") is None
    assert reader.names(odd, b"usr") == ()
    assert reader.names(odd, b"usr/bin") == ()
    assert reader.read(odd, b"usr/bin/sh") is None
    assert reader.entry(linked, b"here") is None
    assert reader.names(odd, b"here/bin") == [b"sh"]
    assert reader.names(odd, b"here/bin/sh") == ()
    assert reader.read(odd, b"here/bin") is None
    assert reader.read(odd, b"here/bin/sh") == Executable().content
    usr = reader.entry(odd, b"usr")
    assert usr is not None
    assert usr.kind is EntryKind.SYMLINK


def test_links_are_followed_inside_the_store(store: PhysicalStore, reader: StoreReader) -> None:
    other = store.add("other", {"lib/real/file": b""})
    linking = store.add(
        "linking",
        {
            "lib/deep": None,
            "lib/up": Link("./deep/../"),
            "lib/sibling": Link(f"../../{other.base_name}/lib"),
            "absolute": Link(f"/nix/store/{other.base_name}/lib/real"),
            "loop": Link("loop"),
            "dangling": Link("nothing"),
            "outside": Link("/etc"),
            "above": Link("../.."),
        },
    )
    whole = store.add("whole", Link(linking.text))

    def lead(path: bytes) -> tuple[str, bytes] | None:
        led = follow(reader, linking, path)
        return led and (led[0].name, led[1])

    assert lead(b"") == ("linking", b"")
    assert lead(b"lib/up/deep") == ("linking", b"lib/deep")
    assert lead(b"lib/sibling/real") == ("other", b"lib/real")
    assert lead(b"absolute/file") == ("other", b"lib/real/file")
    assert follow(reader, whole, b"lib/deep") == (linking, b"lib/deep")
    for path in (b"loop", b"dangling", b"outside", b"above", b"missing/below", b"absolute/file/below"):
        assert lead(path) is None, path
    assert follow(reader, store_path("absent"), b"") is None
