import io
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chandlery.errors import StorageFullError
from chandlery.machine.tarball import TarballError, TarballLimits, unpack
from tests.support.channel_server import compressed, tarball

COMMIT = "4f0d3a9" + "0" * 33

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a small disk")

Entry = tuple[str, dict[str, object], bytes]


def reader(content: bytes, size: int = 1 << 16) -> Callable[[], bytes]:
    """Return the bytes in pieces of this size."""
    file = io.BytesIO(content)
    return lambda: file.read(size)


def tar(*entries: Entry) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, attributes, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def file(name: str, content: bytes = b"content", mode: int = 0o644) -> Entry:
    return name, {"mode": mode}, content


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Entry:
    return name, {"type": kind, "linkname": target}, b""


def tree(folder: Path) -> dict[str, str]:
    """Return what is below a folder: contents of files, targets of links."""
    return {
        str(path.relative_to(folder)): f"-> {path.readlink()}" if path.is_symlink() else path.read_text()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize("compression", ["gz", "xz", "zst", "none"])
@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_a_tarball_is_unpacked_without_the_folder_around_it(
    tmp_path: Path, compression: str, size: int
) -> None:
    content = tarball({"default.nix": b"{ }", "pkgs/git/git.nix": b"git"}, COMMIT, compression=compression)

    assert unpack(reader(content, size), tmp_path) == COMMIT
    assert tree(tmp_path) == {"default.nix": "{ }", "pkgs/git/git.nix": "git"}


def test_a_tarball_of_git_itself_is_unpacked(tmp_path: Path) -> None:
    # What git and tar write is not quite what Python's tarfile does.
    files = {"default.nix": b"{ }", f"{'long/' * 40}{'n' * 200}.nix": b"deep", "grün.nix": b"green"}
    git, folder = tmp_path / "git", tmp_path / "folder"
    for name, text in files.items():
        (git / name).parent.mkdir(parents=True, exist_ok=True)
        (git / name).write_bytes(text)
    (git / "run").symlink_to("default.nix")
    (git / "default.nix").chmod(0o755)

    def run(*argv: str) -> bytes:
        return subprocess.run(
            ["git", "-C", git, "-c", "user.name=T", "-c", "user.email=t@localhost", *argv],
            check=True,
            capture_output=True,
        ).stdout

    run("init", "-q")
    run("add", "-A")
    run("commit", "-qm", "all")
    commit = run("rev-parse", "HEAD").decode().strip()
    content = run("archive", "--format=tar.gz", f"--prefix=nixpkgs-{commit}/", "HEAD")
    folder.mkdir()

    assert unpack(reader(content), folder) == commit
    assert tree(folder) == {**{name: text.decode() for name, text in files.items()}, "run": "-> default.nix"}
    assert os.access(folder / "default.nix", os.X_OK)
    assert not (folder / "grün.nix").stat().st_mode & 0o111


def test_of_modes_only_that_a_file_may_be_run_is_kept(tmp_path: Path) -> None:
    modes = {"plain": 0o666, "program": 0o777, "setuid": 0o6755, "hidden": 0o000, "sticky": 0o1644}
    unpack(reader(tar(*(file(f"top/{name}", mode=mode) for name, mode in modes.items()))), tmp_path)

    found = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in modes}
    assert found == {
        "plain": 0o644, "program": 0o755, "setuid": 0o755, "hidden": 0o644, "sticky": 0o644,
    }  # fmt: skip


def test_links_within_the_tree_are_kept(tmp_path: Path) -> None:
    content = tar(
        file("top/a/file"),
        link("top/a/near", "file"),
        link("top/b/far", "../a/file"),
        link("top/b/later", "../c/file"),
        link("top/b/dangling", "nothing"),
        link("top/folder", "a"),
        link("top/here", "."),
        file("top/c/file"),
        link("top/b/hard", "top/a/file", tarfile.LNKTYPE),
    )
    unpack(reader(content), tmp_path)

    assert tree(tmp_path) == {
        "a/file": "content",
        "a/near": "-> file",
        "b/far": "-> ../a/file",
        "b/later": "-> ../c/file",
        "b/dangling": "-> nothing",
        "b/hard": "content",
        "c/file": "content",
        "folder": "-> a",
        "here": "-> .",
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tar(file("/etc/passwd")), "'/etc/passwd' leads out of it"),
        (tar(file("top/../../evil")), "leads out of it"),
        (tar(file("../evil")), "leads out of it"),
        (tar(file("top/a"), file("other/b")), "'other/b' stands beside 'top', its one folder"),
        (tar(file("default.nix")), "'default.nix' stands beside its one folder"),
        (tar(link("top/evil", "/etc/passwd")), "the link 'evil' leads out of it"),
        (tar(link("top/evil", "../evil")), "the link 'evil' leads out of it"),
        (tar(link("top/a/evil", "b/../../../evil")), "the link 'a/evil' leads out of it"),
        # Each of two links stays inside, and together they don't.
        (
            tar(file("top/a/b/file"), link("top/a/b/up", "../.."), link("top/evil", "a/b/up/../evil")),
            "the link 'evil' leads out of it",
        ),
        # What is written through a link is written elsewhere.
        (tar(link("top/evil", "/tmp"), file("top/evil/file")), "'evil' is a folder, and something else"),
        (tar(link("top/evil", "a"), file("top/evil", b"x")), "'top/evil' is in it twice"),
        (tar(file("top/a"), file("top/a")), "'top/a' is in it twice"),
        (tar(file("top/a"), file("top/a/b")), "'a' is a folder, and something else"),
        (tar(link("top/evil", "/etc/passwd", tarfile.LNKTYPE)), "'/etc/passwd' leads out of it"),
        (tar(link("top/evil", "top/nothing", tarfile.LNKTYPE)), "leads to nothing in it"),
        (
            tar(link("top/link", "/etc/passwd"), link("top/evil", "top/link", tarfile.LNKTYPE)),
            "leads to nothing in it",
        ),
        (
            tar(link("top/link", "/etc"), link("top/evil", "top/link/passwd", tarfile.LNKTYPE)),
            "leads to nothing in it",
        ),
        (tar(("top/fifo", {"type": tarfile.FIFOTYPE}, b"")), "neither a file, a folder nor a link"),
        (tar(("top/disk", {"type": tarfile.BLKTYPE}, b"")), "neither a file, a folder nor a link"),
        (tar(("top/tty", {"type": tarfile.CHRTYPE}, b"")), "neither a file, a folder nor a link"),
        (tar(), "there is nothing in it"),
        (b"", "it can't be unpacked"),
        (b"<html>Log in to this network</html>", "it can't be unpacked"),
        (b"\x1f\x8b and then nothing of gzip", "it can't be unpacked"),
        (b"\xfd7zXZ\0 and then nothing of xz", "it can't be unpacked"),
        (b"\x28\xb5\x2f\xfd and then nothing", "it can't be unpacked"),
    ],
)
def test_what_no_source_tarball_would_hold_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    folder = tmp_path / "one/two/three"
    folder.mkdir(parents=True)

    with pytest.raises(TarballError, match=reason.replace("(", r"\(")):
        unpack(reader(content), folder)

    assert not list(tmp_path.rglob("evil/file"))
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("compression", ["gz", "xz", "zst", "none"])
@settings(max_examples=30)
@given(part=st.floats(0, 1))
def test_a_tarball_that_was_cut_off_is_refused_wherever_that_was(compression: str, part: float) -> None:
    files = {f"file{number}": os.urandom(700) for number in range(5)}
    plain = tarball(files, COMMIT, compression="none")
    # Without the zeros after the end, which nothing depends on.
    content = compressed(plain.rstrip(b"\0") + bytes(1024), compression)
    cut = int(part * (len(content) - 513 if compression == "none" else len(content) - 1))

    with tempfile.TemporaryDirectory() as folder, pytest.raises(TarballError):
        unpack(reader(content[:cut]), Path(folder))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_tarball_is_refused_or_stays_inside_its_folder(data: st.DataObject) -> None:
    content = bytearray(
        tar(file("top/a/file"), link("top/link", "a/file"), file(f"top/{'long' * 40}"), file("top/z" * 30))
    )
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[position] = data.draw(st.integers(0, 255))

    with tempfile.TemporaryDirectory() as outside:
        folder = Path(outside) / "folder"
        folder.mkdir()
        with suppress(TarballError):
            unpack(reader(bytes(content)), folder, TarballLimits(size=1 << 20, entries=100))
        assert [path.name for path in Path(outside).iterdir()] == ["folder"]


def test_what_is_larger_than_the_limit_is_refused_before_it_is_all_there(tmp_path: Path) -> None:
    bomb = tarball({"zeros": bytes(50 << 20)}, COMMIT)
    assert len(bomb) < 100_000

    with pytest.raises(TarballError, match="more than 4194304 bytes when it is unpacked"):
        unpack(reader(bomb), tmp_path, TarballLimits(size=4 << 20))
    assert (tmp_path / "zeros").stat().st_size <= 4 << 20


def test_more_entries_than_the_limit_are_refused(tmp_path: Path) -> None:
    many = tarball({f"file{number}": b"" for number in range(20)}, COMMIT)

    with pytest.raises(TarballError, match="more than 10 entries"):
        unpack(reader(many), tmp_path, TarballLimits(entries=10))
    assert len(list(tmp_path.iterdir())) <= 10


def test_a_header_is_not_read_whatever_its_size(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    content = header.tobuf(tarfile.USTAR_FORMAT) + bytes(4 << 20)

    with pytest.raises(TarballError, match="a header of 1073741824 bytes"):
        unpack(reader(content), tmp_path)


def test_headers_without_end_are_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 0

    with pytest.raises(TarballError):
        unpack(reader(header.tobuf(tarfile.USTAR_FORMAT) * 10_000), tmp_path)


@needs_root
def test_a_full_disk_is_told_apart(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=True)
    try:
        with pytest.raises(StorageFullError):
            unpack(reader(tarball({"file": os.urandom(2 << 20)}, COMMIT)), tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_what_the_reader_raises_is_raised(tmp_path: Path) -> None:
    class LostError(Exception):
        pass

    def lose() -> bytes:
        raise LostError

    with pytest.raises(LostError):
        unpack(lose, tmp_path)
