"""A Nix store in a temporary folder, made of literals, for the tests of all that reads one."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from chandlery.nix.closure import Closure, ClosureNode, StorePath

_BASE_32 = "0123456789abcdfghijklmnpqrsvwxyz"


@dataclass(frozen=True)
class Executable:
    content: bytes = b"#!/bin/sh\n"


@dataclass(frozen=True)
class Link:
    target: str


# A file's content, an executable, a link, or None for an empty directory; by path.
Tree = Mapping[str, bytes | Executable | Link | None]


class PhysicalStore:
    def __init__(self, store_root: Path) -> None:
        self.store_root = store_root
        store_root.mkdir(parents=True, exist_ok=True)

    def physical(self, store_path: StorePath) -> Path:
        return self.store_root / store_path.base_name

    def add(self, name: str, tree: Tree | bytes | Executable | Link) -> StorePath:
        """Add a store path; its hash is made of its name, so it is always the same."""
        added = store_path(name)
        if isinstance(tree, Mapping):
            self.physical(added).mkdir()
            for path, what in tree.items():
                put(self.physical(added) / path, what)
        else:
            put(self.physical(added), tree)
        return added

    def add_root_layout(self, name: str, tree: Tree) -> StorePath:
        return self.add(name, {"nix-support/image-layout": b"root\n", **tree})


def store_path(name: str) -> StorePath:
    digest = sha256(name.encode()).digest()
    return StorePath.parse("/nix/store/" + "".join(_BASE_32[byte % 32] for byte in digest) + "-" + name)


def closure_of(*store_paths: StorePath) -> Closure:
    return Closure.of(store_paths, (ClosureNode(path, 1, ()) for path in store_paths))


def put(path: Path, what: bytes | Executable | Link | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    match what:
        case None:
            path.mkdir()
        case Link(target):
            path.symlink_to(target)
        case Executable(content):
            path.write_bytes(content)
            path.chmod(0o755)
        case content:
            path.write_bytes(content)
            path.chmod(0o644)
