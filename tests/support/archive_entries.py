"""What archives are made of: any entries, and a package that never changes."""

from collections.abc import Iterable, Mapping

from hypothesis import strategies as st

from chandlery.layers.archive import archive
from chandlery.layers.store_reader import Entry, EntryKind
from tests.support.physical_store import Executable, Link

HELLO: dict[str, bytes | Executable | Link | None] = {
    "bin/hello": Executable(b"#!/bin/sh\necho hello\n"),
    "bin/greet": Link("hello"),
    "share/empty": None,
    "share/doc/" + "long/" * 40 + "name": b"far down\n",
    "share/é": b"",
}

# Bytes that can be a name, and texts that often break archives: long, not ASCII, not UTF-8.
names = (
    st.binary(min_size=1, max_size=12)
    | st.text("aé漢 =\n", min_size=1, max_size=12).map(str.encode)
    | st.integers(90, 255).map(lambda length: b"n" * length)
).filter(
    # `nix-support` at the top isn't content of a store path with the root layout.
    lambda name: (
        not {b"/"[0], 0} & set(name) and name not in (b".", b"..", b"nix-support") and name[:4] != b".wh."
    )
)
targets = st.lists(names, min_size=1, max_size=3).map(b"/".join)
contents = st.binary(max_size=20) | st.integers(500, 1030).map(lambda size: b"c" * size)
identities = st.sampled_from([0, 1000, 0o7777777, 0o10000000, 2**32 - 1])
leaves = st.tuples(st.just(EntryKind.FILE), contents) | st.tuples(st.just(EntryKind.SYMLINK), targets)
trees: st.SearchStrategy[Mapping[bytes, object]] = st.recursive(
    st.dictionaries(names, leaves | st.just({}), max_size=4),
    lambda below: st.dictionaries(names, leaves | below, max_size=4),
    max_leaves=10,
)


@st.composite
def entry_lists(draw: st.DrawFn) -> list[Entry]:
    """All of a tree in order; content is in memory, so no file system limits the names."""
    entries: list[Entry] = []

    def add(tree: Mapping[bytes, object], folder: bytes) -> None:
        for name, what in tree.items():
            path, uid, gid = folder + name, draw(identities), draw(identities)
            match what:
                case dict():
                    entries.append(Entry.directory(path, draw(st.sampled_from([0o755, 0o1777])), uid, gid))
                    add(what, path + b"/")
                case (EntryKind.FILE, bytes(content)):
                    entries.append(
                        Entry.file(path, content, draw(st.sampled_from([0o644, 0o4755])), uid, gid)
                    )
                case (EntryKind.SYMLINK, bytes(target)):
                    entries.append(Entry.symlink(path, target, uid, gid))

    add(draw(trees), b"")
    return in_order(entries)


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: entry.order)


def tar_of(entries: Iterable[Entry]) -> bytes:
    return b"".join(archive(entries))
