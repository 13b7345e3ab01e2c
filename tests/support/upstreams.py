"""Upstreams on loopback, one of each kind of source, that move, die, hang and come back.

    channel   nixpkgs: a channel and tarballs over http
    web       git over smart http
    ssh       git through sshd
    file      git in a folder of this machine
    flake     over git+http, with an input that its lock names
    folder    a folder of this machine
    debian    a suite, through apt

Each has a package set whose program `revision` says in which state it is.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

from chandlery.oci.documents import Platform
from tests.support import channel_server, debian_repository, git_server
from tests.support.channel_server import ChannelServer, tree_of_shape
from tests.support.debian_packages import Deb, program
from tests.support.debian_repository import SUITE, DebianRepository
from tests.support.flakes import lock
from tests.support.git_server import HttpServer, Repository, SshServer, http_server, ssh_server

SYSTEM = Platform.of_host().nix_system
CHANNEL = "nixos-test"

# What `of-library` says comes from an input of the flake.
_FLAKE = """
{
  inputs.library.url = "git+%s?ref=main";
  outputs = { self, library }: {
    packages.%s.of-library = (import ./pkgs/make.nix { system = "%s"; config = { }; }).program "of-library" {
      inherit (library) says;
    };
    legacyPackages.%s = import ./. { system = "%s"; };
  };
}
"""
_LIBRARY = '{ outputs = { self }: { says = "%s"; }; }'


class Upstream(Protocol):
    """Where a source comes from; `source` is how the settings write it."""

    source: str

    def move(self, says: str) -> str:
        """Become a package set that says this; give its revision, or nothing if only a server can tell it."""
        ...

    def kill(self) -> None:
        """Be gone."""
        ...

    def restart(self) -> None:
        """Be there again, where it was."""
        ...


@runtime_checkable
class NetworkUpstream(Upstream, Protocol):
    """One that may as well take connections and say nothing."""

    def silence(self) -> None:
        """Say nothing from now on."""
        ...

    def resume(self) -> None:
        """Answer again, also whoever waits."""
        ...


class Channel:
    """A channel, and the tarballs of what it stood at."""

    source = f"nixpkgs!{CHANNEL}"

    def __init__(self, server: ChannelServer) -> None:
        self.server = server
        self._silence = ExitStack()

    def move(self, says: str) -> str:
        return self.server.publish(CHANNEL, says)

    def kill(self) -> None:
        self.server.stop()

    def restart(self) -> None:
        self.server.start()

    def silence(self) -> None:
        self._silence.enter_context(self.server.misbehaving(channel_server.Fault.HANG))

    def resume(self) -> None:
        self._silence.close()


class GitOverHttp:
    """A branch of a repository over smart http."""

    def __init__(self, repository: Repository, server: HttpServer) -> None:
        self.repository = repository
        self.server = server
        self.source = f"git!{server.url(repository.folder.name)}!main"

    def move(self, says: str) -> str:
        return self.repository.commit(_files(says))

    def kill(self) -> None:
        self.server.stop()

    def restart(self) -> None:
        self.server.start()

    def silence(self) -> None:
        self.server.fault = git_server.Fault.SILENCE

    def resume(self) -> None:
        self.server.resume()


class GitOverSsh:
    """The HEAD of a repository that sshd gives."""

    def __init__(self, repository: Repository, server: SshServer) -> None:
        self.repository = repository
        self._server = server
        self._silence = ExitStack()
        self.source = f"git!{server.url(repository.folder)}"

    def move(self, says: str) -> str:
        return self.repository.commit(_files(says))

    def kill(self) -> None:
        self._server.stop()

    def restart(self) -> None:
        self._server.start()

    def silence(self) -> None:
        self._silence.enter_context(self._server.silent())

    def resume(self) -> None:
        self._silence.close()


class GitInFolder:
    """A branch of a repository on this machine."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self._place = _Place(repository.folder)
        self.source = f"git!file://{repository.folder}!main"

    def move(self, says: str) -> str:
        return self.repository.commit(_files(says))

    def kill(self) -> None:
        self._place.leave()

    def restart(self) -> None:
        self._place.come_back()


class Folder:
    """A folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._place = _Place(folder)
        self.source = f"path!{folder}"

    def move(self, says: str) -> str:
        for name, content in tree_of_shape(says).items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)
        return ""

    def kill(self) -> None:
        self._place.leave()

    def restart(self) -> None:
        self._place.come_back()


class Flake(GitOverHttp):
    """A flake that needs another one, which its lock names."""

    def __init__(self, repository: Repository, library: Repository, server: HttpServer) -> None:
        super().__init__(repository, server)
        self._library = library
        self.source = f"flake!git+{server.url(repository.folder.name)}?ref=main"
        self.move_library("library as it was locked")
        url = server.url(library.folder.name)
        flake = _FLAKE % (url, SYSTEM, SYSTEM, SYSTEM, SYSTEM)
        repository.commit({**_files("unlocked"), "flake.nix": flake})
        lock(repository.work)

    def move_library(self, says: str) -> None:
        self._library.commit({"flake.nix": _LIBRARY % says})

    def move(self, says: str) -> str:
        return self.repository.commit({"revision": says})


class Debian:
    """A suite, in which each state is a new version of the same package."""

    source = f"debian!{SUITE}"

    def __init__(self, repository: DebianRepository) -> None:
        self.repository = repository
        self._faults = ExitStack()
        self._version = 0
        names = ("ca-certificates", "netbase", "hello", "jq")
        repository.publish(*(Deb(name, files={f"usr/bin/{name}": program()}) for name in names))

    def move(self, says: str) -> str:
        self._version += 1
        script = program(f"#!/bin/sh\necho {says}\n".encode())
        self.repository.publish(Deb("revision", str(self._version), files={"usr/bin/revision": script}))
        return ""

    def kill(self) -> None:
        self._faults.enter_context(self.repository.misbehaving(debian_repository.Fault.REFUSE))

    def restart(self) -> None:
        self._faults.close()

    def silence(self) -> None:
        self._faults.enter_context(self.repository.misbehaving(debian_repository.Fault.HANG))

    def resume(self) -> None:
        self._faults.close()


class _Place:
    """A folder that may be elsewhere for a while."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._elsewhere = folder.with_name(f"{folder.name}.gone")

    def leave(self) -> None:
        self._folder.rename(self._elsewhere)

    def come_back(self) -> None:
        self._elsewhere.rename(self._folder)


class Upstreams:
    """One of each kind, by the name under which the settings have it."""

    def __init__(
        self,
        channel: Channel,
        web: GitOverHttp,
        ssh: GitOverSsh,
        file: GitInFolder,
        flake: Flake,
        folder: Folder,
        debian: Debian,
        ssh_command: str,
    ) -> None:
        self.channel, self.web, self.ssh, self.file = channel, web, ssh, file
        self.flake, self.folder, self.debian = flake, folder, debian
        self.says: dict[str, str] = {}
        self.revisions: dict[str, str] = {}
        self.by_name: Mapping[str, Upstream] = {
            "channel": channel,
            "web": web,
            "ssh": ssh,
            "file": file,
            "flake": flake,
            "folder": folder,
            "debian": debian,
        }
        # For the server, which reaches sshd with the keys of the test.
        self.variables = {"GIT_SSH_COMMAND": ssh_command}

    def move(self, name: str, says: str) -> str:
        """See `Upstream.move`; what it says and its revision are noted."""
        self.says[name] = says
        self.revisions[name] = self.by_name[name].move(says)
        return self.revisions[name]


def _files(says: str) -> dict[str, str]:
    return {name: content.decode() for name, content in tree_of_shape(says).items()}


def _repository(folder: Path) -> Repository:
    folder.parent.mkdir(exist_ok=True)
    return Repository(folder)


@contextmanager
def upstreams(folder: Path) -> Iterator[Upstreams]:
    """Start them all, in a folder; each says the name that the settings have for it."""
    with ExitStack() as stack:
        web = _repository(folder / "web" / "set.git")
        flake, library = (_repository(folder / "flakes" / f"{name}.git") for name in ("flake", "library"))
        ssh = stack.enter_context(ssh_server(folder / "sshd"))
        (folder / "folder").mkdir()
        all_of_them = Upstreams(
            Channel(stack.enter_context(channel_server.channel_server())),
            GitOverHttp(web, stack.enter_context(http_server(folder / "web"))),
            GitOverSsh(_repository(folder / "ssh" / "set.git"), ssh),
            GitInFolder(_repository(folder / "file" / "set.git")),
            Flake(flake, library, stack.enter_context(http_server(folder / "flakes"))),
            Folder(folder / "folder"),
            Debian(stack.enter_context(debian_repository.debian_repository(folder))),
            ssh.command,
        )
        for name in all_of_them.by_name:
            all_of_them.move(name, name)
        yield all_of_them
