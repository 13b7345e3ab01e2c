"""Runs every benchmark on one data folder, which is made anew unless CHANDLERY_BENCH_DATA names one.

Arguments are the names of those to run: `python -m benchmarks index serving`.
"""

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks import evaluation, index, layering, mixed, packing, pulling, serving
from chandlery.telemetry import logs

_NAMES = ("layering", "index", "pulling", "evaluation", "packing", "mixed", "serving")


def main() -> None:
    """Print a table for each."""
    wanted = sys.argv[1:] or _NAMES
    if unknown := sorted({*wanted} - {*_NAMES}):
        sys.exit(f"{', '.join(unknown)}: there are {', '.join(_NAMES)}")
    logs.configure("json")
    # Where nobody says how wide it is, as in a file, the tables are whole.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    if "layering" in wanted:
        # The peers that are worth the time; `python -m benchmarks.layering` has all.
        console.print(layering.table(strategies=("grouped", "one-per-path", "nixery")))
    if "index" in wanted:
        for table in index.tables():
            console.print(table)
    with tempfile.TemporaryDirectory(prefix="chandlery-bench-") as temporary:
        data_dir = Path(os.environ.get("CHANDLERY_BENCH_DATA") or temporary)
        for name, benchmark in (("pulling", pulling), ("evaluation", evaluation), ("packing", packing)):
            if name in wanted:
                console.print(asyncio.run(benchmark.table(data_dir)))
        if "mixed" in wanted:
            # The last that needs the folder: it forgets all layers.
            console.print(mixed.table(data_dir))
    if "serving" in wanted:
        with tempfile.TemporaryDirectory(prefix="chandlery-serving-") as temporary:
            for table in serving.tables(Path(temporary)):
                console.print(table)


if __name__ == "__main__":
    main()
