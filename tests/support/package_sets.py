"""A small Nix package set (`package_set/default.nix`), and the gates at which some of its builders wait."""

import asyncio
from pathlib import Path

PACKAGE_SET = Path(__file__).parent / "package_set"
SOURCE = f"path!{PACKAGE_SET}"

# Seconds; far more than a builder takes to get to its gate.
_LIMIT = 60.0


class Gates:
    """Files through which a test and builders talk: a builder says that it has come, and waits to go on.

    `data_folder` is Chandlery's, with a Nix store of its own; that store's sandbox gets a way to `folder`.
    """

    def __init__(self, folder: Path, data_folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        configuration = data_folder / "nix" / "etc" / "nix.conf"
        configuration.parent.mkdir(parents=True, exist_ok=True)
        configuration.write_text(f"sandbox-paths = /gates={folder}\n")

    def open(self, name: str) -> None:
        """Let a builder go on, now or when it comes."""
        (self._folder / f"{name}.open").touch()

    def is_reached(self, name: str) -> bool:
        """Return whether a builder waits, or has waited."""
        return (self._folder / f"{name}.reached").exists()

    async def reached(self, name: str) -> None:
        """Wait until a builder waits."""
        async with asyncio.timeout(_LIMIT):
            while not self.is_reached(name):  # noqa: ASYNC110 (a file tells it, and files have no events)
                await asyncio.sleep(0.01)

    async def next_reached(self) -> str:
        """Wait until a builder waits that this has not told yet."""
        async with asyncio.timeout(_LIMIT):
            while True:
                for file in sorted(self._folder.glob("*.reached")):
                    file.unlink()
                    return file.stem
                await asyncio.sleep(0.01)
