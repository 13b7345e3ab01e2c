"""Folders of source trees: what fills one, and what is in them."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path


def filled(text: str) -> Callable[[Path], Awaitable[None]]:
    async def fill(target: Path) -> None:
        target.mkdir()
        (target / "default.nix").write_text(text)

    return fill


def making(folder: Path) -> list[str]:
    return os.listdir(folder / "making")


def revisions(folder: Path) -> list[str]:
    return sorted(set(os.listdir(folder)) - {"making", "lock"})
