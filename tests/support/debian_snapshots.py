"""Snapshots of Debian suites made of literals, as if they had been fetched."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from chandlery.sources.debian.index import keep_snapshot, load_aliases, put_in_force
from chandlery.sources.debian.release import PackagesFile, Release, SuiteState
from chandlery.sources.debian.snapshot import DebianSnapshot, parse_packages

MIRROR = "http://127.0.0.1:1/debian"


def packages_file(*names: str) -> str:
    return "\n\n".join(
        f"Package: {name}\nVersion: 1\nFilename: {name}.deb\nSHA256: {'0' * 64}" for name in names
    )


def state_of(text: str, *architectures: str) -> SuiteState:
    """Return the state of a suite with one release, whose architectures have the same packages."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    packages = {
        each: (PackagesFile(f"main/binary-{each}/Packages", digest, len(text)),) for each in architectures
    }
    return SuiteState((Release("bookworm", False, packages),))


def put(folder: Path, text: str, architectures: Sequence[str] = ("amd64",), mirror: str = MIRROR) -> str:
    """Put a suite in force in the folder of its index, with these packages; give its revision."""
    state = state_of(text, *architectures)
    revision = state.revision(load_aliases())
    for each in architectures:
        (file,) = state.releases[0].packages[each]
        path = folder / "packages" / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if not (folder / "revisions" / revision / each).exists():
            keep_snapshot(folder, state, revision, each, [path])
    put_in_force(folder, revision, [mirror])
    return revision


def put_earlier(folder: Path, text: str, mirror: str = MIRROR) -> str:
    """Put an index as version 0.1 kept it, in the folder of a suite and an architecture."""
    snapshot = DebianSnapshot.of(parse_packages(text, 0), load_aliases())
    files = dict(snapshot.files())
    revision = hashlib.sha256(b"".join(files.values())).hexdigest()
    lock = folder / "locks" / revision
    lock.mkdir(parents=True)
    for name, content in (files | {"popularity.json": snapshot.popularity().encode()}).items():
        (lock / name).write_bytes(content)
    (folder / "apt").mkdir(exist_ok=True)
    (folder / "mirrors.json").write_text(f'["{mirror}"]')
    (folder / "current").write_text(revision)
    return revision
