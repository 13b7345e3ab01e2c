"""The only caller of Nix: as a program, by argument vector, with JSON in and JSON out.

Nix works in a store of its own in the data folder, or in the machine's. A package set is evaluated where it
can read nothing but itself, and with limits of time and memory (see `nix.evaluation`).
"""

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar

import msgspec
import structlog

from chandlery.errors import (
    BuildError,
    BuildTimeoutError,
    EvaluationMemoryError,
    EvaluationTimeoutError,
    NixError,
    StorageFullError,
)
from chandlery.machine.disk_errors import is_full, storage_errors
from chandlery.machine.free_disk import stopped_by, watch_free_disk
from chandlery.machine.program import Limits
from chandlery.nix.build_log import BuildLog
from chandlery.nix.closure import Closure, ClosureNode, StorePath
from chandlery.nix.configuration import NixConfiguration, NixLimits, NixOptions, Purpose, host_paths
from chandlery.nix.database import DatabaseUnreadableError, NixDatabase
from chandlery.nix.evaluation import EXPRESSIONS, Evaluator, PackageSet, Resolution, failed
from chandlery.nix.output import (
    DerivationMissingError,
    FetchPlan,
    FetchPlans,
    LockedFlake,
    archived_sources,
    build_error,
    evaluation_failure,
    last_error,
    locked_flake,
    log_tail,
    package_name,
    says_derivation_missing,
    says_disk_full,
    says_no_namespaces,
    says_outdated,
)
from chandlery.nix.pinned_source import PinnedSource
from chandlery.nix.process import Result, StoppedError, run
from chandlery.nix.read_only import read_only
from chandlery.nix.store_lock import Reader, StoreLock
from chandlery.nix.unfinished import left_sandboxes, unfinished_bytes
from chandlery.telemetry.build_timings import Timings

__all__ = ["EXPRESSIONS", "LockedFlake", "Nix", "NixLimits", "NixOptions", "Resolution"]

T = TypeVar("T")

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Seconds in which names for suggestions must be there.
_NAMES_TIMEOUT = 20.0


class Nix:
    """Nix with one store: `folder` holds a store of Chandlery's own, None stands for the machine's.

    `files` is where the operator's `nix.conf` may be, if not in the store's `etc`.
    """

    def __init__(
        self,
        folder: Path | None,
        limits: NixLimits,
        options: NixOptions | None = None,
        files: Path | None = None,
    ) -> None:
        self._folder = folder
        self._limits = limits
        files = files or (folder / "etc" if folder else Path("/etc/nix"))
        self._configuration = NixConfiguration(folder, limits, options or NixOptions(), files)
        self._database = NixDatabase(folder) if folder else None
        self._has_mount_namespaces: bool | None = None
        # Collectors of the machine's store know of no lock of ours.
        self._lock = StoreLock(folder, limits.begun_after) if folder else None

    @property
    def store_root(self) -> Path:
        """Where `<hash>-<name>` is found on this machine; a store of its own lies elsewhere than it says."""
        return (self._folder / "nix/store") if self._folder else Path("/nix/store")

    async def check(self) -> str:
        """Make sure that Nix and its store can be used; return its version. `NixError` says what to do."""
        version = (await self._run("nix-store", "--version", timeout=60.0)).stdout.strip()
        # Makes the store's folders and its database.
        await self._run("nix-store", "--verify-path", timeout=60.0)
        return version

    async def protects_this_machine(self) -> bool:
        """Return whether builders can't change what they see of this machine."""
        return self._folder is None or os.geteuid() != 0 or bool(await self._before_commands())

    async def _before_commands(self) -> Sequence[str]:
        """Return what stands before commands so that builders can't change what they see of this machine."""
        if self._folder is None or os.geteuid() != 0:
            return ()
        seen = (*host_paths(), *self._configuration.options.host_paths)
        before = read_only(seen, self._folder)
        if self._has_mount_namespaces is None:
            self._has_mount_namespaces = await self._try_mount_namespace(before)
        return before if self._has_mount_namespaces else ()

    async def _try_mount_namespace(self, before: Sequence[str]) -> bool:
        try:
            tried = await run((*before, "true"), self._configuration.environment(Purpose.OWN), Limits(60.0))
            reason = "" if tried.code == 0 else last_error(tried.stderr)
        except NixError as error:
            reason = str(error)
        if reason:
            log.warning(
                "builders could change this machine, since root's Nix can't have a mount namespace: "
                "run the server as an ordinary user",
                reason=reason,
            )
        return not reason

    async def check_build(self) -> None:
        """Make sure that this machine lets Nix build; `NixError` says what to do.

        It asks for user namespaces, which containers and hardened kernels may refuse.
        """
        built = await self._run(
            "nix-build", "--no-out-link", str(EXPRESSIONS / "check.nix"), *_arguments({}),
            timeout=60.0, check=False,
        )  # fmt: skip
        if built.code != 0 and says_disk_full(built.stderr):
            raise StorageFullError(str(self.store_root))
        if built.code != 0:
            hint = (
                ": let it make user namespaces (sysctl user.max_user_namespaces above 0; of containers, a "
                "privileged one)"
            )
            reason = last_error(built.stderr)
            raise NixError(
                f"Nix can't build here: {reason}{hint if says_no_namespaces(built.stderr) else ''}"
            )

    async def resolve(
        self, source: PinnedSource, system: str, attribute_paths: Sequence[str]
    ) -> dict[str, Resolution]:
        """Evaluate all attribute paths; one that can't be evaluated is an answer like any other.

        However many there are, it takes three times the limit of one evaluation at most.
        """
        evaluator = Evaluator(self._evaluate, self._limits.evaluation_timeout)
        return await evaluator.resolve(PackageSet(source, system), attribute_paths)

    async def attribute_names(self, source: PinnedSource, system: str, parent: Sequence[str]) -> list[str]:
        """Return the names that a package set offers below an attribute path; none where that fails."""
        packages = PackageSet(source, system)
        timeout = min(_NAMES_TIMEOUT, self._limits.evaluation_timeout)
        names = await self._evaluate(packages, "attribute_names.nix", {"parent": list(parent)}, timeout)
        if isinstance(names, Resolution):
            log.info("attribute names can't be listed", source=packages.location, reason=names.message)
            return []
        return msgspec.json.decode(names, type=list[str])

    async def flake_metadata(self, reference: str) -> LockedFlake:
        """Fetch a flake as it is now, with the operator's credentials. Raises `NixError`.

        What it needs must be locked: a lock file that lacks something is an error, which says so.
        """
        result = await self._run(
            "nix", "flake", "metadata", "--json", "--refresh", "--no-update-lock-file", reference,
            purpose=Purpose.FETCH, timeout=self._limits.build_timeout,
        )  # fmt: skip
        if says_outdated(result.stderr):
            raise NixError(f"nix could not reach it: {last_error(result.stderr)}")
        return locked_flake(msgspec.json.decode(result.stdout))

    async def flake_archive(self, flake: LockedFlake, roots: Path) -> list[StorePath]:
        """Fetch all that a flake needs, and protect it and the flake like what `realise` builds.

        After that it can be evaluated although nothing that it came from is there any more.
        """
        archived = await self._run(
            "nix", "flake", "archive", "--json", "--no-update-lock-file", flake.reference,
            purpose=Purpose.FETCH, timeout=self._limits.build_timeout,
        )  # fmt: skip
        paths = archived_sources(msgspec.json.decode(archived.stdout))
        sources = sorted(set(map(StorePath.parse, paths)))
        roots.mkdir(parents=True, exist_ok=True)
        await self._run(
            "nix-store", "--realise", *map(str, sources), "--add-root", str(roots / "source"), "--indirect",
            timeout=self._limits.build_timeout,
        )  # fmt: skip
        return sources

    async def realise(
        self,
        derivations: Sequence[str],
        roots: Path,
        build_log: Path,
        *,
        own: bool = True,
        timings: Timings | None = None,
        on_plan: Callable[[FetchPlan], object] = lambda _: None,
        scratch: Path | None = None,
    ) -> None:
        """Build what isn't there, and protect it from Nix's garbage collector by links in `roots`.

        A derivation may be followed by `!` and the output that is wanted, else all of them are. What isn't
        of Chandlery's `own` expressions sees nothing of this machine but what the options say, and binary
        caches are asked for it first. What Nix says goes to the file `build_log` (see `nix.build_log`), and
        how long it fetched and built to `timings`. `on_plan` is told what Nix is about to fetch from binary
        caches; what it raises stops Nix. Builders have their own folders in `scratch`; see there.
        Raises `BuildError`, `BuildTimeoutError` when the limit is reached, `DerivationMissingError`.
        """
        roots.mkdir(parents=True, exist_ok=True)
        command = (
            *("nix-store", "--realise", *derivations, "--add-root", str(roots / "result"), "--indirect"),
            *("--log-format", "internal-json"),
        )
        timings = timings or Timings()
        async with BuildLog(build_log, timings.add, FetchPlans(on_plan)) as said:
            try:
                result = await self._run(
                    *command,
                    purpose=Purpose.BUILD if own else Purpose.BUILD_OTHERS,
                    timeout=self._limits.build_timeout,
                    on_output=said.feed,
                    check=False,
                    scratch=scratch,
                )
            except StoppedError as error:
                what = ", ".join(package_name(path) for path in derivations)
                tail = log_tail(said.last_words())
                raise BuildTimeoutError(what, self._limits.build_timeout, tail) from error
        if result.code < 0:
            what = ", ".join(map(package_name, derivations))
            reason = f"Nix was killed by signal {-result.code}: is there too little memory?"
            raise BuildError(what, reason, log_tail(said.last_words()))
        if result.code != 0:
            raise build_error(said.last_words(), derivations)

    async def closure(self, roots: Iterable[StorePath]) -> Closure:
        """Return the closure of store paths that are there."""
        wanted = tuple(sorted(set(roots)))
        known = await self.known_closure(wanted)
        if known is not None and known.roots == wanted:
            return known
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

    async def known_closure(self, roots: Sequence[StorePath]) -> Closure | None:
        """Return the closure of those of some store paths that are there, which may be none.

        It is None where only Nix itself can tell.
        """
        return await self._ask_database(lambda database: database.closure(roots))

    async def protect_known(self, paths: Sequence[StorePath], roots: Path) -> bool:
        """Protect store paths like what `realise` builds, if all are there; tell whether they are.

        It is false, too, where only Nix itself can tell. No collector may run meanwhile: see `beginning`.
        """
        if self._folder is None:
            return False
        state = self._folder / "nix/var/nix/gcroots/auto"
        with storage_errors(roots):
            await asyncio.to_thread(_add_roots, state, paths, roots)
        texts = [path.text for path in paths]
        valid = await self._ask_database(lambda database: database.valid(texts))
        return valid is not None and valid >= set(texts)

    async def made_by(self, derivations: Sequence[str]) -> tuple[Closure, frozenset[StorePath]] | None:
        """Return what derivations and those that they need will make; see `NixDatabase`.

        It is None where only Nix itself can tell.
        """
        return await self._ask_database(lambda database: database.made_by(derivations))

    async def newest(self) -> int:
        """Return the number of what was registered last in the store; 0 where only Nix itself can tell."""
        return await self._ask_database(lambda database: database.newest()) or 0

    async def added(self, derivations: Sequence[str], since: int, scratch: Path) -> int:
        """Return the bytes that derivations, and those that they need, have added since a `newest`.

        What they are writing counts, and what is in their `scratch`. It is 0 where only Nix itself can tell.
        """
        found = await self._ask_database(lambda database: database.added(derivations, since))
        if found is None:
            return 0
        return found.registered + await asyncio.to_thread(
            unfinished_bytes, self.store_root, scratch, found.unfinished
        )

    @asynccontextmanager
    async def scratch(self) -> AsyncIterator[Path]:
        """Make a folder for the folders that builders work in; whatever they leave there goes with it.

        Nix removes them itself, unless it is killed. Of its own accord it makes them side by side, with names
        that don't say whose they are.
        """
        folder = self._configuration.temporary_folder
        with storage_errors(folder):
            made = Path(mkdtemp(prefix="chandlery-", dir=folder))
        try:
            yield made
        finally:
            await asyncio.to_thread(shutil.rmtree, made, ignore_errors=True)

    async def _ask_database(self, ask: Callable[[NixDatabase], T]) -> T | None:
        """Read the database of Chandlery's own store; None if there is none that can be read."""
        if self._database is None:
            return None
        try:
            return await asyncio.to_thread(ask, self._database)
        except DatabaseUnreadableError as error:
            log.info("Nix is asked, since its database can't be read", reason=str(error))
            return None

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
        """Return whether the store is Chandlery's own: of the machine's, others decide what is garbage."""
        return self._folder is not None

    async def sizes(self) -> dict[str, int]:
        """Return the nar size of every store path."""
        listed = await self._run(
            "nix", "path-info", "--all", "--size", timeout=self._limits.evaluation_timeout
        )
        lines = (line.split() for line in listed.stdout.splitlines())
        return {path: int(size) for path, size in lines}

    async def garbage(self) -> list[str]:
        """Return the store paths that nothing protects: no link in a folder of roots, no running Nix."""
        listed = await self._run("nix-store", "--gc", "--print-dead", timeout=self._limits.build_timeout)
        return [line for line in listed.stdout.splitlines() if line.startswith("/")]

    async def collect_garbage(self, at_most: int) -> None:
        """Delete store paths that nothing protects, until `at_most` bytes are freed or none is left.

        Of builds that are `beginning`, those here already are waited for, and others wait.
        """
        if self._lock is None:
            raise NixError("what is garbage in the machine's store is not Chandlery's to say")
        limit = str(at_most)
        async with self._lock.collecting():
            await self._run("nix-store", "--gc", "--max-freed", limit, timeout=self._limits.build_timeout)

    async def remove_left_sandboxes(self) -> None:
        """Remove what builders were writing that were killed; Nix says of which it is certain."""
        if not self.owns_store:
            return
        for name in await asyncio.to_thread(left_sandboxes, self.store_root):
            # One after the other: of several, Nix removes none after one that is in use.
            await self._run(
                "nix-store", "--delete", f"/nix/store/{name}", timeout=self._limits.build_timeout, check=False
            )

    def beginning(self) -> AbstractAsyncContextManager[Reader]:
        """Keep `collect_garbage` away while a build looks what is there, and begins; see `nix.store_lock`."""
        return self._lock.beginning() if self._lock else nullcontext(Reader())

    async def instantiate(self, expression: str, arguments: Mapping[str, str], roots: Path) -> str:
        """Return the derivation of an expression of Chandlery's own, called with strings.

        It is protected like what `realise` builds, and with it all that it is built from.
        """
        roots.mkdir(parents=True, exist_ok=True)
        link = roots / "derivation"
        await self._run(
            "nix-instantiate", str(EXPRESSIONS / expression), *_arguments(arguments),
            "--add-root", str(link), "--indirect",
            timeout=self._limits.evaluation_timeout,
        )  # fmt: skip
        return str(link.readlink())

    async def _evaluate(
        self,
        packages: PackageSet,
        expression: str,
        about: Mapping[str, Any],
        timeout: float,
        on_output: Callable[[bytes], object] | None = None,
    ) -> bytes | Resolution:
        """Evaluate an expression about a package set; see `Evaluate`."""
        try:
            result = await self._run(
                "nix-instantiate", "--eval", "--strict", "--json", "--read-write-mode",
                *packages.arguments(expression, about),
                purpose=packages.purpose, timeout=timeout, memory=self._limits.evaluation_memory,
                on_output=on_output, check=False,
            )  # fmt: skip
        except StoppedError as error:
            return failed(str(error), EvaluationTimeoutError.reason)
        if result.code == 0:
            return result.stdout.encode()
        reason, message = evaluation_failure(result.code, result.stderr)
        limit = self._limits.evaluation_memory
        if reason == EvaluationMemoryError.reason and limit:
            message += f"; the limit on this server is {limit / (1 << 30):.3g} GiB"
        return failed(packages.shortened(message), reason)

    async def _run(
        self,
        program: str,
        *arguments: str,
        timeout: float,
        purpose: Purpose = Purpose.OWN,
        memory: int = 0,
        on_output: Callable[[bytes], object] | None = None,
        check: bool = True,
        scratch: Path | None = None,
    ) -> Result:
        """Run one of Nix's programs; after `timeout` seconds it is stopped, and `StoppedError` raised."""
        environment = self._configuration.environment(purpose)
        if scratch is not None:
            environment["TMPDIR"] = str(scratch)
        before = await self._before_commands()
        async with self._stopped_by_low_disk(purpose):
            result = await run(
                (program, *arguments), environment, Limits(timeout, memory=memory), on_output, before
            )
        if result.code != 0 and self._is_full(result.stderr):
            raise StorageFullError(str(self.store_root))
        if check and result.code != 0:
            kind = DerivationMissingError if says_derivation_missing(result.stderr) else NixError
            raise kind(f"{program}: {last_error(result.stderr)}")
        return result

    def _stopped_by_low_disk(self, purpose: Purpose) -> AbstractAsyncContextManager[None]:
        """Stop what fetches and builds when too little is left of the disk; what collects garbage goes on."""
        if purpose is Purpose.OWN or not self._limits.free_disk:
            return nullcontext()
        return stopped_by(watch_free_disk(self.store_root, self._limits.free_disk))

    def _is_full(self, stderr: str) -> bool:
        """Return whether it is the disk that a program failed for."""
        if says_disk_full(stderr):
            return True
        # What SQLite says of a full disk isn't always that.
        return "disk I/O error" in stderr and is_full(self._folder or Path("/nix"))


def _arguments(arguments: Mapping[str, str]) -> list[str]:
    """Return the arguments of Nix for an expression of Chandlery's own that builds something."""
    described = {**arguments, "hostPaths": msgspec.json.encode(host_paths()).decode()}
    return [word for name, value in described.items() for word in ("--argstr", name, value)]


def _add_roots(state: Path, paths: Iterable[StorePath], roots: Path) -> None:
    """Do what `nix-store --add-root --indirect` does: a link, and one to it, which Nix removes with it."""
    roots.mkdir(parents=True, exist_ok=True)
    state.mkdir(parents=True, exist_ok=True)
    for path in paths:
        link = roots / path.base_name
        indirect = state / hashlib.sha256(str(link).encode(errors="surrogateescape")).hexdigest()[:32]
        for made, target in ((link, path.text), (indirect, str(link))):
            with suppress(FileExistsError):
                made.symlink_to(target)
