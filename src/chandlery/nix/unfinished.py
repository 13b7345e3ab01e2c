"""What stands in a Nix store before Nix registers it: its database knows nothing of it.

    <store>/<hash>-<name>.drv.chroot/      the root of a builder's sandbox, with the outputs that it writes
    <store>/<hash>-<name>                  an output that is being unpacked
    <scratch>/nix-build-<name>.drv-<n>/    a builder's own folder; see `Nix.scratch`

All functions block.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR

from chandlery.nix.closure import StorePath

_SANDBOX = ".chroot"


def unfinished_bytes(store: Path, scratch: Path, unfinished: Iterable[tuple[StorePath, StorePath]]) -> int:
    """Return the bytes of outputs that aren't finished, each with what makes it, and of what is in `scratch`.

    A file counts as large as in an archive. What can't be read, or has another name outside, doesn't count: a
    builder's inputs that are files are links to those in the store.
    """
    folders = {scratch}
    for derivation, output in unfinished:
        sandbox = store / f"{derivation.base_name}{_SANDBOX}"
        if sandbox.is_dir():
            folders.add(sandbox)
        elif os.path.lexists(store / output.base_name):
            folders.add(store / output.base_name)
    return sum(map(_bytes_of, sorted(folders)))


def left_sandboxes(store: Path) -> list[str]:
    """Return the names of sandboxes' roots in a store: of builders that run, and of killed ones."""
    try:
        return sorted(name for name in os.listdir(store) if name.endswith(f".drv{_SANDBOX}"))
    except FileNotFoundError:
        return []


def _bytes_of(path: Path) -> int:
    counted = 0
    links: Counter[int] = Counter()
    for each in _files(path):
        if each.st_nlink > 1:
            links[each.st_ino] += 1
            if links[each.st_ino] < each.st_nlink:
                continue
        counted += each.st_size
    return counted


def _files(path: Path) -> Iterator[os.stat_result]:
    """Return what is below a path and is no folder, but for what can't be read, or vanishes meanwhile."""
    waiting = [str(path)]
    while waiting:
        each = waiting.pop()
        with suppress(OSError):
            found = os.lstat(each)
            if S_ISDIR(found.st_mode):
                # Not by calls within calls: a builder may make folders as deep as it likes.
                waiting += [f"{each}/{name}" for name in os.listdir(each)]
            else:
                yield found
