"""Small files that survive a power cut whole."""

import os
from pathlib import Path


def durably_replace(file: Path, content: bytes) -> None:
    """Write a small file: a kill or a power cut leaves the old content or the new. One process at a time."""
    aside = file.with_name(f"{file.name}.new")
    with aside.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    aside.rename(file)
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
