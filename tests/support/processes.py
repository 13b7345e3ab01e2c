"""Looking for processes, to see that none is left."""

from contextlib import suppress
from pathlib import Path


def running(word: str) -> list[str]:
    """Return the command lines of processes that have this word in them."""
    return list(commands(word).values())


def commands(word: str) -> dict[int, str]:
    """Return the same by the numbers of the processes."""
    found = {}
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):
            command = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in command:
                found[int(process.parent.name)] = command
    return found
