"""What a data folder holds, part by part: bytes on the disk, how many of what, and what is there twice.

Nothing is changed, and a server may run meanwhile: what goes away while it is counted isn't counted. A file
with several names (hard links, which Nix's store has many of) is counted once, where it is found first.
"""

import hashlib
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from chandlery.builds.sqlite import index as sqlite_index
from chandlery.builds.sqlite.index import IndexCounts
from chandlery.maintenance.run_marker import RunMarker
from chandlery.nix.stores import store_folders

# What stat(2) counts in, whatever blocks the file system has.
_BLOCK = 512  # bytes

# Files that are smaller aren't compared, in bytes: there are very many, with little in them.
_WORTH_COMPARING = 64 << 10


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a data folder: its name, bytes that it takes on the disk, and how many of `what` it has."""

    name: str
    bytes: int
    number: int
    what: str


@dataclass(frozen=True, slots=True)
class KeptTwice:
    """Files whose content is somewhere else as well: why, how many more than are needed, and their bytes."""

    why: str
    number: int
    bytes: int


class DataFolderStatus(msgspec.Struct, frozen=True):
    """What a data folder holds; `unreadable` counts what this user can't look into.

    `counts` are those of the build index; None if that can't be read.
    """

    parts: tuple[Part, ...]
    counts: IndexCounts | None
    twice: tuple[KeptTwice, ...]
    server_runs: bool
    unreadable: int

    @property
    def bytes(self) -> int:
        """What all of it takes on the disk."""
        return sum(part.bytes for part in self.parts)

    def part(self, name: str) -> Part:
        """Return the part of this name."""
        return next(part for part in self.parts if part.name == name)


# Part, what is counted in it, and how. Whatever stands in none of these is "other files".
_PARTS: tuple[tuple[str, str, tuple[str, ...], Callable[[Path], Iterator[Path]]], ...] = (
    ("blobs", "blobs", ("blobs",), lambda folder: folder.glob("blobs/sha256/*/*")),
    ("Nix store", "store paths", ("nix", "nix-stores"), lambda folder: _store_paths(folder)),
    ("build index", "files", ("build-index-*",), lambda folder: folder.glob("build-index-*")),
    ("package indexes", "indexes", ("debian",), lambda folder: folder.glob("debian/suites/*/current")),
    ("source trees", "trees", ("sources",), lambda folder: folder.glob("sources/*/*/source")),
    ("popularity tables", "tables", ("popularity",), lambda folder: folder.glob("popularity/*.zst")),
    ("logs", "logs", ("builds",), lambda folder: folder.glob("builds/*.log")),
    ("temporary files", "processes", ("tmp", "leases"), lambda folder: folder.glob("tmp/*/")),
)
_OTHER = "other files"


def examine(folder: Path) -> DataFolderStatus:
    """Look at everything in a data folder, which must be there."""
    survey = _Survey()
    parts, left = [], set(_listed(folder))
    for name, what, patterns, members in _PARTS:
        places = [place for pattern in patterns for place in folder.glob(pattern)]
        left -= set(places)
        size, _ = survey.measure(name, places)
        parts.append(Part(name, size, sum(1 for _ in members(folder)), what))
    size, number = survey.measure(_OTHER, sorted(left))
    parts.append(Part(_OTHER, size, number, "files"))
    counts = sqlite_index.count(folder)
    runs = RunMarker(folder).is_held()
    return DataFolderStatus(tuple(parts), counts, tuple(_kept_twice(folder, survey)), runs, survey.unreadable)


class _Survey:
    """Files as they are found; each counts once."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()
        self.by_size: dict[int, list[tuple[str, Path]]] = defaultdict(list)  # with the part that each is of
        self.unreadable = 0

    def measure(self, part: str, places: Iterable[Path]) -> tuple[int, int]:
        """Return bytes on the disk and number of the files in some places that were not counted before."""
        total = number = 0
        waiting = list(places)
        while waiting:
            path = waiting.pop()
            try:
                status = path.lstat()
                if stat.S_ISDIR(status.st_mode):
                    waiting += path.iterdir()
            except FileNotFoundError:
                continue
            except OSError:
                self.unreadable += 1
                continue
            identity = (status.st_dev, status.st_ino)
            if identity not in self._seen:
                self._seen.add(identity)
                total += status.st_blocks * _BLOCK
                number += not stat.S_ISDIR(status.st_mode)
                if stat.S_ISREG(status.st_mode) and status.st_size >= _WORTH_COMPARING:
                    self.by_size[status.st_size].append((part, path))
        return total, number


def _store_paths(folder: Path) -> Iterator[Path]:
    """Yield the store paths of Chandlery's own Nix stores, without derivations and locks."""
    for store in store_folders(folder):
        for path in _listed(store / "nix/store"):
            if not path.name.startswith(".") and path.suffix not in (".drv", ".lock", ".chroot"):
                yield path


def _kept_twice(folder: Path, survey: _Survey) -> Iterator[KeptTwice]:
    alike: dict[str, list[int]] = defaultdict(list)
    for size, files in survey.by_size.items():
        known = set()
        for part, path in files if len(files) > 1 else ():
            with suppress(OSError), path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
                if digest in known:
                    alike[part].append(size)
                known.add(digest)
    for part, sizes in alike.items():
        yield KeptTwice(f"{part}: files with the content of others", len(sizes), sum(sizes))
    archives = [
        path.stat().st_size for path in _store_paths(folder) if path.suffix == ".deb" and path.is_file()
    ]
    if archives:
        yield KeptTwice(
            "Nix store: packages as they were fetched, beside what is in them", len(archives), sum(archives)
        )


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
