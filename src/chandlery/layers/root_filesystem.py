"""What the last layer holds: everything that turns store paths into a root filesystem.

It is decided from facts about store paths, read through `Reader`, and nothing is copied: apart from a few
small files the layer is directories and links. The first to claim a path keeps it, in this order:

1. the links of a merged /usr (`bin -> usr/bin`), if anything in the closure has the root layout
2. extra contents
3. directories that programs count on: `/tmp` and others
4. what was asked for and has the store layout: links into it, as nixpkgs' symlinkJoin makes them; earlier
   packages before later ones
5. the accounts, the paths of the CA bundle, `/bin/sh` and `/usr/bin/env`, the alternatives
6. what packages with the root layout dispute, as `layers.collisions` has settled it

Lower layers are covered by this one, so what a store path with the root layout has at a path is left in peace
where that is the better file, and covered where it isn't (`/etc/passwd`).
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType

from chandlery.image.profile import Account
from chandlery.layers import alternatives
from chandlery.layers.store_reader import Entry, EntryKind, Layout, Reader, follow, join
from chandlery.nix.closure import Closure, StorePath

# As symlinks in every distribution that has merged /usr (Debian: base-files); the rest only where they exist.
_MERGED = (b"bin", b"sbin", b"lib", b"lib64")
_MERGED_IF_USED = (b"lib32", b"libx32", b"libo32")

_DIRECTORIES = (
    (b"etc", 0o755),
    (b"root", 0o700),
    (b"run", 0o755),
    (b"tmp", 0o1777),
    (b"var", 0o755),
    (b"var/tmp", 0o1777),
)

_FILES = (
    (
        b"etc/passwd",
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    ),
    (b"etc/group", b"root:x:0:\nnobody:x:65534:\n"),
    # Without it glibc asks DNS before /etc/hosts, and localhost is whatever DNS says.
    (b"etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files dns\n"),
)

# nixpkgs' cacert has the first, Debian's ca-certificates the second.
_CA_BUNDLES = (b"etc/ssl/certs/ca-bundle.crt", b"etc/ssl/certs/ca-certificates.crt")
# Where TLS libraries look (Go's crypto/x509/root_linux.go has the list).
_CA_PATHS = (*_CA_BUNDLES, b"etc/pki/tls/certs/ca-bundle.crt", b"etc/ssl/cert.pem")
_CA_PATH_OF_DEBIAN_OPENSSL = b"usr/lib/ssl/cert.pem"

# What scripts name in their first line, and what can stand in for it.
_INTERPRETERS = (
    (b"bin/sh", (b"bin/bash", b"bin/dash")),
    (b"usr/bin/env", (b"bin/env",)),
)


def root_filesystem(
    closure: Closure,
    roots: Sequence[StorePath],
    reader: Reader,
    *,
    uid: int = 0,
    gid: int = 0,
    account: Account | None = None,
    extra: Iterable[Entry] = (),
    disputed: Mapping[bytes, Entry] = MappingProxyType({}),
) -> list[Entry]:
    """Return the entries of the last layer, in order, parent directories included.

    `uid` and `gid` own all of it but the home of `account` and what is `disputed`, by path. `roots` are the
    store paths that were asked for, the most wanted first; all of them are in the closure. Raises what
    `StoreReader` raises.
    """
    lower = _RootLayout(reader, (node.path for node in closure.nodes), disputed)
    tree = _Tree(_merged_folders(lower))
    links = [_links(reader, root) for root in roots if reader.layout(root) is Layout.STORE]
    for entry in chain(
        extra,
        (Entry.directory(path, mode) for path, mode in _DIRECTORIES),
        (entry for files, _ in links for entry in files),
        # A directory wins over a link to one, whichever package has it: its content would be lost.
        (entry for _, folders in links for entry in folders),
        (Entry.file(path, content) for path, content in _files(account)),
        (Entry.directory(account.home.encode(), 0o700) for account in ([account] if account else [])),
    ):
        tree.put(entry)
    _put_ca_bundle(tree, lower)
    _put_interpreters(tree, lower)
    _put_alternatives(tree, lower, reader)
    for entry in disputed.values():
        tree.put(entry)
    return [
        entry if entry == disputed.get(entry.path) else owned(entry, (uid, gid), account)
        for entry in tree.entries()
    ]


def owned(entry: Entry, owner: tuple[int, int], account: Account | None) -> Entry:
    """Return an entry to whom it belongs: user and group of the layer, or the account whose home it is in."""
    if account and f"{os.fsdecode(entry.path)}/".startswith(f"{account.home}/"):
        owner = (account.uid, account.gid)
    return entry._replace(uid=owner[0], gid=owner[1])


def _files(account: Account | None) -> Iterator[tuple[bytes, bytes]]:
    """Return the small files that every image has; an account of its own stands beside root and nobody."""
    lines = {b"etc/passwd": "", b"etc/group": ""}
    if account:
        name, uid, gid = account.name, account.uid, account.gid
        lines[b"etc/passwd"] = f"{name}:x:{uid}:{gid}:{name}:/{account.home}:/bin/sh\n"
        lines[b"etc/group"] = f"{name}:x:{gid}:\n"
    return ((path, content + lines.get(path, "").encode()) for path, content in _FILES)


class _RootLayout:
    """What the store paths with the root layout put at /; directories are listed once, for they are many."""

    def __init__(
        self, reader: Reader, store_paths: Iterable[StorePath], disputed: Mapping[bytes, Entry]
    ) -> None:
        self.store_paths = [path for path in store_paths if reader.layout(path) is Layout.ROOT]
        self._reader = reader
        self._disputed = disputed
        self._folders: dict[bytes, dict[bytes, StorePath]] = {}

    def find(self, path: bytes) -> Entry | None:
        """Return what stands at a path of the image; None if nothing does."""
        if path in self._disputed:
            return self._disputed[path]
        folder, _, name = path.rpartition(b"/")
        if folder not in self._folders:
            self._folders[folder] = {
                found: store_path
                for store_path in self.store_paths
                for found in self._reader.names(store_path, folder)
            }
        holder = self._folders[folder].get(name)
        return self._reader.entry(holder, path) if holder else None


class _Tree:
    """The layer as it grows: what was put at a path first stays."""

    def __init__(self, merged: Sequence[bytes]) -> None:
        self._merged = frozenset(merged)
        self._entries: dict[bytes, Entry] = {}
        self._parents: set[bytes] = set()
        for name in merged:
            self._entries[name] = Entry.symlink(name, b"usr/" + name)
            self.put(Entry.directory(b"usr/" + name))

    def normalise(self, path: bytes) -> bytes:
        """Return the place of a path in the image: with a merged /usr, what is in /bin is in /usr/bin."""
        return b"usr/" + path if path.partition(b"/")[0] in self._merged else path

    def put(self, entry: Entry) -> None:
        """Put an entry where it belongs; not if something else is there, or is in the way of its parents."""
        path = self.normalise(entry.path)
        parents = list(_parents(path))
        taken = path in self._entries or (path in self._parents and not entry.is_directory)
        if taken or any(
            not self._entries[parent].is_directory for parent in parents if parent in self._entries
        ):
            return
        self._entries[path] = entry._replace(path=path)
        self._parents.update(parents)

    def target(self, path: bytes) -> bytes | None:
        """Return what a link to a file of this layer should lead to: where it leads, if it is a link too."""
        entry = self._entries.get(self.normalise(path))
        if entry is None or entry.is_directory:
            return None
        return entry.target or b"/" + entry.path

    def entries(self) -> list[Entry]:
        """Return all entries and their parent directories, in order."""
        implied = (Entry.directory(path) for path in self._parents - self._entries.keys())
        return sorted([*self._entries.values(), *implied], key=lambda entry: entry.order)


def _parents(path: bytes) -> Iterator[bytes]:
    while path := path.rpartition(b"/")[0]:
        yield path


def _reachable(tree: _Tree, lower: _RootLayout, path: bytes) -> bytes | None:
    """Return what a link to a file of the image should lead to; None if there is no such file."""
    place = tree.normalise(path)
    return tree.target(path) or (b"/" + place if lower.find(place) else None)


def _merged_folders(lower: _RootLayout) -> list[bytes]:
    """Return the names that are links to their namesakes below /usr in this image.

    A store path that has a directory there, against the custom of its package set, would lose all that is in
    it.
    """
    if not lower.store_paths:
        return []
    used = [name for name in _MERGED_IF_USED if lower.find(b"usr/" + name)]
    in_place = {name: lower.find(name) for name in (*_MERGED, *used)}
    return [name for name, entry in in_place.items() if entry is None or not entry.is_directory]


def _links(reader: Reader, root: StorePath) -> tuple[list[Entry], list[Entry]]:
    """Return what links a store path's files from /, and apart from it, the links to directories.

    A link leads to its namesake in the store, so it means the same whatever other packages have. But a link
    to a directory leads to that directory at /, where packages are merged; and if it goes to another store
    path, as buildEnv makes them, then the directory's content is linked in its place. Of a store path T:

        bin/tool, a file           the directory bin, and bin/tool -> T/bin/tool
        sbin -> bin                sbin -> /bin, apart: another package's directory sbin comes before it
        share -> L/share, with a   the directory share, and share/a -> L/share/a
    """
    files: list[Entry] = []
    folders: list[Entry] = []
    top = follow(reader, root, b"")
    if top is None or not _is_directory(reader, top):
        return [Entry.symlink(os.fsencode(root.name), os.fsencode(root.text))], []
    pending = [(top, b"")]
    expanded = {top}
    while pending:
        (store_path, folder), place = pending.pop()
        own = join(b"nix/store/" + os.fsencode(store_path.base_name), folder) + b"/"
        for entry in reader.entries(store_path):
            below = entry.path.removeprefix(own)
            path = join(place, below)
            if not entry.path.startswith(own) or path.partition(b"/")[0] == b"nix-support":
                continue
            led = None
            if entry.kind is EntryKind.SYMLINK:
                led = follow(reader, store_path, join(folder, below))
            if entry.is_directory:
                files.append(Entry.directory(path))
            elif led is None or not _is_directory(reader, led):
                files.append(Entry.symlink(path, b"/" + entry.path))
            elif led[0] == store_path and _is_below(led[1], folder):
                folders.append(Entry.symlink(path, b"/" + join(place, led[1][len(folder) :].lstrip(b"/"))))
            elif led in expanded:
                # Twice would be for ever, if two store paths have links to each other.
                folders.append(Entry.symlink(path, b"/" + entry.path))
            else:
                expanded.add(led)
                files.append(Entry.directory(path))
                pending.append((led, path))
    return files, folders


def _is_below(path: bytes, folder: bytes) -> bool:
    return path == folder or not folder or path.startswith(folder + b"/")


def _is_directory(reader: Reader, place: tuple[StorePath, bytes]) -> bool:
    entry = reader.entry(*place)
    return entry is not None and entry.is_directory


def _put_ca_bundle(tree: _Tree, lower: _RootLayout) -> None:
    """Make the CA bundle, if there is one, reachable wherever programs look for it."""
    bundle = next(filter(None, (_reachable(tree, lower, path) for path in _CA_BUNDLES)), None)
    if bundle is not None:
        for path in (*_CA_PATHS, *([_CA_PATH_OF_DEBIAN_OPENSSL] if lower.store_paths else [])):
            if lower.find(path) is None:
                tree.put(Entry.symlink(path, bundle))


def _put_interpreters(tree: _Tree, lower: _RootLayout) -> None:
    """Link /bin/sh and /usr/bin/env to what can be them, where no package has them."""
    for path, stand_ins in _INTERPRETERS:
        target = next(filter(None, (_reachable(tree, lower, stand_in) for stand_in in stand_ins)), None)
        if target is not None and lower.find(tree.normalise(path)) is None:
            tree.put(Entry.symlink(path, target))


def _put_alternatives(tree: _Tree, lower: _RootLayout, reader: Reader) -> None:
    """Put the links of the alternatives that win; as update-alternatives, leave files and directories be."""

    def find(path: bytes) -> Entry | None:
        return lower.find(tree.normalise(path[1:]))

    known = [
        (store_path, alternative)
        for store_path in lower.store_paths
        for alternative in alternatives.parse(reader.read(store_path, b"nix-support/alternatives") or b"")
    ]
    for link in alternatives.choose(known, lambda path: find(path) is not None):
        name = b"etc/alternatives/" + link.name
        tree.put(Entry.symlink(name, b"/" + tree.normalise(link.path[1:])))
        there = find(link.link)
        if there is None or there.kind is EntryKind.SYMLINK:
            tree.put(Entry.symlink(link.link[1:], b"/" + name))
