import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.sources.folder_content import ContentChangedError, Copied, FolderContent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    (folder / "pkgs/empty").mkdir(parents=True)
    (folder / "default.nix").write_text("{ }")
    (folder / "pkgs/git.nix").write_text("git")
    (folder / "script").write_text("#!/bin/sh")
    (folder / "script").chmod(0o755)
    (folder / "link").symlink_to("default.nix")
    (folder / ".git").mkdir()
    (folder / ".git/HEAD").write_text("main")
    return folder


def revision(folder: Path) -> str:
    return FolderContent(folder).snapshot().revision


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
        lambda folder: Path(os.fsdecode(bytes(folder) + b"/\xff")).write_text("a name that is no UTF-8"),
        lambda folder: (folder / "dangling").symlink_to("/nonexistent"),
    ],
)
def test_a_revision_changes_with_names_contents_links_and_the_executable_bit(
    folder: Path, change: Callable[[Path], object]
) -> None:
    content = FolderContent(folder)
    before = content.snapshot().revision

    change(folder)

    assert content.snapshot().revision != before
    assert revision(folder) != before


def rewrite_with_the_old_time(folder: Path) -> None:
    file = folder / "default.nix"
    times = file.stat()
    file.write_text("[ ]")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_file_that_was_written_with_its_old_time_and_size_is_read_again(folder: Path) -> None:
    content = FolderContent(folder)
    before = content.snapshot().revision

    rewrite_with_the_old_time(folder)

    assert content.snapshot().revision == revision(folder) != before


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
        lambda folder: os.mkfifo(folder / "fifo"),
    ],
)
def test_a_revision_does_not_change_with_times_or_what_is_no_content(
    folder: Path, change: Callable[[Path], object]
) -> None:
    content = FolderContent(folder)
    before = content.snapshot().revision

    change(folder)

    assert content.snapshot().revision == before
    assert revision(folder) == before


def test_a_revision_is_the_same_for_ever() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "pkgs").mkdir()
        (folder / "default.nix").write_text("{ }")
        (folder / "pkgs/link").symlink_to("../default.nix")

        assert revision(folder) == "4c3ea6457861d0ff89c78f1ab3bd7e05181586d878c1d153cfcc29b9a169c4c3"


names = st.text("ab.", min_size=1, max_size=3).filter(lambda name: name not in (".", ".."))
trees = st.dictionaries(st.lists(names, min_size=1, max_size=3).map(tuple), st.binary(max_size=3), max_size=4)
# No name is a file and a folder.
sound_trees = trees.filter(
    lambda tree: not any(path[:depth] in tree for path in tree for depth in range(1, len(path)))
)


def write(folder: Path, tree: Mapping[tuple[str, ...], bytes]) -> None:
    for path, content in tree.items():
        file = folder.joinpath(*path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


@given(sound_trees, sound_trees)
def test_different_folders_have_different_revisions(
    one: dict[tuple[str, ...], bytes], other: dict[tuple[str, ...], bytes]
) -> None:
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        write(Path(first), one)
        write(Path(second), dict(reversed(other.items())))

        assert (revision(Path(first)) == revision(Path(second))) == (one == other)


@given(sound_trees, sound_trees)
def test_a_copy_is_what_was_copied_also_on_top_of_an_earlier_one(
    one: dict[tuple[str, ...], bytes], other: dict[tuple[str, ...], bytes]
) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write(folder / "one", one)
        write(folder / "other", other)
        (folder / "one").mkdir(exist_ok=True)
        (folder / "other").mkdir(exist_ok=True)
        earlier = None
        for name in ("one", "other"):
            content = FolderContent(folder / name)
            snapshot = content.snapshot()
            content.copy(snapshot, folder / f"copy-of-{name}", earlier, threading.Event())
            earlier = Copied(folder / f"copy-of-{name}", snapshot)

            assert revision(folder / f"copy-of-{name}") == snapshot.revision


def test_a_revision_does_not_depend_on_the_order_in_which_a_file_system_lists_names() -> None:
    revisions = set()
    for names_in_order in ("abc", "cba"):
        # tmpfs lists names by when they were made.
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            for name in names_in_order:
                (Path(folder) / name).mkdir()
                (Path(folder) / name / "file").write_text(name)
            revisions.add(revision(Path(folder)))

    assert len(revisions) == 1


def test_a_file_that_did_not_change_is_not_read_again(folder: Path) -> None:
    # Otherwise one that has just been written is read twice.
    content = FolderContent(folder, coarse=-1e9)
    file = folder / "default.nix"

    def was_read() -> bool:
        return file.stat().st_atime_ns != before

    os.utime(file, ns=(0, file.stat().st_mtime_ns))
    before = 0
    content.snapshot()
    if not was_read():
        pytest.skip("this file system keeps no times of access")

    before = file.stat().st_atime_ns
    content.snapshot()
    assert not was_read()


# Copies


def copied(folder: Path, target: Path, earlier: Copied | None = None) -> Copied:
    content = FolderContent(folder)
    snapshot = content.snapshot()
    content.copy(snapshot, target, earlier, threading.Event())
    return Copied(target, snapshot)


def test_links_are_copied_as_links_and_what_holds_nothing_is_left_out(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "dangling").symlink_to("/nonexistent")
    copy = copied(folder, tmp_path / "copy").tree

    assert (copy / "link").readlink() == Path("default.nix")
    assert (copy / "dangling").readlink() == Path("/nonexistent")
    assert (copy / "script").stat().st_mode & 0o777 == 0o755
    assert (copy / "pkgs/empty").is_dir()
    assert not (copy / "fifo").exists()
    assert not (copy / ".git").exists()
    assert revision(copy) == revision(folder)


def test_a_copy_shares_files_with_an_earlier_copy_and_none_with_the_folder(
    folder: Path, tmp_path: Path
) -> None:
    first = copied(folder, tmp_path / "first")
    (folder / "default.nix").write_text("{ a = 1; }")
    second = copied(folder, tmp_path / "second", first)

    assert (second.tree / "script").samefile(first.tree / "script")
    assert not (second.tree / "default.nix").samefile(first.tree / "default.nix")
    for copy in (first, second):
        assert not any((copy.tree / each).samefile(folder / each) for each in ("script", "default.nix"))
    assert revision(first.tree) == first.snapshot.revision
    assert revision(second.tree) == second.snapshot.revision == revision(folder)


def test_an_earlier_copy_that_was_removed_is_no_loss(folder: Path, tmp_path: Path) -> None:
    first = copied(folder, tmp_path / "first")
    first.tree.rename(tmp_path / "away")

    assert revision(copied(folder, tmp_path / "second", first).tree) == revision(folder)


def replace_by_fifo(folder: Path) -> None:
    (folder / "default.nix").unlink()
    os.mkfifo(folder / "default.nix")


def replace_by_link(folder: Path) -> None:
    (folder / "default.nix").unlink()
    (folder / "default.nix").symlink_to("pkgs/git.nix")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "default.nix").write_text("[ ]"),
        lambda folder: (folder / "default.nix").chmod(0o755),
        lambda folder: (folder / "default.nix").unlink(),
        replace_by_fifo,
        replace_by_link,
    ],
)
def test_a_folder_that_changed_since_it_was_looked_at_is_noticed(
    folder: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    content = FolderContent(folder)
    snapshot = content.snapshot()
    change(folder)

    with pytest.raises(ContentChangedError):
        content.copy(snapshot, tmp_path / "copy", None, threading.Event())


def test_a_copy_can_be_stopped(folder: Path, tmp_path: Path) -> None:
    content, stopped = FolderContent(folder), threading.Event()
    stopped.set()

    with pytest.raises(ContentChangedError):
        content.copy(content.snapshot(), tmp_path / "copy", None, stopped)
