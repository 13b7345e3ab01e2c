"""What Nix says on stderr, and which error that is. No I/O."""

import re
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from chandlery.errors import (
    BrokenError,
    BuildError,
    BuildTimeoutError,
    DownloadError,
    EvaluationError,
    EvaluationFailedError,
    EvaluationMemoryError,
    InfiniteRecursionError,
    InsecureError,
    NixError,
    UnfreeError,
    UnsupportedSystemError,
)

# Lines of builders' output that an error repeats.
LOG_TAIL = 20
# Words of an output that has no error in it.
_LAST_WORDS = 30

# The second form is Nix 2.34's.
_BUILDER_FAILED = re.compile(
    r"error: (?:builder for '(?P<derivation>[^']+)' (?P<how>failed.*?);?"
    r"|Cannot build '(?P<other>[^']+)'\.\s+Reason: builder (?P<reason>failed.*?)\.?)$",
    re.MULTILINE,
)
# Nix 2.26 has the process say it that was to become the builder.
_NOT_STARTED = re.compile(r"^ *error: (executing '[^']+': .*)$", re.MULTILINE)
# Nix 2.34 doesn't say which derivation it was.
_TIMED_OUT = re.compile(r"error: (?:building of '([^'!^]+)[^']*' .*)?timed out after (\d+) seconds")
# A line that ends with "retrying" is not the last word.
_DOWNLOAD_FAILED = re.compile(
    r"^ *error: (unable to download (?!.* retrying in).*|hash mismatch in fixed-output derivation .*)",
    re.MULTILINE,
)
_MISSING_DERIVATION = re.compile(
    r"path '[^']+\.drv' (?:is not valid|does not exist)|derivation '[^']+' .*not valid"
    r"|cannot build missing derivation|don't know how to build these paths"
    r"|(?:getting status of|opening file) '[^']+\.drv'"
    # Nix 2.8 may find a path that a build needs, and lose it to the collector before it protects it.
    r"|error: path '/nix/store/[^']+' is not valid"
)
_HOST_PATH_DENIED = re.compile(
    r"derivation '([^']+)' requested impure path '([^']+)', but it was not in allowed-impure-host-deps"
)
_TRACE_HINT = "(use '--show-trace' to show detailed location information)"
_NIX_LINE = re.compile(
    r"(this|these) .*(will be (built|fetched)|derivations?)|  /nix/store/|building '|error: |warning: "
    r"|disabling binary cache "
)
# What Nix 2.34 says of a derivation that failed, which repeats the end of its log.
_SUMMARY = re.compile(r"^error: Cannot build '.*\n(?: .*\n)*", re.MULTILINE)
# What nixpkgs' check-meta.nix throws, and Nix itself: of a package that is asked for, or that it needs.
_REFUSALS: Sequence[tuple[type[EvaluationError], re.Pattern[str]]] = (
    (UnfreeError, re.compile("has an unfree license")),
    (BrokenError, re.compile("is marked as broken")),
    (InsecureError, re.compile("is marked as insecure")),
    (
        UnsupportedSystemError,
        re.compile("is not available on the requested hostPlatform|is not supported on"),
    ),
    (InfiniteRecursionError, re.compile("infinite recursion encountered|stack overflow")),
)
# The first is said by Boehm's collector, the others by Nix.
_OUT_OF_MEMORY = re.compile(
    r"^GC Warning: Out of Memory!|^error: (?:std::bad_alloc|out of memory)$", re.MULTILINE
)
# What nixpkgs says after the reason is for people at their own Nix.
_REMEDIATION = re.compile(r",? ?(?:refusing to evaluate\.)?(?: a\) .*)?$", re.DOTALL)
# A line that is longer has no answer.
_LONGEST_LINE = 1 << 20
# The last is git's, of whose failure Nix 2.26 says nothing where it has an older commit.
_OUTDATED = re.compile(
    "could not update local clone|using cached version|using expired cached ref|^fatal: ", re.MULTILINE
)
_NO_NAMESPACES = re.compile(r"namespace|cloning builder process|setting up a private mount|\bunshar")
_TO_BUILD = re.compile(rb"(?:this|these (\d{1,9})) derivations? will be built:")
_TO_FETCH = re.compile(
    rb"(?:this|these \d+) paths? will be fetched "
    rb"\((\d{1,12}(?:\.\d+)?) ([KMGT]i)?B download, (\d{1,12}(?:\.\d+)?) ([KMGT]i)?B unpacked\):"
)
_UNITS = {b"": 0, b"Ki": 10, b"Mi": 20, b"Gi": 30, b"Ti": 40}
_DISK_FULL = re.compile("No space left on device|disk is full", re.IGNORECASE)


class DerivationMissingError(NixError):
    """What was resolved earlier, or what it needs, was removed from the store since; resolve it again."""


def build_error(stderr: str, derivations: Sequence[str]) -> NixError | BuildError:
    """Read from Nix's output what failed and why."""
    if says_derivation_missing(stderr):
        return DerivationMissingError(last_error(stderr))
    tail = log_tail(stderr)
    refused = _DOWNLOAD_FAILED.search(stderr)
    if refused is not None:
        return DownloadError(", ".join(map(package_name, derivations)), refused[1], tail)
    timed_out = _TIMED_OUT.search(stderr)
    if timed_out is not None:
        what = [timed_out[1]] if timed_out[1] else derivations
        return BuildTimeoutError(", ".join(map(package_name, what)), int(timed_out[2]), tail)
    failed = _BUILDER_FAILED.search(stderr)
    if failed is not None:
        not_started = _NOT_STARTED.search(stderr)
        reason = not_started[1] if not_started else f"its builder {failed['how'] or failed['reason']}"
        return BuildError(package_name(failed["derivation"] or failed["other"]), reason, tail)
    denied = _HOST_PATH_DENIED.search(stderr)
    if denied is not None:
        reason = f"its builder asks to see {denied[2]} of this machine, which host_paths doesn't name"
        return BuildError(package_name(denied[1]), reason, tail)
    return BuildError(", ".join(map(package_name, derivations)), last_error(stderr), tail)


def evaluation_failure(code: int, stderr: str) -> tuple[str, str]:
    """Read why an evaluation failed: the `reason` of an `EvaluationError`, and Nix's words."""
    if code < 0:
        return EvaluationMemoryError.reason, f"Nix was killed by signal {-code}"
    if _OUT_OF_MEMORY.search(stderr):
        return EvaluationMemoryError.reason, "Nix was out of memory"
    message = last_error(stderr)
    for kind, said in _REFUSALS:
        if said.search(message):
            return kind.reason, _REMEDIATION.sub("", message, count=1)
    return EvaluationFailedError.reason, message


class MarkedLines:
    """Takes a stream in pieces, and gives what follows a mark in its lines to `on_line`."""

    def __init__(self, mark: str, on_line: Callable[[bytes], object]) -> None:
        self._mark = mark.encode()
        self._on_line = on_line
        self._rest = b""

    def __call__(self, piece: bytes) -> None:
        """Take the next piece."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            _, mark, text = line.partition(self._mark)
            if mark:
                self._on_line(text)
        if len(self._rest) > _LONGEST_LINE:
            self._rest = b""


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """What Nix is about to do: how many derivations it builds, and the bytes that binary caches give it."""

    derivations: int
    download: int
    unpacked: int


class FetchPlans:
    """Takes what Nix says, line by line, and gives what it is about to fetch to `on_plan`."""

    def __init__(self, on_plan: Callable[[FetchPlan], object]) -> None:
        self._on_plan = on_plan
        self._derivations = 0

    def __call__(self, line: bytes) -> None:
        """Take the next line."""
        build, fetch = _TO_BUILD.match(line), _TO_FETCH.match(line)
        if build is not None:
            self._derivations = int(build[1] or 1)
        if fetch is not None:
            download, unpacked = (
                int(float(size) * (1 << _UNITS[unit or b""]))
                for size, unit in ((fetch[1], fetch[2]), (fetch[3], fetch[4]))
            )
            self._on_plan(FetchPlan(self._derivations, download, unpacked))


@dataclass(frozen=True, slots=True)
class LockedFlake:
    """A flake as it was at one moment.

    `location` is where that can be had again, with the credentials that were in the address. `revision` is
    that of git, or the sha256 of the content; `last_modified` is in seconds since 1970. `reference` is what
    evaluation takes: it names the source in the store.
    """

    location: str
    revision: str
    last_modified: int
    reference: str


def locked_flake(metadata: Mapping[str, Any]) -> LockedFlake:
    """Read what `nix flake metadata --json` says."""
    locked = metadata["locked"]
    revision = locked.get("rev") or b64decode(locked["narHash"].removeprefix("sha256-")).hex()
    # Of what isn't in git this is the time of a file, which is no part of the revision.
    last_modified = locked.get("lastModified", 1) if "rev" in locked else 1
    known = {name: locked[name] for name in ("narHash", "rev", "revCount", "dir") if name in locked}
    query = urlencode(known | {"lastModified": last_modified}, quote_via=quote)
    location = metadata.get("url") or metadata["resolvedUrl"]
    return LockedFlake(location, revision, last_modified, f"path:{metadata['path']}?{query}")


def archived_sources(archive: Mapping[str, Any]) -> Iterator[str]:
    """Read what `nix flake archive --json` says: store paths of a flake and all its inputs, with repeats."""
    if "path" in archive:
        yield archive["path"]
    for each in archive.get("inputs", {}).values():
        yield from archived_sources(each)


def says_outdated(output: str) -> bool:
    """Return whether Nix could not reach something, and went on with what it had."""
    return _OUTDATED.search(output) is not None


def log_tail(output: str) -> list[str]:
    """Return the last lines that builders wrote, without what Nix says around them."""
    lines = (line for line in _SUMMARY.sub("", output).splitlines() if line.strip())
    return list(deque((line for line in lines if not _NIX_LINE.match(line)), maxlen=LOG_TAIL))


def package_name(derivation: str) -> str:
    """`/nix/store/<hash>-git-2.39.5.drv!out` -> `git-2.39.5`."""
    return derivation.rpartition("/")[2].partition("!")[0][33:].removesuffix(".drv")


def last_error(stderr: str) -> str:
    """Return the reason in Nix's output, without the places in the expressions that led there."""
    if "error: " not in stderr:
        return " ".join(stderr.split()[-_LAST_WORDS:]) or "no reason given"
    after = stderr.rpartition("error: ")[2]
    kept: list[str] = []
    for line in after.splitlines():
        if re.match(r"\s*(at|…|… ) ?", line) and (" at " in f" {line.strip()} " or "…" in line):
            break
        if line.strip().startswith("warning: ") and kept:
            break
        if line.strip():
            kept.append(line.strip())
        elif kept:
            break
    return " ".join(kept).replace(_TRACE_HINT, "").strip() or "no reason given"


def says_disk_full(output: str) -> bool:
    """Return whether Nix says that there is no space left."""
    return _DISK_FULL.search(output) is not None


def says_no_namespaces(output: str) -> bool:
    """Return whether Nix says that the machine doesn't let it make the namespaces of a sandbox."""
    return _NO_NAMESPACES.search(output) is not None


def says_derivation_missing(output: str) -> bool:
    """Return whether Nix misses something that was in its store before."""
    return _MISSING_DERIVATION.search(output) is not None
