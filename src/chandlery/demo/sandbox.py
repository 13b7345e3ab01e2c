"""Running a program in an image without a container engine: `make demo` on a machine that has none.

Two steps. `unpack` applies layers, one on another, in a folder; `run` starts a program in it.

An archive is not trusted. Names are followed as though the folder were `/`, so no `..`, absolute name or
symbolic link leads out of it; nothing is written through a link; device nodes are refused, and no file gets
a setuid bit. Layers are applied in order as image-spec's layer.md says, whiteouts included.

A program has namespaces of its own (mount, pid, ipc, uts, net; and user, for whoever isn't root), and sees
the image, /proc and a few devices; there is no network. util-linux does it, which every Debian machine has: a
bind mount of the folder is moved over `/`, so that no way leads out of it, and only those capabilities stay
that let a program be root among its own files. It is for trying an image out: it limits neither memory nor
the use of the processor.
"""

import asyncio
import gzip
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from zstandard import ZstdDecompressor, ZstdError

from chandlery.errors import ChandleryError
from chandlery.machine import program
from chandlery.machine.program import Limits, OutputLimitError, ProgramMissingError, TimeLimitError

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_WHITEOUT = ".wh."  # image-spec, layer.md, "Whiteouts"
_OPAQUE_WHITEOUT = ".wh..wh..opq"
_MOST_LINKS = 40  # as Linux has it (path_resolution(7))
_KEPT_MODE_BITS = 0o1777  # no setuid and setgid: an image raises nobody's rights on this machine


class SandboxError(ChandleryError):
    """An image can't be unpacked, or a sandbox can't be made on this machine."""


class UnsafeEntryError(SandboxError):
    """A layer has an entry that no honest image has."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"the layer's entry {name!r} is refused: {reason}")
        self.name = name
        self.reason = reason


def unpack(layers: Iterable[Path], root: Path) -> None:
    """Apply layer blobs (tar, plain or in gzip or zstd) in `root`, the lowest first; it is made if need be.

    Who owns a file, as the archive says, is set by root only. Raises `SandboxError` for an archive that is
    broken and `UnsafeEntryError` for a hostile one; what was unpacked until then stays in `root`.
    """
    root.mkdir(parents=True, exist_ok=True)
    tree = _Tree(root.resolve())
    for layer in layers:
        with (
            _errors_about(layer),
            _tar_stream(layer) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            tree.apply(archive)
    with _errors_about(root):
        tree.finish()


@contextmanager
def _errors_about(path: Path) -> Iterator[None]:
    """Turn what the tar reader, the decompressors and the file system say into `SandboxError`."""
    try:
        yield
    except (OSError, EOFError, ValueError, OverflowError, tarfile.TarError, zlib.error, ZstdError) as error:
        raise SandboxError(f"{path} can't be unpacked: {error}") from error


@contextmanager
def _tar_stream(layer: Path) -> Iterator[IO[bytes]]:
    """Open a layer blob decompressed; its first bytes tell the compression."""
    with layer.open("rb") as blob:
        magic = blob.read(len(_ZSTD_MAGIC))
        blob.seek(0)
        if magic.startswith(_GZIP_MAGIC):
            with gzip.open(blob) as stream:
                yield cast("IO[bytes]", stream)
        elif magic == _ZSTD_MAGIC:
            with ZstdDecompressor().stream_reader(blob, read_across_frames=True) as stream:
                yield stream
        else:
            yield blob


class _Tree:
    """A root filesystem in the making. Its paths are resolved: only the last part may be a symbolic link."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._from_this_layer: set[Path] = set()
        # An ordinary user can't write in a directory of mode 0555, and each new entry changes a directory's
        # time; so both are set when all layers are there.
        self._directories: dict[Path, tarfile.TarInfo] = {}

    def apply(self, archive: tarfile.TarFile) -> None:
        """Put one layer over what is there."""
        self._from_this_layer = {self._root}
        for entry in archive:
            parts = _parts(entry.name)
            if ".." in parts:
                raise UnsafeEntryError(entry.name, "its name has ..")
            if not parts:
                self._directories[self._root] = entry
                continue
            *parents, name = parts
            parent = self._resolve(parents, entry.name)
            if name == _OPAQUE_WHITEOUT:
                self._hide_content(parent)
            elif name.startswith(_WHITEOUT):
                hidden = name.removeprefix(_WHITEOUT)
                if hidden in ("", ".", ".."):
                    raise UnsafeEntryError(entry.name, "it is a whiteout of nothing")
                self._hide(parent / hidden)
            else:
                parent.mkdir(parents=True, exist_ok=True)
                self._put(archive, entry, parent / name)

    def finish(self) -> None:
        """Set the modes and times of directories, the deepest first."""
        for path, entry in sorted(self._directories.items(), reverse=True):
            # A later entry may have put something else here, or a link in place of a parent.
            if path.resolve() == path and path.is_dir():
                _set_metadata(path, entry)

    def _resolve(self, parts: Sequence[str], name: str) -> Path:
        """Follow symbolic links as they are followed when the root is `/`; nothing needs to be there."""
        resolved = self._root
        pending = list(reversed(parts))
        links = 0
        while pending:
            part = pending.pop()
            if part == "..":
                resolved = resolved if resolved == self._root else resolved.parent
                continue
            resolved /= part
            if resolved.is_symlink():
                links += 1
                if links > _MOST_LINKS:
                    raise UnsafeEntryError(name, "too many symbolic links lead to it")
                target = str(resolved.readlink())
                resolved = self._root if target.startswith("/") else resolved.parent
                pending.extend(reversed(_parts(target)))
        return resolved

    def _hide(self, path: Path) -> None:
        """Remove what lower layers have at `path`; a whiteout says nothing about its own layer."""
        if path in self._from_this_layer:
            self._hide_content(path)
        else:
            _remove(path)

    def _hide_content(self, path: Path) -> None:
        if _is_directory(path):
            for child in list(path.iterdir()):
                self._hide(child)

    def _put(self, archive: tarfile.TarFile, entry: tarfile.TarInfo, path: Path) -> None:
        """Make one entry at `path`, in place of what a lower layer has there; directories are merged."""
        if entry.isdir():
            if not _is_directory(path):
                _remove(path)
                path.mkdir(0o700)
            self._directories[path] = entry
        else:
            _remove(path)
            self._make(archive, entry, path)
        while path not in self._from_this_layer:
            self._from_this_layer.add(path)
            path = path.parent

    def _make(self, archive: tarfile.TarFile, entry: tarfile.TarInfo, path: Path) -> None:
        """Make anything but a directory; nothing is at `path`."""
        if entry.islnk():  # another name for a file that is there, and so is its metadata
            *parents, name = _parts(entry.linkname) or [""]
            os.link(self._resolve(parents, entry.name) / name, path, follow_symlinks=False)
            return
        if entry.isreg():
            with path.open("xb") as file:
                shutil.copyfileobj(cast("IO[bytes]", archive.extractfile(entry)), file)
        elif entry.issym():
            path.symlink_to(entry.linkname)
        elif entry.isfifo():
            os.mkfifo(path)
        else:
            raise UnsafeEntryError(entry.name, "it is a device, or of no known type")
        _set_metadata(path, entry)


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    if _is_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _set_metadata(path: Path, entry: tarfile.TarInfo) -> None:
    """Set the owner (only root can), the mode and the time; a new owner would clear bits of the mode."""
    if os.geteuid() == 0:
        os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
    if not entry.issym():
        path.chmod(entry.mode & _KEPT_MODE_BITS)
    os.utime(path, (entry.mtime, entry.mtime), follow_symlinks=False)


# Runs as PID 1 of the new namespaces; $1 is the root, $2 a file that says that the set-up is done, and the
# rest is the program. Mounts are private, so all of them go when the program ends.
_SET_UP = """
root=$1 done=$2
shift 2
mount -n --bind -o nosuid,nodev "$root" "$root"
cd "$root"
mount -n -t proc -o nosuid,nodev,noexec proc proc
mount -n -t tmpfs -o nosuid,noexec,mode=755 dev dev
for device in null zero full random urandom tty; do
  if [ -e "/dev/$device" ]; then
    : > "dev/$device"
    mount -n --bind "/dev/$device" "dev/$device"
  fi
done
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin
ln -s fd/1 dev/stdout
ln -s fd/2 dev/stderr
: > "$done"
# Not only chroot: with the image over /, the way up from the image leads to the image.
mount -n --move . /
exec "$@"
"""

_NAMESPACES = ("--mount", "--pid", "--fork", "--kill-child", "--ipc", "--uts", "--net")
# What Docker leaves, less making devices, raw sockets and what only matters with them.
_CAPABILITIES = (
    "chown", "dac_override", "fowner", "fsetid", "kill", "net_bind_service",
    "setgid", "setpcap", "setuid", "sys_chroot",
)  # fmt: skip


def run(
    root: Path,
    argv: Sequence[str],
    environment: Mapping[str, str],
    stdin: str = "",
    timeout: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Return the output and exit code of a program that runs in an unpacked image until it ends.

    `environment` is all that the program gets, and `argv[0]` is looked up in the image with the `PATH` in it.
    Raises `SandboxError` if this machine allows no sandbox, or if the program takes more than `timeout`
    seconds; it is stopped then. It runs an event loop, so it can't be called within one.
    """
    for mount_point in (root / "proc", root / "dev"):
        if not os.path.lexists(mount_point):
            mount_point.mkdir()
        elif not _is_directory(mount_point):
            raise SandboxError(f"{mount_point} is not a directory: nothing can be mounted there")
    capabilities = ",".join(("-all", *(f"+{name}" for name in _CAPABILITIES)))
    with tempfile.TemporaryDirectory(prefix="chandlery-") as folder:
        done = Path(folder) / "done"
        command = [
            "unshare",
            *(() if os.geteuid() == 0 else ("--user", "--map-root-user")),
            *_NAMESPACES,
            *("sh", "-euc", _SET_UP, "sh", str(root.resolve()), str(done)),
            # The program's PATH isn't the one that these are found with.
            *("env", "-i", *(f"{name}={value}" for name, value in environment.items())),
            *(_find("setpriv"), "--no-new-privs", f"--bounding-set={capabilities}"),
            *(_find("chroot"), ".", *argv),
        ]
        try:
            finished = asyncio.run(program.run(command, os.environ, Limits(timeout), stdin=stdin.encode()))
        except ProgramMissingError as error:
            raise SandboxError(f"{error}: install util-linux") from error
        except TimeLimitError as error:
            raise SandboxError(f"{argv[0]} did not end within {timeout:g} s") from error
        except OutputLimitError as error:
            raise SandboxError(f"{argv[0]} was stopped: {error}") from error
        complaint = finished.stderr.decode(errors="replace")
        if not done.exists():
            raise SandboxError(f"no sandbox can be made here: {complaint.strip()}: {_advice()}")
    output = finished.stdout.decode(errors="replace")
    return subprocess.CompletedProcess(argv, finished.code, output, complaint)


def _find(program: str) -> str:
    # chroot is in a folder that ordinary users don't have on PATH.
    path = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if path is None:
        raise SandboxError(f"{program} was not found on PATH: install util-linux and coreutils")
    return path


def _advice() -> str:
    if os.geteuid() == 0:
        return "it takes CAP_SYS_ADMIN; start an engine such as docker instead, or leave the container"
    return (
        "be root, or let ordinary users make user namespaces (sysctl: user.max_user_namespaces above 0; "
        "where they exist, kernel.unprivileged_userns_clone=1 and "
        "kernel.apparmor_restrict_unprivileged_userns=0)"
    )
