import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chandlery.debian_index import DebianMirrors, keep_lock
from chandlery.errors import InvalidSourceError, ReferenceNotFoundError, SourceUnavailableError
from chandlery.image_name import LATEST
from chandlery.oci import ARCHITECTURES, Platform
from chandlery.package_source import DebianSource, PathSource, PinnedSource, parse
from debian_packages import Deb
from debian_repository import SUITE, debian_repository

AMD64 = Platform("linux", "amd64")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "write debian!<suite> or path!<folder>"),
        ("bookworm", "write debian!<suite> or path!<folder>"),
        ("debian!", "write debian!<suite> or path!<folder>"),
        ("!bookworm", "'' is not a kind of source"),
        ("nix!bookworm", "'nix' is not a kind of source: there are debian and path"),
        ("Debian!bookworm", "'Debian' is not a kind of source"),
        ("debian!Bookworm", "'Bookworm' is not the name of a Debian suite"),
        ("debian!../bookworm", "'../bookworm' is not the name of a Debian suite"),
        ("debian!bookworm main", "'bookworm main' is not the name of a Debian suite"),
        ("debian!bookworm\n", "is not the name of a Debian suite"),
        ("path!/nonexistent/folder", "there is no folder /nonexistent/folder"),
    ],
)
def test_what_names_no_source_is_told_with_what_would(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(InvalidSourceError) as caught:
        parse(text, tmp_path, DebianMirrors())

    assert reason in str(caught.value)
    assert caught.value.text == text


def test_a_source_keeps_the_text_that_it_was_made_of(tmp_path: Path) -> None:
    for text in ("debian!bookworm", "debian!bookworm-backports", f"path!{tmp_path}"):
        assert parse(text, tmp_path / "data", DebianMirrors()).text == text


async def test_a_folder_may_be_written_from_here_or_from_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    for text in ("path!set", "path!./set", "path!~/set"):
        source = parse(text, tmp_path / "data", DebianMirrors())
        assert (await source.pin(LATEST, AMD64)).location == str(tmp_path / "set")


def test_where_a_pins_data_is_is_no_part_of_its_identity() -> None:
    here = PinnedSource("debian", "bookworm", "ab" * 32, {"lock": "/here"})
    there = PinnedSource("debian", "bookworm", "ab" * 32, {"lock": "/there"})

    assert here == there
    assert hash(here) == hash(there)
    assert here.tag == "ab" * 8
    assert here.to_nix() == {"kind": "debian", "location": "bookworm", "lock": "/here"}


# A folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    (folder / "pkgs/empty").mkdir(parents=True)
    (folder / "default.nix").write_text("{ }")
    (folder / "pkgs/git.nix").write_text("git")
    (folder / "link").symlink_to("default.nix")
    (folder / ".git").mkdir()
    (folder / ".git/HEAD").write_text("main")
    return folder


async def revision(folder: Path) -> str:
    return (await PathSource(folder).pin(LATEST, AMD64)).revision


def relink(folder: Path, target: str) -> None:
    (folder / "link").unlink()
    (folder / "link").symlink_to(target)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "default.nix").write_text("{}"),
        lambda folder: (folder / "default.nix").write_text("[ ]"),
        lambda folder: (folder / "default.nix").rename(folder / "other.nix"),
        lambda folder: (folder / "pkgs/git.nix").rename(folder / "git.nix"),
        lambda folder: (folder / "pkgs/git.nix").unlink(),
        lambda folder: (folder / "pkgs/empty").rmdir(),
        lambda folder: (folder / "another").mkdir(),
        lambda folder: (folder / "pkgs/.git").write_text("not the repository's own"),
        lambda folder: (folder / "default.nix").chmod(0o755),
        lambda folder: relink(folder, "pkgs/git.nix"),
        lambda folder: (folder / "link").unlink() or (folder / "link").write_text("default.nix"),
    ],
)
async def test_a_revision_changes_with_names_contents_links_and_the_executable_bit(
    folder: Path, change: Callable[[Path], object]
) -> None:
    source = PathSource(folder)
    before = (await source.pin(LATEST, AMD64)).revision

    change(folder)

    assert (await source.pin(LATEST, AMD64)).revision != before
    assert await revision(folder) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: os.utime(folder / "default.nix", (0, 0)),
        lambda folder: os.utime(folder, (0, 0)),
        lambda folder: (folder / "default.nix").chmod(0o600),
        lambda folder: (folder / "default.nix").write_text("{ }"),
        lambda folder: (folder / ".git/HEAD").write_text("other"),
        lambda folder: (folder / ".git/index").write_text("new"),
        lambda folder: folder.rename(folder.with_name("moved")).rename(folder),
    ],
)
async def test_a_revision_does_not_change_with_times_or_what_git_keeps_for_itself(
    folder: Path, change: Callable[[Path], object]
) -> None:
    source = PathSource(folder)
    before = (await source.pin(LATEST, AMD64)).revision

    change(folder)

    assert (await source.pin(LATEST, AMD64)).revision == before
    assert await revision(folder) == before


names = st.text("ab.", min_size=1, max_size=3).filter(lambda name: name not in (".", ".."))
trees = st.dictionaries(st.lists(names, min_size=1, max_size=3).map(tuple), st.binary(max_size=3), max_size=4)
# No name is a file and a folder.
sound_trees = trees.filter(
    lambda tree: not any(path[:depth] in tree for path in tree for depth in range(1, len(path)))
)


@settings(max_examples=50)
@given(sound_trees, sound_trees)
async def test_different_folders_have_different_revisions(
    one: dict[tuple[str, ...], bytes], other: dict[tuple[str, ...], bytes]
) -> None:
    revisions = []
    for tree in (one, other):
        with tempfile.TemporaryDirectory() as folder:
            for path, content in reversed(tree.items()):
                file = Path(folder, *path)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            revisions.append(await revision(Path(folder)))

    assert (revisions[0] == revisions[1]) == (one == other)


async def test_a_revision_does_not_depend_on_the_order_in_which_a_file_system_lists_names() -> None:
    revisions = set()
    for names_in_order in ("abc", "cba"):
        # tmpfs lists names by when they were made.
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            for name in names_in_order:
                (Path(folder) / name).mkdir()
                (Path(folder) / name / "file").write_text(name)
            revisions.add(await revision(Path(folder)))

    assert len(revisions) == 1


async def test_files_that_did_not_change_are_not_read_again(folder: Path) -> None:
    file = folder / "default.nix"
    modified = file.stat().st_mtime_ns

    def was_read() -> bool:
        return file.stat().st_atime_ns != 0

    source = PathSource(folder)
    os.utime(file, ns=(0, modified))
    await source.pin(LATEST, AMD64)
    if not was_read():
        pytest.skip("this file system keeps no times of access")

    os.utime(file, ns=(0, modified))
    await source.pin(LATEST, AMD64)
    assert not was_read()


async def test_what_is_no_file_does_not_stop_a_pin(folder: Path) -> None:
    before = await revision(folder)
    os.mkfifo(folder / "fifo")
    (folder / "dangling").symlink_to("/nonexistent")
    Path(os.fsdecode(bytes(folder) + b"/\xff")).write_text("a name that is no UTF-8")

    assert await revision(folder) != before


async def test_only_what_the_folder_holds_now_has_a_tag(folder: Path) -> None:
    source = PathSource(folder)
    pinned = await source.pin(LATEST, AMD64)

    assert await source.pin(pinned.tag, AMD64) == pinned
    assert pinned == PinnedSource("path", str(folder), pinned.revision)
    with pytest.raises(
        ReferenceNotFoundError, match=f"'latest', and '{pinned.tag}' for what the folder holds"
    ):
        await source.pin("v1", AMD64)

    (folder / "default.nix").write_text("{ a = 1; }")
    with pytest.raises(ReferenceNotFoundError):
        await source.pin(pinned.tag, AMD64)


async def test_a_folder_that_is_gone_is_told(folder: Path) -> None:
    source = PathSource(folder)
    folder.rename(folder.with_name("moved"))

    with pytest.raises(
        SourceUnavailableError, match=f"path!{folder} can't be reached: {folder}: No such file"
    ):
        await source.pin(LATEST, AMD64)


# Debian


def keep(folder: Path, architecture: str, name: str) -> str:
    """Keep a lock of a suite with one package; give its revision."""
    packages = f"Package: {name}\nVersion: 1\nFilename: {name}.deb\nSHA256: {'0' * 64}"
    return keep_lock(folder / f"{SUITE}-{architecture}", [packages], ["http://127.0.0.1:1/debian"])[0]


async def test_the_latest_state_of_a_suite_is_pinned_and_each_state_has_a_tag(tmp_path: Path) -> None:
    source = DebianSource(SUITE, tmp_path, DebianMirrors())
    first = keep(tmp_path, "amd64", "git")
    second = keep(tmp_path, "amd64", "jq")

    latest = await source.pin(LATEST, AMD64)
    earlier = await source.pin(first[:16], AMD64)

    assert latest == PinnedSource("debian", SUITE, second)
    assert earlier == PinnedSource("debian", SUITE, first)
    assert await source.pin(earlier.tag, AMD64) == earlier
    assert latest.to_nix() == {
        "kind": "debian",
        "location": SUITE,
        "lock": f"{tmp_path}/{SUITE}-amd64/locks/{second}",
        "mirrors": ["http://127.0.0.1:1/debian"],
    }


@pytest.mark.parametrize("reference", ["v1", "0" * 16, "bookworm"])
async def test_another_tag_is_not_found_and_the_hint_says_what_there_is(
    tmp_path: Path, reference: str
) -> None:
    keep(tmp_path, "amd64", "git")

    with pytest.raises(ReferenceNotFoundError, match="there is 'latest', and for each state of the index"):
        await DebianSource(SUITE, tmp_path, DebianMirrors()).pin(reference, AMD64)


async def test_a_state_belongs_to_an_architecture(tmp_path: Path) -> None:
    source = DebianSource(SUITE, tmp_path, DebianMirrors())
    revisions = {each: keep(tmp_path, each, f"of-{each}") for each in ARCHITECTURES}

    for architecture, revision_of_it in revisions.items():
        assert (await source.pin(LATEST, Platform("linux", architecture))).revision == revision_of_it
    with pytest.raises(ReferenceNotFoundError):
        await source.pin(revisions["arm64"][:16], AMD64)


async def test_an_index_is_fetched_for_the_host_and_for_what_was_asked_for(tmp_path: Path) -> None:
    host = Platform.of_host().architecture
    [other] = set(ARCHITECTURES) - {host}
    with debian_repository(tmp_path) as repository:
        repository.publish(Deb("git", architecture="any"))
        source = DebianSource(SUITE, tmp_path, repository.mirrors)

        def fetched() -> list[str]:
            found = [
                each
                for each in ARCHITECTURES
                if any(f"binary-{each}/" in path for path in repository.requests)
            ]
            repository.requests.clear()
            return found

        await source.refresh(max_age=3600)
        assert fetched() == [host]
        await source.pin(LATEST, Platform("linux", other))
        assert fetched() == [other]
        repository.publish(Deb("git", "2", architecture="any"))
        await source.refresh(max_age=3600)
        assert fetched() == []
        await source.refresh(max_age=0)
        assert fetched() == list(ARCHITECTURES)
