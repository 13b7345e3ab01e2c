from collections.abc import Mapping
from pathlib import Path

import pytest

from chandlery.layers.package_relations import parse_relations
from chandlery.sources.debian.installed_size import installed_size
from chandlery.sources.debian.snapshot import DebianSnapshot, Package

KIB = 1 << 10


def package(name: str, size: int, depends: str = "", provides: str = "") -> Package:
    relations = parse_relations(depends) if depends else ()
    provided = tuple(one for either in parse_relations(provides) for one in either) if provides else ()
    return Package(name, "1", "optional", 0, f"{name}.deb", "0" * 64, relations, provided, size)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    packages = [
        *(package("git", 100, "libc, perl, editor"), package("perl", 20, "modules"), package("libc", 3)),
        *(package("modules", 4, "perl"), package("vim", 5, "libc", "editor"), package("jq", 1000, "libc")),
    ]
    aliases: Mapping[str, list[str]] = {"gitMinimal": ["git"]}
    for name, content in DebianSnapshot.of(packages, aliases).files():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("packages", "expected"),
    [
        (["libc"], 3),
        (["git"], 132),
        (["git", "gitMinimal", "perl", "editor"], 132),
        (["jq", "git"], 1132),
        (["modules"], 24),
        (["no-such"], 0),
    ],
)
def test_packages_take_what_they_and_all_that_they_need_take_once(
    snapshot: Path, packages: list[str], expected: int
) -> None:
    assert installed_size(snapshot, packages) == expected * KIB


def test_of_a_snapshot_that_is_gone_nobody_knows(tmp_path: Path) -> None:
    assert installed_size(tmp_path / "gone", ["git"]) is None
