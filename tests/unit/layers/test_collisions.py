from collections.abc import Mapping
from pathlib import Path

import pytest

from chandlery.layers.collisions import Collision, Reason, collisions, disputed
from chandlery.layers.root_filesystem import root_filesystem
from chandlery.layers.store_reader import Entry, EntryKind, Layout, StoreReader
from chandlery.nix.closure import StorePath
from tests.support.physical_store import Executable, Link, PhysicalStore, Tree, closure_of

AGENT = {"Provides": "mail-agent", "Conflicts": "mail-agent"}


@pytest.fixture
def store(tmp_path: Path) -> PhysicalStore:
    return PhysicalStore(tmp_path / "nix/store")


def add(store: PhysicalStore, name: str, tree: Tree, permissions: str = "", **relations: str) -> StorePath:
    """Add a package of Debian's, with what its control file says."""
    fields = {"Package": name, "Version": "1", **relations}
    said = "".join(f"{field}: {value}\n" for field, value in fields.items())
    support = {"nix-support/relations": said.encode(), "nix-support/permissions": permissions.encode()}
    return store.add_root_layout(f"{name}-1", {**support, **tree})


def sendmail(store: PhysicalStore, name: str, **relations: str) -> StorePath:
    return add(store, name, {"usr/sbin/sendmail": Executable(name.encode())}, **relations)


def found(
    store: PhysicalStore, *asked: StorePath, needed: tuple[StorePath, ...] = ()
) -> list[tuple[str, str, Reason, tuple[bytes, ...]]]:
    closure = closure_of(*asked, *needed)
    told = collisions(StoreReader(store.store_root), closure, asked)
    return [(each.winner, each.loser, each.reason, each.paths) for each in told]


def last_layer(
    store: PhysicalStore, *asked: StorePath, needed: tuple[StorePath, ...] = ()
) -> Mapping[bytes, Entry]:
    closure, reader = closure_of(*asked, *needed), StoreReader(store.store_root)
    settled = disputed(collisions(reader, closure, asked))
    entries = root_filesystem(closure, asked, reader, uid=7, gid=7, disputed=settled)
    return {entry.path: entry for entry in entries}


def content(entry: Entry) -> bytes:
    assert isinstance(entry.source, Path)
    return entry.source.read_bytes()


SENDMAIL = (b"usr/sbin/sendmail",)


@pytest.mark.parametrize("names", [("exim", "postfix"), ("postfix", "exim")])
def test_what_was_asked_for_wins_over_what_came_along(store: PhysicalStore, names: tuple[str, str]) -> None:
    asked, needed = (sendmail(store, name, **AGENT) for name in names)

    assert found(store, asked, needed=(needed,)) == [(*names, Reason.ASKED, SENDMAIL)]
    program = last_layer(store, asked, needed=(needed,))[b"usr/sbin/sendmail"]
    assert content(program) == names[0].encode()


def test_of_two_that_were_asked_for_the_more_wanted_wins(store: PhysicalStore) -> None:
    exim, postfix = (sendmail(store, name, **AGENT) for name in ("exim", "postfix"))

    assert found(store, exim, postfix) == [("exim", "postfix", Reason.BEFORE, SENDMAIL)]
    assert found(store, postfix, exim) == [("postfix", "exim", Reason.BEFORE, SENDMAIL)]


def test_what_replaces_another_has_the_path_whatever_was_asked_for(store: PhysicalStore) -> None:
    old, new = sendmail(store, "old"), sendmail(store, "new", Replaces="old (<< 2)")

    assert found(store, old, needed=(new,)) == [("new", "old", Reason.REPLACES, SENDMAIL)]
    assert content(last_layer(store, old, needed=(new,))[b"usr/sbin/sendmail"]) == b"new"


def test_what_replaces_a_package_that_it_conflicts_with_wins_only_if_neither_was_asked_for(
    store: PhysicalStore,
) -> None:
    old, new = sendmail(store, "old"), sendmail(store, "new", Replaces="old", Conflicts="old")

    assert found(store, needed=(old, new)) == [("new", "old", Reason.REPLACES, SENDMAIL)]
    assert found(store, old, needed=(new,)) == [("old", "new", Reason.ASKED, SENDMAIL)]


def test_of_what_came_along_the_first_by_name_wins(store: PhysicalStore) -> None:
    exim, postfix = (sendmail(store, name, Replaces="exim, postfix", **AGENT) for name in ("exim", "postfix"))

    assert found(store, needed=(postfix, exim)) == [("exim", "postfix", Reason.NAME, SENDMAIL)]


def test_a_path_that_three_have_is_the_most_wanted_ones(store: PhysicalStore) -> None:
    exim, nullmailer, postfix = (sendmail(store, name, **AGENT) for name in ("exim", "nullmailer", "postfix"))

    layer = last_layer(store, postfix, nullmailer, needed=(exim,))

    assert content(layer[b"usr/sbin/sendmail"]) == b"postfix"
    assert len(found(store, postfix, nullmailer, needed=(exim,))) == 3


def test_packages_without_a_relation_are_not_compared(store: PhysicalStore) -> None:
    one = sendmail(store, "one", Conflicts="two (<< 1), three", Replaces="four")
    two, other = sendmail(store, "two"), store.add_root_layout("own-1", {"usr/sbin/sendmail": b"own"})

    assert found(store, one, two, other) == []
    assert b"usr/sbin/sendmail" not in last_layer(store, one, two, other)


def test_packages_that_conflict_and_share_no_path_are_both_there(store: PhysicalStore) -> None:
    one = add(store, "one", {"usr/bin/one": b""}, Conflicts="two")
    two = add(store, "two", {"usr/bin/two": b""})

    assert found(store, one, two) == []
    assert last_layer(store, one, two) == {**last_layer(store, one), **last_layer(store, two)}


def test_a_file_keeps_its_mode_and_owner_and_its_folders_theirs(store: PhysicalStore) -> None:
    permissions = "2755 0 104 usr/libexec/postdrop\n0710 0 105 usr/libexec\n"
    tree: Tree = {"usr/libexec/postdrop": Executable(), "usr/libexec/alone": b""}
    asked = add(store, "postfix", tree, permissions, Conflicts="exim")
    needed = add(store, "exim", {"usr/libexec/postdrop": Executable()})

    layer = last_layer(store, asked, needed=(needed,))

    program, folder = layer[b"usr/libexec/postdrop"], layer[b"usr/libexec"]
    assert (program.mode, program.uid, program.gid) == (0o2755, 0, 104)
    assert (folder.mode, folder.uid, folder.gid) == (0o710, 0, 105)
    assert b"usr/libexec/alone" not in layer
    assert (layer[b"etc"].uid, layer[b"etc"].gid) == (7, 7)


def test_directories_are_shared_and_the_winners_mode_counts(store: PhysicalStore) -> None:
    asked = add(
        store, "one", {"etc/shared/x": b"", "etc/same/x": b""}, "0700 0 0 etc/shared", Conflicts="two"
    )
    needed = add(store, "two", {"etc/shared/y": b"", "etc/same/y": b""})

    assert found(store, asked, needed=(needed,)) == [("one", "two", Reason.ASKED, (b"etc/shared",))]
    assert last_layer(store, asked, needed=(needed,))[b"etc/shared"].mode == 0o700


def test_a_directory_in_place_of_a_link_brings_what_is_in_it(store: PhysicalStore) -> None:
    tree: Tree = {"usr/share/doc/a/copyright": b"", "usr/share/doc/a/deep/b": b"", "usr/share/doc/b": b""}
    asked = add(store, "one", tree, Conflicts="two")
    needed = add(store, "two", {"usr/share/doc/a": Link("z")})

    layer = last_layer(store, asked, needed=(needed,))

    assert found(store, asked, needed=(needed,))[0][-1] == (b"usr/share/doc/a",)
    assert {path for path in layer if path.startswith(b"usr/share/doc")} == {
        *(b"usr/share/doc", b"usr/share/doc/a", b"usr/share/doc/a/copyright"),
        *(b"usr/share/doc/a/deep", b"usr/share/doc/a/deep/b"),
    }
    # And the other way round, the link hides what is there.
    assert last_layer(store, needed, needed=(asked,))[b"usr/share/doc/a"].kind is EntryKind.SYMLINK


def test_alternatives_see_what_won(store: PhysicalStore) -> None:
    alternative = b"/usr/bin/tool\ttool\t/usr/bin/tool.one\t1\n"
    tree: Tree = {"usr/bin/tool.one": Executable(), "nix-support/alternatives": alternative}
    one = add(store, "one", {"usr/bin/tool": Executable(), **tree}, Conflicts="two")
    two = add(store, "two", {"usr/bin/tool": Link("elsewhere")})

    assert last_layer(store, one, needed=(two,))[b"usr/bin/tool"].kind is EntryKind.FILE
    assert last_layer(store, two, needed=(one,))[b"usr/bin/tool"].target == b"/etc/alternatives/tool"


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        ((b"a",), "(/a)"),
        ((b"a", b"b", b"c", b"d", b"e"), "(/a, /b, /c and 2 more)"),
        ((b"\xff",), "(/\\xff)"),
    ],
)
def test_a_collision_says_whose_paths_are_there_and_why(paths: tuple[bytes, ...], told: str) -> None:
    text = str(Collision("postfix", "exim4", Reason.ASKED, paths))

    assert text == (
        f"postfix and exim4 have the same paths {told}: here are those of postfix, since it was asked for"
    )


def test_what_stands_in_the_store_collides_with_nothing_and_the_first_is_linked(store: PhysicalStore) -> None:
    one, two = (
        store.add(name, {"bin/tool": Executable(), f"bin/{name}": Executable()}) for name in ("b", "a")
    )
    needed = store.add("c", {"bin/tool": Executable()})
    reader = StoreReader(store.store_root)

    layer = last_layer(store, one, two, needed=(needed,))

    assert reader.layout(one) is Layout.STORE
    assert found(store, one, two, needed=(needed,)) == []
    links = {path: entry.target for path, entry in layer.items() if entry.kind is EntryKind.SYMLINK}
    assert links == {
        b"bin/tool": f"{one}/bin/tool".encode(),
        b"bin/b": f"{one}/bin/b".encode(),
        b"bin/a": f"{two}/bin/a".encode(),
    }
    everything = [entry.path for each in (one, two, needed) for entry in reader.entries(each)]
    assert {path for path in everything if everything.count(path) > 1} == {b"nix", b"nix/store"}
