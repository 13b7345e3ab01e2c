"""Which program an image of one package starts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chandlery.layers.store_reader import Layout, Reader, follow, join
from chandlery.nix.closure import Closure, StorePath

if TYPE_CHECKING:  # worker processes import this module, and start at once because they import little
    from chandlery.image.name import ImageRequest
    from chandlery.nix.evaluation import Resolution

_PROGRAM_FOLDERS = {
    Layout.STORE: (b"bin",),
    Layout.ROOT: (b"usr/bin", b"usr/games", b"usr/sbin"),
}


@dataclass(frozen=True, slots=True)
class MainPackage:
    """The one package that was asked for, whose program the image starts."""

    store_path: StorePath
    name: str
    main_program: str | None


def main_package(request: "ImageRequest", resolutions: Mapping[str, "Resolution"]) -> MainPackage | None:
    """Return the package whose program an image starts: the one that was asked for, if it is only one."""
    if len(request.packages) != 1:
        return None
    resolution = resolutions[request.packages[0]]
    return MainPackage(resolution.store_path, resolution.pname, resolution.main_program)


def main_program_of(reader: Reader, closure: Closure, main: MainPackage) -> str | None:
    """Find a package's program: its own, or one of its name among what it needs.

    Debian's python3 is a link in python3-minimal, and its perl is perl-base's.
    """
    everything = [node.path for node in closure.nodes]
    return main_program(reader, [main.store_path], main.main_program, main.name) or program_named(
        reader, everything, main.name
    )


def main_program(
    reader: Reader, store_paths: Sequence[StorePath], declared: str | None, package: str
) -> str | None:
    """Return the path, in the image, of the program that an image of one package starts, or None.

    It is the program that the package declares (`meta.mainProgram`), else the one with the package's name,
    else the only one.
    """
    programs: dict[str, str] = {}
    for store_path in store_paths:
        for path in _programs(reader, store_path):
            programs.setdefault(path.rpartition("/")[2], path)
    for name in (declared, package):
        if name in programs:
            return programs[name]
    return next(iter(programs.values())) if len(programs) == 1 else None


def program_named(reader: Reader, store_paths: Iterable[StorePath], name: str) -> str | None:
    """Return the path, in the image, of a program with this name; only the root layout puts it into PATH."""
    found = (
        path
        for store_path in store_paths
        if reader.layout(store_path) is Layout.ROOT
        for path in _programs(reader, store_path)
        if path.rpartition("/")[2] == name
    )
    return next(found, None)


def _programs(reader: Reader, store_path: StorePath) -> Iterator[str]:
    """Yield the paths of a store path's programs in an image; nixpkgs hides wrapped ones with a dot."""
    for folder in _PROGRAM_FOLDERS[reader.layout(store_path)]:
        found = follow(reader, store_path, folder)
        if found is None:
            continue
        holder, place = found
        for name in reader.names(holder, place):
            entry = reader.entry(holder, join(place, name))
            if entry is None or entry.is_directory or name.startswith(b".") or not name.isascii():
                continue
            if entry.mode & 0o100:
                yield f"/{folder.decode()}/{name.decode()}"
