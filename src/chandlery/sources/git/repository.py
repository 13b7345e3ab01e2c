"""The only caller of git: what a remote has, and its commits, fetched into a bare repository of our own.

The operator's git and ssh configuration counts (credentials, proxies, keys), and nothing ever asks a person.
A commit is fetched alone where the server allows it. It is checked out without the operator's configuration,
hooks, filters or conversions: what a file is in the commit, it is in the tree. Submodules are left out, as
`builtins.fetchGit` does unless it is told otherwise.

The repository is a cache: one that a kill or a bad disk left in pieces is thrown away and fetched anew.
"""

import asyncio
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

import structlog

from chandlery.errors import ReferenceNotFoundError, SourceUnavailableError, StorageFullError
from chandlery.machine import program
from chandlery.machine.disk_errors import storage_errors
from chandlery.machine.locks import holding
from chandlery.machine.program import Limits, OutputLimitError, ProgramMissingError, TimeLimitError
from chandlery.sources.git.address import GitAddress

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

HEAD = "HEAD"
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

# Where commits are kept, so that the next fetch transfers only what is new.
_KEPT = "refs/chandlery"
_MOST_KEPT = 16
_MOST_PACKS = 30

# git-check-ref-format(1), less what means something in a refspec.
_REFERENCE = re.compile(r"refs/(?:heads|tags)/(?!.*(?:\.\.|@\{|//))[^\x00-\x20\x7f~^:?*\[\\]+")

# Variables that would lead git to another repository than the one it is called for.
_REPOSITORY_VARIABLES = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR"),
    *("GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_NAMESPACE", "GIT_PREFIX", "GIT_SHALLOW_FILE"),
)
_CONFIG_VARIABLES = ("GIT_CONFIG_COUNT", "GIT_CONFIG_PARAMETERS", "GIT_CONFIG")

# git runs it with a shell, which finds the secrets in its environment; a program's arguments are seen by all.
_CREDENTIAL_HELPER = (
    '!f() { test "$1" = get && printf "username=%s\\npassword=%s\\n" '
    '"$CHANDLERY_GIT_USER" "$CHANDLERY_GIT_PASSWORD"; }; f'
)

# Conversions by .gitattributes; the repository's own file has the last word (gitattributes(5)).
_ATTRIBUTES = "* -text -filter -ident -working-tree-encoding -export-ignore -export-subst\n"

# What a server says that won't give a commit by its id, or won't give it alone.
_REFUSALS = (
    *("unadvertised object", "not our ref", "couldn't find remote ref", "no such remote ref"),
    *("does not support", "did not send all necessary objects"),
)
# Progress and advice.
_NOISE = re.compile(
    r"^(hint:|warning:|From |Please make sure|and the repository exists)|\d%|Total \d|remote: Enum"
)
_DAMAGE = ("corrupt", "bad object", "missing blob", "missing tree", "not a git repository", "unable to read")


@dataclass(frozen=True, slots=True)
class GitLimits:
    """In seconds: for a list of references; for a fetch; and for a server that says nothing meanwhile."""

    listing: float = 30.0
    fetching: float = 1800.0
    silence: float = 60.0


class _GitError(Exception):
    """Git failed; the text is what it complained of."""


class GitRepository:
    """A remote, and what was fetched from it into `folder`; `text` is what errors call it."""

    def __init__(self, address: GitAddress, folder: Path, text: str, limits: GitLimits | None = None) -> None:
        self._address = address
        self._folder = folder
        self._text = text
        self._limits = limits or GitLimits()

    async def references(self) -> dict[str, str]:
        """Return the commits of all branches and tags by their full names, such as `refs/heads/main`."""
        output = await self._ask("ls-remote", "--heads", "--tags", "--", self._address.location)
        found: dict[str, str] = {}
        for line in output.splitlines():
            commit, _, name = line.partition("\t")
            # An annotated tag is followed by what it stands for, which counts.
            if COMMIT.fullmatch(commit) and _REFERENCE.fullmatch(name.removesuffix("^{}")):
                found[name.removesuffix("^{}")] = commit
        return found

    async def head(self) -> str | None:
        """Return the commit that the remote's HEAD is at, if it has one."""
        output = await self._ask("ls-remote", "--", self._address.location, HEAD)
        for line in output.splitlines():
            commit, _, name = line.partition("\t")
            if name == HEAD and COMMIT.fullmatch(commit):
                return commit
        return None

    async def check_out(self, commit: str, name: str, target: Path) -> None:
        """Make a tree of a commit, fetching it if need be; `name` is where the remote had it, or empty.

        Raises `ReferenceNotFoundError` if the remote doesn't have it, `SourceUnavailableError` if it doesn't
        say.
        """
        folder = self._folder / f"repository-{len(commit)}"
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        for attempt in (1, 2):
            try:
                async with holding(self._folder_of(folder)):
                    await self._prepare(folder, commit)
                    await self._fetch(folder, commit, name)
                    await self._write_tree(folder, commit, target)
            except _GitError as error:
                if attempt == 2 or not self._is_damaged(folder, str(error)):
                    raise self._unavailable(str(error)) from error
                log.warning(
                    "a git repository is damaged and made anew", folder=str(folder), reason=str(error)
                )
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                await asyncio.to_thread(shutil.rmtree, target, ignore_errors=True)
            else:
                return

    def _folder_of(self, folder: Path) -> Path:
        """Return the folder that is locked: not the repository itself, which may be thrown away."""
        lock = self._folder / f"{folder.name}.lock"
        lock.mkdir(exist_ok=True)
        return lock

    def _is_damaged(self, folder: Path, complaint: str) -> bool:
        # What is wrong with the server's own repository isn't mended here.
        ours = "; ".join(line for line in complaint.split("; ") if not line.startswith("remote:"))
        return str(folder) in ours or any(each in ours for each in _DAMAGE)

    async def _prepare(self, folder: Path, commit: str) -> None:
        if not (folder / "HEAD").exists():
            kind = "sha1" if len(commit) == 40 else "sha256"
            await self._local(
                "init", "--quiet", "--bare", "--template=", f"--object-format={kind}", str(folder)
            )
        # Nobody else works here now; a git that was killed has left these.
        for pattern in ("*.lock", "refs/**/*.lock", "objects/pack/tmp_*", "index-*"):
            for left in folder.glob(pattern):
                left.unlink(missing_ok=True)
        (folder / "info").mkdir(exist_ok=True)
        (folder / "info" / "attributes").write_text(_ATTRIBUTES)

    async def _fetch(self, folder: Path, commit: str, name: str) -> None:
        if await self._has(folder, commit):
            return
        kept = f"{_KEPT}/{commit}"
        # The commit alone; else what the reference has now, alone; else everything.
        for wanted in (f"{commit}:{kept}", f"{name}:{kept}" if name else ""):
            if not wanted:
                continue
            try:
                await self._remote(
                    folder, "fetch", "--depth=1", *_FETCH, "--", self._address.location, f"+{wanted}"
                )
            except _GitError as error:
                # One that looked for it, and has no such commit.
                if "not our ref" in str(error) and not name:
                    raise self._no_such_commit(commit) from error
                if not any(each in str(error).lower() for each in _REFUSALS):
                    raise
            if await self._has(folder, commit):
                await self._tidy(folder)
                return
        await self._fetch_everything(folder, commit)

    async def _fetch_everything(self, folder: Path, commit: str) -> None:
        shallow = ("--unshallow",) if (folder / "shallow").exists() else ()
        try:
            await self._remote(
                folder, "fetch", "--prune", *shallow, *_FETCH, "--", self._address.location,
                "+refs/heads/*:refs/remotes/heads/*", "+refs/tags/*:refs/remotes/tags/*",
            )  # fmt: skip
        except _GitError as error:
            if "does not support" not in str(error) or not shallow:
                raise
            # What a server that knows nothing of shallow repositories gives doesn't fit into one.
            raise _GitError(f"{folder} is shallow: {error}") from error
        if not await self._has(folder, commit):
            raise self._no_such_commit(commit)
        await self._local_in(folder, "update-ref", f"{_KEPT}/{commit}", commit)

    def _no_such_commit(self, commit: str) -> ReferenceNotFoundError:
        return ReferenceNotFoundError(self._text, commit, "the repository has no such commit")

    async def _has(self, folder: Path, commit: str) -> bool:
        try:
            await self._local_in(folder, "cat-file", "-e", f"{commit}^{{commit}}")
        except _GitError:
            return False
        return True

    async def _write_tree(self, folder: Path, commit: str, target: Path) -> None:
        index = folder / f"index-{token_hex(8)}"
        with storage_errors(target.parent):
            target.mkdir()
        variables = {"GIT_INDEX_FILE": str(index), "GIT_WORK_TREE": str(target)}
        try:
            await self._local_in(folder, "read-tree", commit, variables=variables)
            await self._local_in(folder, "checkout-index", "--all", "--quiet", variables=variables)
        finally:
            for each in folder.glob(f"{index.name}*"):
                each.unlink(missing_ok=True)

    async def _tidy(self, folder: Path) -> None:
        """Let go of the commits that were fetched first, once there are many packs."""
        if len(list((folder / "objects" / "pack").glob("*.pack"))) < _MOST_PACKS:
            return
        kept = sorted((folder / _KEPT).iterdir(), key=lambda each: each.stat().st_mtime, reverse=True)
        for each in kept[_MOST_KEPT:]:
            each.unlink(missing_ok=True)
        await self._local_in(folder, "repack", "-a", "-d", "-q")
        await self._local_in(folder, "prune", "--expire=now")

    async def _ask(self, *arguments: str) -> str:
        """Ask the remote, in no repository."""
        try:
            return await self._run(
                (*_OPTIONS, *self._credentials(), *arguments),
                await self._remote_variables(),
                self._limits.listing,
            )
        except _GitError as error:
            raise self._unavailable(str(error)) from error

    async def _remote(self, folder: Path, *arguments: str) -> None:
        variables = {**await self._remote_variables(), "GIT_DIR": str(folder)}
        await self._run((*_OPTIONS, *self._credentials(), *arguments), variables, self._limits.fetching)

    async def _local_in(
        self, folder: Path, *arguments: str, variables: Mapping[str, str] | None = None
    ) -> None:
        await self._local(*arguments, variables={"GIT_DIR": str(folder), **(variables or {})})

    async def _local(self, *arguments: str, variables: Mapping[str, str] | None = None) -> None:
        """Run git without the operator's configuration, which may name programs to run on files."""
        own = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_ATTR_NOSYSTEM": "1"}
        environment = {**_environment(_CONFIG_VARIABLES), **own, **(variables or {})}
        await self._run((*_OPTIONS, *arguments), environment, self._limits.fetching, remote=False)

    async def _remote_variables(self) -> dict[str, str]:
        variables = _environment()
        ssh = variables.get("GIT_SSH_COMMAND", "")
        if not ssh and "GIT_SSH" not in variables:
            with suppress(_GitError):
                output = await self._run(("config", "--get", "core.sshCommand"), variables, 10.0)
                ssh = output.strip()
        if ssh or "GIT_SSH" not in variables:
            # A master connection would outlive git, and hold its output open.
            options = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=10", "ControlPath=none")
            variables["GIT_SSH_COMMAND"] = " ".join([ssh or "ssh", *(f"-o {each}" for each in options)])
        variables["CHANDLERY_GIT_USER"] = self._address.user
        variables["CHANDLERY_GIT_PASSWORD"] = self._address.password
        return variables

    def _credentials(self) -> tuple[str, ...]:
        """Tell git to use the credentials of the address; a user alone may have a password elsewhere."""
        if not self._address.user and not self._address.password:
            return ()
        key = f"credential.{self._address.place}"
        # The empty one makes git forget those of the operator's.
        first = f"{key}.helper=" if self._address.password else f"{key}.username={self._address.user}"
        return ("-c", first, "-c", f"{key}.helper={_CREDENTIAL_HELPER}")

    async def _run(
        self,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        limit: float,
        *,
        remote: bool = True,
    ) -> str:
        """Return what git prints; after `limit` seconds it is stopped, and when a `remote` says nothing."""
        try:
            finished = await program.run(
                ("git", *arguments),
                variables,
                Limits(limit, silence=self._limits.silence if remote else None),
                # Whatever repository the server was started in has no say.
                folder=Path("/"),
            )
        except ProgramMissingError as error:
            raise SourceUnavailableError(
                self._text, "git was not found: install it (on Debian: apt-get install git)"
            ) from error
        except TimeLimitError as error:
            raise _GitError(f"{_what(arguments)} took too long, or the server said nothing") from error
        except OutputLimitError as error:
            raise _GitError(f"{_what(arguments)} was stopped: {error}") from error
        if finished.code != 0:
            raise self._failure(arguments, finished.code, finished.stderr.decode(errors="replace"))
        return finished.stdout.decode(errors="replace")

    def _failure(self, arguments: Sequence[str], code: int, complaint: str) -> Exception:
        if "No space left on device" in complaint or "Disk quota exceeded" in complaint:
            return StorageFullError(str(self._folder))
        lines = (line.strip() for line in re.split(r"[\r\n]+", complaint))
        said = list(dict.fromkeys(line for line in lines if line and not _NOISE.search(line)))
        # Errors first: the rest may be advice on several lines.
        said.sort(key=lambda line: not line.startswith(("fatal:", "error:", "remote:", "ssh:")))
        text = "; ".join(said[:4])
        for secret in (self._address.password, self._address.user if self._address.password else ""):
            text = text.replace(secret, "...") if secret else text
        text = re.sub(r"://[^/@\s]+@", "://", text)
        return _GitError(text or f"{_what(arguments)} ended with exit code {code}")

    def _unavailable(self, reason: str) -> SourceUnavailableError:
        return SourceUnavailableError(self._text, reason)


_OPTIONS = (
    *("-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=30", "-c", "credential.interactive=false"),
    *("-c", "gc.auto=0", "-c", "maintenance.auto=false", "-c", "core.hooksPath=/dev/null"),
    *("-c", "core.symlinks=true", "-c", "core.fsmonitor=false"),
    # A pack for each fetch: they are counted.
    *("-c", "fetch.unpackLimit=1", "-c", "submodule.recurse=false"),
)
_FETCH = ("--progress", "--no-tags", "--no-recurse-submodules", "--no-write-fetch-head")


def _environment(without: Sequence[str] = ()) -> dict[str, str]:
    """Return this process's environment, in which nothing asks a person."""
    dropped = {*_REPOSITORY_VARIABLES, *without}
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    return {
        **inherited,
        "LC_ALL": "C",
        "GIT_TERMINAL_PROMPT": "0",
        "SSH_ASKPASS_REQUIRE": "never",
        "GIT_ALLOW_PROTOCOL": "file:git:http:https:ssh",
    }


def _what(arguments: Sequence[str]) -> str:
    names = ("ls-remote", "fetch", "init", "read-tree", "checkout-index", "repack", "prune", "cat-file")
    return f"git {next((each for each in arguments if each in names), 'config')}"
