import gzip
import io
import multiprocessing
import os
import select
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
import zstandard

from chandlery.demo import sandbox
from chandlery.demo.sandbox import SandboxError, UnsafeEntryError, unpack

P = ParamSpec("P")
R = TypeVar("R")

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, kind: bytes, mode: int = 0o644, link: str = "", content: bytes = b"") -> Entry:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.size, info.mtime = kind, mode, link, len(content), 1
    return info, content


def file(name: str, content: bytes = b"", mode: int = 0o644) -> Entry:
    return entry(name, tarfile.REGTYPE, mode, content=content)


def folder(name: str, mode: int = 0o755) -> Entry:
    return entry(name, tarfile.DIRTYPE, mode)


def link(name: str, target: str) -> Entry:
    return entry(name, tarfile.SYMTYPE, 0o777, target)


def hard_link(name: str, target: str) -> Entry:
    return entry(name, tarfile.LNKTYPE, link=target)


def tar(*entries: Entry) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_layers(folder: Path, *layers: bytes) -> list[Path]:
    paths = [folder / f"layer-{number}" for number in range(len(layers))]
    for path, layer in zip(paths, layers, strict=True):
        path.write_bytes(layer)
    return paths


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "machine" / "root"


@pytest.fixture
def apply(tmp_path: Path, root: Path) -> Callable[..., None]:
    """Unpack layers, each given as a list of entries, in `root`."""
    return lambda *layers: unpack(write_layers(tmp_path, *(tar(*layer) for layer in layers)), root)


def content(root: Path) -> dict[str, str]:
    """Return what is in a folder: texts of files, targets of links, and / for folders."""
    return {
        str(path.relative_to(root)): f"-> {path.readlink()}"
        if path.is_symlink()
        else "/"
        if path.is_dir()
        else path.read_text()
        for path in root.rglob("*")
    }


# Unpacking


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_a_layer_is_unpacked_whatever_its_compression(
    compress: Callable[[bytes], bytes], tmp_path: Path, root: Path
) -> None:
    layer = compress(tar(folder("etc"), file("etc/hostname", b"here"), link("motd", "etc/hostname")))
    unpack(write_layers(tmp_path, layer), root)
    assert content(root) == {"etc": "/", "etc/hostname": "here", "motd": "-> etc/hostname"}


def test_modes_and_times_are_those_of_the_archive(apply: Callable[..., None], root: Path) -> None:
    apply(
        [
            folder("./", 0o755),
            folder("closed", 0o555),
            file("closed/program", b"", 0o755),
            folder("tmp", 0o1777),
        ]
    )
    assert stat.S_IMODE((root / "closed").stat().st_mode) == 0o555
    assert stat.S_IMODE((root / "closed/program").stat().st_mode) == 0o755
    assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777
    assert {path.lstat().st_mtime for path in [root, *root.rglob("*")]} == {1}


def test_no_file_gets_a_setuid_bit(apply: Callable[..., None], root: Path) -> None:
    apply([file("su", b"", 0o6755)])
    assert stat.S_IMODE((root / "su").stat().st_mode) == 0o755


def test_a_later_layer_replaces_files_and_merges_folders(apply: Callable[..., None], root: Path) -> None:
    apply(
        [file("a/kept", b"1"), file("a/replaced", b"1"), link("b", "a"), file("c/d", b"1")],
        [file("a/replaced", b"2"), folder("b"), file("b/new", b"2"), file("c", b"2")],
    )
    assert content(root) == {
        "a": "/",
        "a/kept": "1",
        "a/replaced": "2",
        "b": "/",
        "b/new": "2",
        "c": "2",
    }


def test_a_file_is_not_written_through_a_hard_link(apply: Callable[..., None], root: Path) -> None:
    apply([file("one", b"1"), hard_link("two", "one")], [file("two", b"2")])
    assert content(root) == {"one": "1", "two": "2"}


def test_a_whiteout_removes_what_lower_layers_have(apply: Callable[..., None], root: Path) -> None:
    apply([file("a/file"), file("a/folder/file"), file("b")], [file("a/.wh.folder"), file(".wh.b")])
    assert content(root) == {"a": "/", "a/file": ""}


def test_an_opaque_whiteout_hides_lower_layers_only_wherever_it_stands(
    apply: Callable[..., None], root: Path
) -> None:
    lower = [file("a/old", b"1"), file("a/b/old", b"1")]
    upper = [file("a/b/new", b"2"), file("a/.wh..wh..opq"), file("a/new", b"2")]
    apply(lower, upper)
    assert content(root) == {"a": "/", "a/b": "/", "a/b/new": "2", "a/new": "2"}


def test_a_whiteout_through_a_link_stays_inside(apply: Callable[..., None], root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir(parents=True)
    (outside / "file").touch()
    apply([link("way", str(outside)), file("way/.wh.file"), file("way/.wh..wh..opq")])
    assert (outside / "file").exists()


@pytest.mark.parametrize("target", ["usr/bin", "/usr/bin", "../../usr/bin", "usr/../../usr/./bin"])
def test_links_are_followed_as_if_the_root_were_the_machines(
    target: str, apply: Callable[..., None], root: Path
) -> None:
    apply([link("bin", target)], [file("bin/sh", b"#!")])
    assert (root / "usr/bin/sh").read_text() == "#!"
    assert list(root.parent.iterdir()) == [root]


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param([file("../out")], id="parent"),
        pytest.param([file("a/../../out")], id="parent in the middle"),
        pytest.param([folder("..", 0o777)], id="the parent itself"),
        pytest.param([file(".wh...")], id="whiteout of the parent"),
        pytest.param([file("a"), file(".wh.")], id="whiteout of nothing"),
        pytest.param([link("a", "b"), link("b", "a"), file("a/c")], id="links in a circle"),
        pytest.param([entry("disk", tarfile.BLKTYPE)], id="block device"),
        pytest.param([entry("console", tarfile.CHRTYPE)], id="character device"),
    ],
)
def test_hostile_entries_are_refused(hostile: list[Entry], apply: Callable[..., None], root: Path) -> None:
    with pytest.raises(UnsafeEntryError):
        apply(hostile)
    assert list(root.parent.iterdir()) == [root]


def changes(path: Path) -> tuple[int, ...]:
    """Return what would tell that somebody wrote; whoever only reads changes the access time."""
    status = path.stat()
    return (status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@pytest.mark.parametrize("way", ["{outside}", "../outside", "a/../../../outside"])
def test_nothing_is_written_outside_the_root(way: str, apply: Callable[..., None], root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir(parents=True)
    secret = outside / "secret"
    secret.write_text("untouched")
    before = changes(outside), changes(secret)
    target = way.format(outside=outside)
    attempts = [
        [link("way", target), file("way/new", b"hostile")],
        [link("file", f"{target}/secret"), file("file", b"hostile", 0o777)],
        [link("way2", target), folder("way2", 0o777)],
        [folder("x"), folder("x/y", 0o777), link("z", target)],
        [file(f"{outside}/absolute", b"hostile")],
    ]
    apply(*attempts)
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert secret.read_text() == "untouched"
    assert (changes(outside), changes(secret)) == before


def test_the_mode_of_a_folder_is_not_set_through_a_link_that_took_its_parents_place(
    apply: Callable[..., None], root: Path
) -> None:
    inner = root.parent / "outside" / "inner"
    inner.mkdir(parents=True, mode=0o700)
    apply([folder("way/inner", 0o777)], [link("way", str(inner.parent))])
    assert stat.S_IMODE(inner.stat().st_mode) == 0o700


@pytest.mark.parametrize("target", ["{outside}/secret", "../outside/secret", "way/secret"])
def test_a_hard_link_can_not_reach_outside(target: str, apply: Callable[..., None], root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir(parents=True)
    (outside / "secret").write_text("secret")
    with pytest.raises(SandboxError):
        apply([link("way", str(outside)), hard_link("mine", target.format(outside=outside))])
    assert not (root / "mine").exists()


@pytest.mark.parametrize(
    "broken",
    [
        b"\x1f\x8bnot gzip",
        b"\x28\xb5\x2f\xfdnot zstd",
        b"not a tar archive",
        gzip.compress(tar(file("a", bytes(9999))), mtime=0)[:-20],
        tar(file("a\0b")).replace(b"ustar", b"xxxxx"),
        tar((tarfile.TarInfo("x" * 300), b"")),
    ],
)
def test_a_broken_archive_is_named(broken: bytes, tmp_path: Path, root: Path) -> None:
    with pytest.raises(SandboxError, match=r"layer-0 can't be unpacked"):
        unpack(write_layers(tmp_path, broken), root)


# Running


def _become_nobody() -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


class User:
    """Calls functions as root or as an ordinary user, with a folder that is that user's own."""

    def __init__(self, folder: Path, pool: ProcessPoolExecutor | None) -> None:
        self.folder = folder
        self._pool = pool

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return (
            self._pool.submit(function, *args, **kwargs).result() if self._pool else function(*args, **kwargs)
        )


@pytest.fixture(scope="module", params=["root", "nobody"])
def user(request: pytest.FixtureRequest) -> Iterator[User]:
    if request.param == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    # pytest's own folders are closed to other users.
    with tempfile.TemporaryDirectory(prefix="chandlery-") as name:
        if request.param == "root" or os.geteuid() != 0:
            yield User(Path(name), None)
            return
        os.chown(name, 65534, 65534)
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(1, mp_context=fork, initializer=_become_nobody) as pool:
            yield User(Path(name), pool)


def program_files(*programs: str) -> Iterator[Entry]:
    """Yield this machine's programs in /usr/bin, and the libraries that they are linked with."""
    needed: set[str] = set()
    for program in programs:
        path = shutil.which(program)
        assert path is not None
        yield file(f"usr/bin/{program}", Path(path).read_bytes(), 0o755)
        listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
        needed.update(word for word in listed.split() if word.startswith("/"))
    for path in sorted(needed):
        yield file(path, Path(path).read_bytes(), 0o755)


@pytest.fixture(scope="module")
def image(user: User) -> Path:
    layer = tar(
        folder("./"),
        folder("tmp", 0o1777),
        folder("usr/bin", 0o555),
        link("bin", "usr/bin"),
        entry("pipe", tarfile.FIFOTYPE, 0o600),
        *program_files("sh", "cat", "ls", "id", "sleep", "mount", "umount", "chroot"),
    )
    root = user.folder / "root"
    user.call(unpack, write_layers(user.folder, layer), root)
    return root


@pytest.fixture
def run(user: User, image: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run a shell script in the image."""
    environment = {"PATH": "/usr/bin", "GREETING": "hello, you"}

    def run_script(script: str, **options: str | float) -> "subprocess.CompletedProcess[str]":
        return user.call(sandbox.run, image, ["sh", "-c", script], environment, **options)  # type: ignore[arg-type]

    return run_script


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_a_program_gets_its_environment_and_gives_its_output(run: Run) -> None:
    finished = run('echo "$GREETING"; echo "$HOME" >&2; cat; exit 3', stdin="typed")
    assert (finished.stdout, finished.stderr, finished.returncode) == ("hello, you\ntyped", "\n", 3)


def test_a_program_is_root_among_its_own_files(run: Run) -> None:
    finished = run("id -u; echo new > /usr/bin/new && cat /usr/bin/new")
    assert (finished.stdout, finished.stderr) == ("0\nnew\n", "")


def test_a_program_sees_the_image_and_no_more(run: Run) -> None:
    finished = run("echo /*; echo $$; cat /proc/net/dev; ls /dev; ls /..")
    assert "/root" not in finished.stdout
    assert "eth0" not in finished.stdout
    assert finished.stdout.splitlines()[1] == "1"
    assert {"null", "zero", "random", "urandom"} <= set(finished.stdout.split())


def test_devices_work(run: Run) -> None:
    finished = run("echo gone > /dev/null && cat /dev/null && cat < /dev/fd/0", stdin="in")
    assert (finished.stdout, finished.stderr) == ("in", "")


def test_a_program_can_not_undo_its_sandbox(run: Run) -> None:
    finished = run("umount / || umount -l / || mount -t proc proc /tmp || chroot /.. ls /")
    assert "tmp" in finished.stdout.split()
    assert "home" not in finished.stdout.split()


def test_a_program_that_takes_too_long_is_killed_with_its_children(run: Run, image: Path) -> None:
    # A pipe is at its end when all who had it open for writing are gone.
    pipe = os.open(image / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(pipe, "rb", buffering=0) as reader:
        with pytest.raises(SandboxError, match="did not end within"):
            run("exec > /pipe; echo started; sleep 60 & sleep 60", timeout=1)
        assert reader.read(8) == b"started\n"
        ended, _, _ = select.select([reader], [], [], 30)
        assert ended
        assert reader.read(1) == b""


def test_a_missing_program_is_the_programs_own_failure(user: User, image: Path) -> None:
    finished = user.call(sandbox.run, image, ["nothing"], {"PATH": "/usr/bin"})
    assert finished.returncode == 127
    assert "nothing" in finished.stderr


def test_mount_points_are_not_links(user: User) -> None:
    root = user.folder / "linked"
    layers = write_layers(user.folder, tar(link("dev", "/etc")))
    user.call(unpack, layers, root)
    with pytest.raises(SandboxError, match="not a directory"):
        user.call(sandbox.run, root, ["true"], {})


def test_a_refused_sandbox_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = tmp_path / "bin" / "unshare"
    refusing.parent.mkdir()
    refusing.write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2; exit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{refusing.parent}:{os.environ['PATH']}")
    with pytest.raises(SandboxError, match=r"Operation not permitted.*(user namespaces|engine)"):
        sandbox.run(tmp_path, ["true"], {})
