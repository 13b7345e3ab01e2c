"""The only caller of Nix: as a program, by argument vector, with JSON in and JSON out.

Nix works in a store of its own in the data folder, or in the machine's. Either way it is configured by
NIX_CONFIG, so that a call is the same on every machine. stdout and stderr are read at the same time: a build
that says much on one of them never waits for somebody to read the other.
"""

import asyncio
import grp
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog

from chandlery.closure import Closure, ClosureNode, StorePath
from chandlery.data_folder import storage_errors
from chandlery.errors import (
    BuildError,
    BuildTimeoutError,
    NixError,
    NixMissingError,
    StorageFullError,
)
from chandlery.nix_output import (
    LOG_TAIL,
    DerivationMissingError,
    build_error,
    last_error,
    log_tail,
    package_name,
    says_derivation_missing,
    says_disk_full,
)
from chandlery.package_source import PinnedSource
from chandlery.store_gate import Passage, StoreGate

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

EXPRESSIONS = Path(__file__).parent / "nix"

# What a derivation of the embedded set finds of this machine in its sandbox: the programs that unpack a .deb.
_SANDBOX_PATHS = ("/bin", "/usr", "/lib", "/lib64", "/var/lib/dpkg")
# Seconds that Nix has to stop its builders before it is killed: Nix 2.8 overlooks a signal that comes while
# it starts a builder, and no second one helps.
_STOP_TIMEOUT = 3.0

# Bytes of a disk that is as good as full.
_LEAST_SPACE = 1 << 20

T = TypeVar("T")


class Resolution(msgspec.Struct, frozen=True, kw_only=True):
    """What an attribute path gives: a derivation, or why there is none (`nix/resolve.nix`)."""

    status: str
    name: str = ""
    pname: str = ""
    version: str = ""
    main_program: str | None = msgspec.field(name="mainProgram", default=None)
    derivation: str = msgspec.field(name="drvPath", default="")
    output: str = ""
    outputs: dict[str, str] = {}
    message: str = ""

    @property
    def found(self) -> bool:
        """Tell whether there is a derivation."""
        return self.status == "found"

    @property
    def store_path(self) -> StorePath:
        """The output that was asked for."""
        return StorePath.parse(self.outputs[self.output])


@dataclass(frozen=True, slots=True)
class NixLimits:
    """How much Nix may do at once, and how long it may take (seconds); `begun_after` is for `store_gate`."""

    build_timeout: float = 3600.0
    evaluation_timeout: float = 120.0
    jobs: int = 4
    begun_after: float = 30.0


class Nix:
    """Nix with one store: `folder` holds a store of Chandlery's own, None stands for the machine's."""

    def __init__(self, folder: Path | None, limits: NixLimits) -> None:
        self._folder = folder
        self._limits = limits
        # Whoever collects garbage of the machine's store knows of no gate.
        self._gate = StoreGate(folder, limits.begun_after) if folder else None

    @property
    def store_root(self) -> Path:
        """Where `<hash>-<name>` is found on this machine; a store of its own lies elsewhere than it says."""
        return (self._folder / "nix/store") if self._folder else Path("/nix/store")

    async def check(self) -> str:
        """Make sure that Nix and its store can be used; give its version. `NixError` says what to do."""
        version = (await self._run("nix-store", "--version", timeout=60.0)).stdout.strip()
        # Makes the store's folders and its database.
        await self._run("nix-store", "--verify-path", timeout=60.0)
        return version

    async def check_build(self) -> None:
        """Make sure that this machine lets Nix build; `NixError` says what to do.

        It asks for user namespaces, which containers and hardened kernels may refuse.
        """
        built = await self._run(
            "nix-build", "--no-out-link", str(EXPRESSIONS / "check.nix"), timeout=60.0, check=False
        )
        if built.code != 0 and says_disk_full(built.stderr):
            raise StorageFullError(str(self.store_root))
        if built.code != 0:
            raise NixError(
                f"Nix can't build here: {last_error(built.stderr)}: let it make user namespaces "
                "(sysctl user.max_user_namespaces above 0; of containers, a privileged one)"
            )

    async def resolve(
        self, source: PinnedSource, system: str, attribute_paths: Sequence[str]
    ) -> dict[str, Resolution]:
        """Evaluate all attribute paths at once; one that can't be evaluated is an answer like any other."""
        request = {"source": source.to_nix(), "system": system, "attributePaths": list(attribute_paths)}
        try:
            answers = await self._evaluate("resolve.nix", request, dict[str, Resolution])
        except _EvaluationFailedError as error:
            # Something that tryEval can't catch. Alone, each path shows whether it is the one.
            if len(attribute_paths) == 1:
                return {attribute_paths[0]: Resolution(status="failed", message=error.message)}
            answers = {}
            for path in attribute_paths:
                answers |= await self.resolve(source, system, [path])
            return answers
        for path, answer in answers.items():
            if not answer.found and answer.status != "not_found":
                answers[path] = msgspec.structs.replace(answer, message=await self._explain(request, path))
        return answers

    async def attribute_names(self, source: PinnedSource, system: str, parent: Sequence[str]) -> list[str]:
        """Give the names that a package set offers below an attribute path; none where that fails."""
        request = {"source": source.to_nix(), "system": system, "parent": list(parent)}
        try:
            return await self._evaluate("attribute_names.nix", request, list[str])
        except _EvaluationFailedError as error:
            log.info("attribute names can't be listed", source=source.location, reason=error.message)
            return []

    async def realise(self, derivations: Sequence[str], roots: Path, build_log: Path) -> None:
        """Build what isn't there, and protect it from Nix's garbage collector by links in `roots`.

        A derivation may be followed by `!` and the output that is wanted, else all of them are. Everything
        that Nix says goes to `build_log` as it comes. Raises `BuildError`, `BuildTimeoutError` when the limit
        is reached, `DerivationMissingError`.
        """
        roots.mkdir(parents=True, exist_ok=True)
        command = ("nix-store", "--realise", *derivations, "--add-root", str(roots / "result"), "--indirect")
        with storage_errors(build_log.parent), build_log.open("ab", buffering=0) as file:

            def write(output: bytes) -> None:
                # Where there is no space for a log there may still be some for what is built.
                with suppress(OSError):
                    file.write(output)

            try:
                result = await self._run(
                    *command, timeout=self._limits.build_timeout, on_line=write, check=False
                )
            except _StoppedError as error:
                what = ", ".join(package_name(path) for path in derivations)
                tail = log_tail(build_log.read_text(errors="replace"))
                raise BuildTimeoutError(what, self._limits.build_timeout, tail) from error
        if result.code < 0:
            what = ", ".join(map(package_name, derivations))
            reason = f"Nix was killed by signal {-result.code}: is there too little memory?"
            raise BuildError(what, reason, log_tail(result.stderr))
        if result.code != 0:
            raise build_error(result.stderr, derivations)

    async def closure(self, roots: Iterable[StorePath]) -> Closure:
        """Give the closure of store paths that are there."""
        wanted = tuple(sorted(set(roots)))
        described = await self._run(
            "nix",
            "path-info",
            "--json",
            "--recursive",
            *map(str, wanted),
            timeout=self._limits.evaluation_timeout,
        )
        listed: Any = msgspec.json.decode(described.stdout)
        # Nix 2.19 made the list an object with the paths as its keys.
        entries = (
            listed if isinstance(listed, list) else [{"path": path, **of} for path, of in listed.items()]
        )
        return Closure.of(
            wanted,
            (
                ClosureNode(
                    StorePath.parse(entry["path"]),
                    entry["narSize"],
                    tuple(map(StorePath.parse, entry["references"])),
                )
                for entry in entries
            ),
        )

    async def add(self, path: Path, roots: Path) -> StorePath:
        """Copy a file or a folder into the store, protected like what `realise` builds."""
        result = await self._run("nix-store", "--add", str(path), timeout=self._limits.build_timeout)
        added = StorePath.parse(result.stdout.strip())
        await self.protect(added, roots)
        return added

    async def protect(self, path: StorePath, roots: Path) -> None:
        """Keep a store path that is there from Nix's garbage collector by a link in the folder `roots`."""
        roots.mkdir(parents=True, exist_ok=True)
        link = roots / path.base_name
        await self._run(
            "nix-store", "--realise", str(path), "--add-root", str(link), "--indirect",
            timeout=self._limits.build_timeout,
        )  # fmt: skip

    @property
    def owns_store(self) -> bool:
        """Tell whether the store is Chandlery's own: of the machine's, others decide what is garbage."""
        return self._folder is not None

    async def sizes(self) -> dict[str, int]:
        """Give the nar size of every store path."""
        listed = await self._run(
            "nix", "path-info", "--all", "--size", timeout=self._limits.evaluation_timeout
        )
        lines = (line.split() for line in listed.stdout.splitlines())
        return {path: int(size) for path, size in lines}

    async def garbage(self) -> list[str]:
        """Give the store paths that nothing protects: no link in a folder of roots, no running Nix."""
        listed = await self._run("nix-store", "--gc", "--print-dead", timeout=self._limits.build_timeout)
        return [line for line in listed.stdout.splitlines() if line.startswith("/")]

    async def collect_garbage(self, at_most: int) -> None:
        """Delete store paths that nothing protects, until `at_most` bytes are freed or none is left.

        Of builds that are `beginning`, those here already are waited for, and others wait.
        """
        if self._gate is None:
            raise NixError("what is garbage in the machine's store is not Chandlery's to say")
        limit = str(at_most)
        async with self._gate.collecting():
            await self._run("nix-store", "--gc", "--max-freed", limit, timeout=self._limits.build_timeout)

    def beginning(self) -> AbstractAsyncContextManager[Passage]:
        """Keep `collect_garbage` away while a build looks what is there, and begins; see `store_gate`."""
        return self._gate.beginning() if self._gate else nullcontext(Passage())

    async def instantiate(self, expression: str, arguments: Mapping[str, str], roots: Path) -> str:
        """Give the derivation of an expression of Chandlery's own, called with strings.

        It is protected like what `realise` builds, and with it all that it is built from.
        """
        roots.mkdir(parents=True, exist_ok=True)
        argv = [word for name, value in arguments.items() for word in ("--argstr", name, value)]
        link = roots / "derivation"
        await self._run(
            "nix-instantiate", str(EXPRESSIONS / expression), *argv, "--add-root", str(link), "--indirect",
            timeout=self._limits.evaluation_timeout,
        )  # fmt: skip
        return str(link.readlink())

    async def _explain(self, request: Mapping[str, Any], attribute_path: str) -> str:
        """Evaluate one attribute path unguarded, to hear what Nix says of it."""
        try:
            await self._evaluate("explain.nix", {**request, "attributePaths": [attribute_path]}, str)
        except _EvaluationFailedError as error:
            return error.message
        return ""

    async def _evaluate(self, expression: str, request: Mapping[str, Any], answer: type[T]) -> T:
        try:
            result = await self._run(
                "nix-instantiate", "--eval", "--strict", "--json", "--read-write-mode",
                str(EXPRESSIONS / expression), "--argstr", "request", msgspec.json.encode(request).decode(),
                timeout=self._limits.evaluation_timeout, check=False,
            )  # fmt: skip
        except _StoppedError as error:
            raise _EvaluationFailedError(str(error)) from error
        if result.code != 0:
            raise _EvaluationFailedError(last_error(result.stderr))
        return msgspec.json.decode(result.stdout, type=answer)

    async def _run(
        self,
        program: str,
        *arguments: str,
        timeout: float,
        on_line: Callable[[bytes], object] | None = None,
        check: bool = True,
    ) -> "_Result":
        """Run one of Nix's programs; after `timeout` seconds it is stopped, and `_StoppedError` raised."""
        if shutil.which(program) is None:
            raise NixMissingError(program)
        process = await asyncio.create_subprocess_exec(
            program,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment(),
            start_new_session=True,
        )
        assert process.stdout is not None  # noqa: S101
        assert process.stderr is not None  # noqa: S101
        tail: deque[bytes] = deque(maxlen=400)
        try:
            async with asyncio.timeout(timeout), asyncio.TaskGroup() as group:
                output = group.create_task(process.stdout.read())
                group.create_task(_read_lines(process.stderr, tail, on_line))
                group.create_task(process.wait())
        except TimeoutError as error:
            raise _StoppedError(
                f"{program} was stopped after {timeout:g} s, the limit on this server"
            ) from error
        finally:
            if process.returncode is None:
                await _stop(process)
        code = process.returncode or 0
        stderr = b"".join(tail).decode(errors="replace")
        if code != 0 and self._is_full(stderr):
            raise StorageFullError(str(self.store_root))
        if check and code != 0:
            kind = DerivationMissingError if says_derivation_missing(stderr) else NixError
            raise kind(f"{program}: {last_error(stderr)}")
        return _Result(code, output.result().decode(), stderr)

    def _is_full(self, stderr: str) -> bool:
        """Tell whether it is the disk that a program failed for."""
        if says_disk_full(stderr):
            return True
        # What SQLite says of a full disk isn't always that.
        disk = self._folder or Path("/nix")
        return "disk I/O error" in stderr and shutil.disk_usage(disk).free < _LEAST_SPACE

    def _environment(self) -> dict[str, str]:
        """Give the environment of a call: this process's, less what would make Nix behave otherwise."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NIX_")}
        for name in ("NIX_SSL_CERT_FILE", "NIX_REMOTE") if self._folder is None else ("NIX_SSL_CERT_FILE",):
            if name in os.environ:
                environment[name] = os.environ[name]
        environment["LC_ALL"] = "C.UTF-8"
        settings = {
            "experimental-features": "nix-command",
            "sandbox": "true",
            "extra-sandbox-paths": " ".join(path for path in _SANDBOX_PATHS if Path(path).exists()),
            # How often (seconds) to see whether another Nix has built what this one waits for; 5 if not set.
            "build-poll-interval": "1",
            "max-jobs": str(self._limits.jobs),
            "connect-timeout": "15",
            "stalled-download-timeout": "60",
            "download-attempts": "3",
            "log-lines": str(LOG_TAIL),
        }
        if self._folder is not None:
            settings |= {"store": str(self._folder), "build-users-group": "", "substituters": ""}
            # The machine's own configuration is about the machine's own store.
            environment["NIX_CONF_DIR"] = str(self._folder / "etc")
            environment["NIX_USER_CONF_FILES"] = ""
            environment["XDG_CACHE_HOME"] = str(self._folder / "cache")
        elif os.geteuid() == 0 and not _has_build_users():
            # Debian's nix-bin alone makes no users to build as, and Nix would refuse to build without.
            settings["build-users-group"] = ""
        environment["NIX_CONFIG"] = "".join(f"{name} = {value}\n" for name, value in settings.items())
        return environment


def _has_build_users() -> bool:
    try:
        grp.getgrnam("nixbld")
    except KeyError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Result:
    code: int
    stdout: str
    stderr: str


class _StoppedError(NixError):
    """A program of Nix took longer than its limit."""


class _EvaluationFailedError(Exception):
    """Nix could not evaluate something; `message` is its reason."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


async def _read_lines(
    stream: asyncio.StreamReader, tail: deque[bytes], on_line: Callable[[bytes], object] | None
) -> None:
    """Read to the end, in pieces that may be longer than a line: builders print what they like."""
    while piece := await stream.read(64 * 1024):
        tail.append(piece)
        if on_line is not None:
            on_line(piece)


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Stop Nix and its builders: politely first, so that it can clean up."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_TIMEOUT):
                await process.wait()
                return
        # Builders have sessions of their own, and would outlive a Nix that is killed.
        os.killpg(process.pid, signal.SIGSTOP)
        for number in (*_descendants(process.pid), process.pid):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    with suppress(TimeoutError):
        async with asyncio.timeout(_STOP_TIMEOUT):
            await process.wait()


def _descendants(process: int) -> list[int]:
    """Give the processes that come of a process (proc(5), "/proc/pid/task/tid/children")."""
    children: list[int] = []
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            children += map(int, listed.read_text().split())
    return [*children, *(each for child in children for each in _descendants(child))]
