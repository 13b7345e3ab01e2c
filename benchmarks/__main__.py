"""Runs every benchmark on one data folder, which is made anew unless CHANDLERY_BENCH_DATA names one."""

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks import evaluation, layering, mixed, packing, pulling, serving
from chandlery.telemetry import logs


def main() -> None:
    """Print a table for each."""
    logs.configure("json")
    # Where nobody says how wide it is, as in a file, the tables are whole.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    # The peers that are worth the time; `python -m benchmarks.layering` has all.
    console.print(layering.table(strategies=("grouped", "one-per-path", "nixery")))
    with tempfile.TemporaryDirectory(prefix="chandlery-bench-") as temporary:
        data_dir = Path(os.environ.get("CHANDLERY_BENCH_DATA") or temporary)
        console.print(asyncio.run(pulling.table(data_dir)))
        console.print(asyncio.run(evaluation.table(data_dir)))
        console.print(asyncio.run(packing.table(data_dir)))
        # The last that needs the folder: it forgets all layers.
        console.print(mixed.table(data_dir))
    with tempfile.TemporaryDirectory(prefix="chandlery-serving-") as temporary:
        for table in serving.tables(Path(temporary)):
            console.print(table)


if __name__ == "__main__":
    main()
