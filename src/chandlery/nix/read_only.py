"""What builders may see of this machine, shown so that they can't change it, whoever this server runs as.

Nix binds what a derivation asks to see (`__impureHostDeps`) into its sandbox as it stands, writable. Without
users to build as, a builder has the server's own user: for root's nothing on this machine would be safe. So
root's Nix works in a mount namespace of its own, in which those paths are mounted once more, read-only, and
what is mounted below them too. Nix's binds take that over (mount(2), MS_BIND).
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# $1 is a folder that stays writable, then come paths, "--", mounts below these, "--", and the program.
_SCRIPT = """
# A mount of its own, so that it isn't part of one that becomes read-only.
mkdir -p "$1"
mount --rbind "$1" "$1"
shift
while [ "$1" != -- ]; do mount -o rbind,ro "$1" "$1"; shift; done
shift
while [ "$1" != -- ]; do mount -o remount,bind,ro "$1"; shift; done
shift
exec "$@"
"""


def read_only(paths: Iterable[str], writable: Path) -> Sequence[str]:
    """Return what stands before a command so that it can't change these paths, nor what it starts.

    `writable` is a folder that stays as it is, even below one of them. It takes CAP_SYS_ADMIN.
    """
    kept = os.path.realpath(writable)
    there = {os.path.realpath(path) for path in paths if Path(path).exists()}
    outermost = sorted(path for path in there if not any(_is_below(path, other) for other in there))
    below = [
        mounted
        for mounted in _mounts()
        if any(_is_below(mounted, path) for path in outermost)
        if mounted != kept and not _is_below(mounted, kept)
    ]
    script = ("/bin/sh", "-euc", _SCRIPT, "read-only", kept, *outermost, "--", *below, "--")
    return ("unshare", "--mount", "--propagation", "private", "--", *script)


def _mounts() -> list[str]:
    """Return where something is mounted, an outer mount before an inner one (proc(5), mountinfo)."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    escaped = (line.split()[4] for line in lines)
    places = {re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), place) for place in escaped}
    return sorted(map(os.fsdecode, places))


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(f"{folder.rstrip('/')}/")
