"""What Nix says on stderr, and which error that is. No I/O."""

import re
from collections import deque
from collections.abc import Sequence

from chandlery.errors import BuildError, DownloadError, NixError

# Lines of builders' output that an error repeats.
LOG_TAIL = 20
# Words of an output that has no error in it.
_LAST_WORDS = 30

_BUILDER_FAILED = re.compile(r"error: builder for '([^']+)' (failed.*?);?$", re.MULTILINE)
# A line that ends with "retrying" is not the last word.
_DOWNLOAD_FAILED = re.compile(
    r"^error: (unable to download (?!.* retrying in).*|hash mismatch in fixed-output derivation .*)",
    re.MULTILINE,
)
_MISSING_DERIVATION = re.compile(
    r"path '[^']+\.drv' (?:is not valid|does not exist)|derivation '[^']+' .*not valid"
    r"|cannot build missing derivation|don't know how to build these paths"
    r"|(?:getting status of|opening file) '[^']+\.drv'"
    # Nix 2.8 may find a path that a build needs, and lose it to the collector before it protects it.
    r"|error: path '/nix/store/[^']+' is not valid"
)
_TRACE_HINT = " (use '--show-trace' to show detailed location information)"
_NIX_LINE = re.compile(
    r"(this|these) .*(will be (built|fetched)|derivations?)|  /nix/store/|building '|error: |warning: "
)
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
    failed = _BUILDER_FAILED.search(stderr)
    if failed is not None:
        return BuildError(package_name(failed[1]), f"its builder {failed[2]}", tail)
    return BuildError(", ".join(map(package_name, derivations)), last_error(stderr), tail)


def log_tail(output: str) -> list[str]:
    """Give the last lines that builders wrote, without what Nix says around them."""
    lines = (line for line in output.splitlines() if line.strip() and not _NIX_LINE.match(line))
    return list(deque(lines, maxlen=LOG_TAIL))


def package_name(derivation: str) -> str:
    """`/nix/store/<hash>-git-2.39.5.drv!out` -> `git-2.39.5`."""
    return derivation.rpartition("/")[2].partition("!")[0][33:].removesuffix(".drv")


def last_error(stderr: str) -> str:
    """Give the reason in Nix's output, without the places in the expressions that led there."""
    if "error: " not in stderr:
        return " ".join(stderr.split()[-_LAST_WORDS:]) or "no reason given"
    after = stderr.rpartition("error: ")[2]
    kept: list[str] = []
    for line in after.splitlines():
        if re.match(r"\s*(at|…|… ) ?", line) and (" at " in f" {line.strip()} " or "…" in line):
            break
        if line.strip():
            kept.append(line.strip())
        elif kept:
            break
    return " ".join(kept).replace(_TRACE_HINT, "") or "no reason given"


def says_disk_full(output: str) -> bool:
    """Tell whether Nix says that there is no space left."""
    return _DISK_FULL.search(output) is not None


def says_derivation_missing(output: str) -> bool:
    """Tell whether Nix misses something that was in its store before."""
    return _MISSING_DERIVATION.search(output) is not None
