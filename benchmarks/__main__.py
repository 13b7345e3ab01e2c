"""Runs every benchmark on one data folder, which is made anew unless CHANDLERY_BENCH_DATA names one."""

import asyncio
import os
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks import layering, packing, pulling
from chandlery import logs


def main() -> None:
    """Print a table for each."""
    logs.configure("json")
    console = Console(highlight=False)
    # The peers that are worth the time; `python -m benchmarks.layering` has all.
    console.print(layering.table(strategies=("grouped", "one-per-path", "nixery")))
    with tempfile.TemporaryDirectory(prefix="chandlery-bench-") as temporary:
        data_dir = Path(os.environ.get("CHANDLERY_BENCH_DATA") or temporary)
        console.print(asyncio.run(pulling.table(data_dir)))
        console.print(asyncio.run(packing.table(data_dir)))


if __name__ == "__main__":
    main()
