"""Real OCI clients, each with its own state and sockets in a temporary folder.

    Docker      dockerd and docker          runs containers
    Containerd  containerd and ctr          runs containers
    Podman      podman, no daemon           runs containers
    Skopeo      skopeo, no daemon           copies images

`start` of each is a context manager: it gives the client when its daemon answers; in the end it stops the
daemon, undoes its mounts and removes the folder. A method gives what the program writes to stdout, or raises
`ClientError` with all that it wrote.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, Self

# Seconds; a first pull waits for builds.
_COMMAND_LIMIT = 900
_START_LIMIT = 60
_STOP_LIMIT = 60

Network = Literal["none", "host"]


class ClientError(Exception):
    """A client failed; the text is what it wrote."""

    def __init__(self, argv: Sequence[str], exit_code: int, output: str) -> None:
        super().__init__(f"{' '.join(argv)} gave {exit_code}:\n{output}")
        self.exit_code = exit_code
        self.output = output


class Engine(Protocol):
    """What the tests need from whatever runs containers."""

    def pull(self, image: str) -> str: ...
    def run(self, image: str, *command: str, network: Network = "none") -> str: ...


class Daemon:
    """A process of ours in a process group of its own."""

    def __init__(self, argv: Sequence[str], process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._argv = argv
        self._process = process
        self._log = log

    @classmethod
    @contextmanager
    def start(cls, argv: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[Self]:
        """Start it, with its output in `log`; stop it at the end."""
        with (
            log.open("wb") as output,
            subprocess.Popen(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            try:
                yield cls(argv, process, log)
            finally:
                process.terminate()
                try:
                    process.wait(_STOP_LIMIT)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)

    def wait_until(self, ready: Callable[[], bool], limit: float = _START_LIMIT) -> None:
        """Ask again and again; raise `ClientError` if the process ends before, or after `limit` seconds."""
        deadline = time.monotonic() + limit
        while not ready():
            exit_code = self._process.poll()
            if exit_code is not None or time.monotonic() > deadline:
                reason = "it is not ready" if exit_code is None else "it ended"
                text = f"{reason}:\n{self._log.read_text(errors='replace')}"
                raise ClientError(self._argv, exit_code or 0, text)
            time.sleep(0.02)


class _Program:
    """A command line whose state is in a folder."""

    def __init__(self, folder: Path, *argv: str) -> None:
        self.folder = folder
        self._argv = argv
        # Nobody's settings, credentials and caches but the folder's.
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder)}

    def __call__(self, *arguments: str, stdin: str = "") -> str:
        argv = [*self._argv, *arguments]
        finished = subprocess.run(
            argv,
            env=self.environment,
            input=stdin or None,
            stdin=None if stdin else subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_COMMAND_LIMIT,
            check=False,
        )
        if finished.returncode != 0:
            raise ClientError(argv, finished.returncode, finished.stdout + finished.stderr)
        return finished.stdout

    def works(self, *arguments: str) -> bool:
        try:
            self(*arguments)
        except ClientError:
            return False
        return True


class Docker:
    """A dockerd with its own containerd, and docker."""

    def __init__(self, folder: Path, socket: str) -> None:
        # Debian's client belongs to Debian's daemon; another one may stand before it on PATH.
        program = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"
        self._docker = _Program(folder, program, "--host", socket)

    @classmethod
    @contextmanager
    def start(cls) -> Iterator[Self]:
        with _state_folder() as folder:
            socket = f"unix://{folder}/docker.sock"
            client = cls(folder, socket)
            # dockerd chooses the storage driver: overlay2 where it works, else vfs.
            argv = [
                *("dockerd", "--host", socket, "--pidfile", f"{folder}/docker.pid"),
                *("--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec"),
                *("--bridge=none", "--iptables=false", "--ip6tables=false"),
            ]
            with Daemon.start(argv, client._docker.environment, folder / "dockerd.log") as daemon:
                daemon.wait_until(lambda: client._docker.works("version"))
                yield client

    def pull(self, image: str, platform: str | None = None) -> str:
        return self._docker("pull", *_platform(platform), image)

    @contextmanager
    def logged_in(self, registry: str, credentials: str) -> Iterator[None]:
        """Log in at an address as `user:password`, and out in the end."""
        user, _, password = credentials.partition(":")
        self._docker("login", "--username", user, "--password-stdin", registry, stdin=password)
        try:
            yield
        finally:
            self._docker("logout", registry)

    def run(self, image: str, *command: str, network: Network = "none", stdin: str = "") -> str:
        return self._docker(
            *("run", "--rm", "--interactive", "--pull", "never", "--network", network, image, *command),
            stdin=stdin,
        )

    def inspect(self, image: str) -> dict[str, Any]:
        [image_document] = json.loads(self._docker("image", "inspect", image))
        return dict(image_document)

    def load(self, archive: Path) -> str:
        return self._docker("load", "--input", str(archive))

    def remove(self, image: str) -> str:
        return self._docker("image", "rm", image)


class Containerd:
    """A containerd, and ctr."""

    def __init__(self, folder: Path, socket: str) -> None:
        self._ctr = _Program(folder, "ctr", "--address", socket)

    @classmethod
    @contextmanager
    def start(cls) -> Iterator[Self]:
        with _state_folder() as folder:
            socket = f"{folder}/containerd.sock"
            config = folder / "config.toml"
            config.write_text(
                f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\n'
                f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "{socket}"\n'
            )
            client = cls(folder, socket)
            argv = ["containerd", "--config", str(config)]
            with Daemon.start(argv, client._ctr.environment, folder / "containerd.log") as daemon:
                daemon.wait_until(lambda: client._ctr.works("version"))
                client._choose_snapshotter()
                try:
                    yield client
                finally:
                    client._stop_containers()

    def _choose_snapshotter(self) -> None:
        plugins = [line.split() for line in self._ctr("plugins", "ls").splitlines()]
        overlay_works = any(plugin[1] == "overlayfs" and plugin[-1] == "ok" for plugin in plugins)
        self._ctr.environment["CONTAINERD_SNAPSHOTTER"] = "overlayfs" if overlay_works else "native"

    def _stop_containers(self) -> None:
        """End what an interrupted `run` left: containers outlive a containerd."""
        for task in self._ctr("tasks", "ls", "--quiet").split():
            self._ctr("tasks", "rm", "--force", task)

    def pull(
        self, image: str, plain_http: bool = True, platform: str | None = None, credentials: str | None = None
    ) -> str:
        options = [
            *(("--plain-http",) if plain_http else ("--hosts-dir", self._https(image.partition("/")[0]))),
            *_platform(platform),
            *(("--user", credentials) if credentials else ()),
        ]
        return self._ctr("images", "pull", *options, image)

    def fetch(self, image: str) -> str:
        """Download what isn't there, without unpacking it."""
        return self._ctr("content", "fetch", "--plain-http", image)

    def _https(self, registry: str) -> str:
        """Return a folder of settings by which ctr speaks HTTPS to loopback, with any certificate."""
        folder = self._ctr.folder / "hosts"
        settings = folder / registry / "hosts.toml"
        settings.parent.mkdir(parents=True, exist_ok=True)
        url = f'"https://{registry}"'
        settings.write_text(
            f'server = {url}\n[host.{url}]\ncapabilities = ["pull", "resolve"]\nskip_verify = true\n'
        )
        return str(folder)

    # No stdin: ctr 1.6 doesn't end when its stdin is a pipe that does.
    def run(self, image: str, *command: str, network: Network = "none") -> str:
        options = ["--net-host"] if network == "host" else []
        return self._ctr("run", "--rm", *options, image, f"test-{secrets.token_hex(8)}", *command)

    @contextmanager
    def mounted(self, image: str, platform: str) -> Iterator[Path]:
        """Return the root filesystem of an image that was pulled for a platform."""
        target = Path(tempfile.mkdtemp(dir=self._ctr.folder))
        self._ctr("images", "mount", "--platform", platform, image, str(target))
        try:
            yield target
        finally:
            self._ctr("images", "unmount", "--rm", str(target))


class Podman:
    """Podman, as root."""

    def __init__(self, folder: Path) -> None:
        self._podman = _Program(
            folder,
            *("podman", "--root", f"{folder}/root", "--runroot", f"{folder}/run"),
            *("--storage-driver", "overlay", "--cgroup-manager", "cgroupfs"),
        )

    @classmethod
    @contextmanager
    def start(cls) -> Iterator[Self]:
        with _state_folder() as folder:
            yield cls(folder)

    def pull(self, image: str, credentials: str | None = None, platform: str | None = None) -> str:
        options = ("--creds", credentials) if credentials else ()
        return self._podman("pull", "--tls-verify=false", *options, *_platform(platform), image)

    def remove(self, image: str) -> str:
        return self._podman("image", "rm", image)

    def run(self, image: str, *command: str, network: Network = "none") -> str:
        # Podman asks for higher limits by default, which takes CAP_SYS_RESOURCE.
        limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
        return self._podman("run", "--rm", "--pull", "never", "--network", network, *limits, image, *command)

    def inspect(self, image: str) -> dict[str, Any]:
        [image_document] = json.loads(self._podman("image", "inspect", image))
        return dict(image_document)

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """Return the image's root filesystem."""
        try:
            yield Path(self._podman("image", "mount", image).strip())
        finally:
            self._podman("image", "unmount", image)


class Skopeo:
    """Skopeo; images are given without `docker://`."""

    def __init__(self, folder: Path) -> None:
        self._skopeo = _Program(folder, "skopeo", "--insecure-policy")

    @classmethod
    @contextmanager
    def start(cls) -> Iterator[Self]:
        with _state_folder() as folder:
            yield cls(folder)

    def copy(self, image: str, destination: str, credentials: str | None = None) -> str:
        """Copy to a transport and a place: `oci:FOLDER`, `dir:FOLDER`, `docker-archive:FILE:NAME:TAG`."""
        options = ("--src-creds", credentials) if credentials else ()
        return self._skopeo("copy", "--src-tls-verify=false", *options, f"docker://{image}", destination)

    def copy_all(self, image: str, destination: str) -> str:
        """Copy the images of all platforms."""
        options = ("--all", "--src-tls-verify=false")
        return self._skopeo("copy", *options, f"docker://{image}", destination)

    def sync(self, repository: str, folder: Path) -> str:
        """Copy all tags of a repository, with the images of all platforms, each to a folder of its own."""
        options = ("--all", "--src-tls-verify=false", "--src", "docker", "--dest", "dir")
        return self._skopeo("sync", *options, repository, str(folder))

    def inspect(self, image: str) -> dict[str, Any]:
        return dict(json.loads(self._skopeo("inspect", "--tls-verify=false", f"docker://{image}")))

    def manifest(self, image: str) -> str:
        """Return the manifest as it was served."""
        return self._skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{image}")

    def config_of(self, image: str, platform: str) -> str:
        """Return the config of an index's image for a platform: `linux/arm64/v8`."""
        chosen = zip(("os", "arch", "variant"), platform.split("/"), strict=False)
        options = [f"--override-{name}={value}" for name, value in chosen]
        return self._skopeo(
            *options, "inspect", "--config", "--raw", "--tls-verify=false", f"docker://{image}"
        )

    def config(self, image: str) -> str:
        """Return the image's config as it was served."""
        return self._skopeo("inspect", "--config", "--raw", "--tls-verify=false", f"docker://{image}")

    def list_tags(self, repository: str) -> list[str]:
        listed = json.loads(self._skopeo("list-tags", "--tls-verify=false", f"docker://{repository}"))
        return list(listed["Tags"])


def _platform(platform: str | None) -> Sequence[str]:
    return ("--platform", platform) if platform else ()


@contextmanager
def _state_folder() -> Iterator[Path]:
    """Return a folder; in the end nothing is mounted in it, and it is gone."""
    # Not pytest's folder: the path of a socket has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="chandlery-"))
    try:
        yield folder
    finally:
        for mount_point in reversed(_mount_points()):
            if mount_point.is_relative_to(folder):
                subprocess.run(["umount", "--lazy", str(mount_point)], check=True)
        shutil.rmtree(folder)


def _mount_points() -> list[Path]:
    """Return all mount points, the oldest first (proc(5), mountinfo)."""
    return [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
