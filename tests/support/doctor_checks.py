"""Running one check of `chandlery doctor`."""

import time
from pathlib import Path
from typing import Any

from chandlery.doctor.checks import machine_checks, scratch_folder
from chandlery.doctor.examination import Outcome, examine
from chandlery.settings.settings import Settings
from tests.support.package_sets import SOURCE
from tests.support.servers import free_port


async def outcome(check: str, folder: Path, clock: Any = time.time, **options: Any) -> Outcome:
    """Run one check, with a data folder that nobody uses; nothing may be left of it."""
    before = _tree(folder)
    found = await examined(check, folder, clock, **options)
    assert _tree(folder) == before
    return found


async def examined(check: str, folder: Path, clock: Any = time.time, **options: Any) -> Outcome:
    """Run one check, with a data folder."""
    settings = Settings.load(**{"data_dir": folder, "source": SOURCE, "port": free_port(), **options})
    with scratch_folder(settings.data_dir) as scratch:
        [chosen] = [each for each in machine_checks(settings, scratch, clock) if each.name == check]
        [finding] = [finding async for finding in examine([chosen])]
    return finding.outcome


def _tree(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return all that is below a folder, with size and time of change."""
    if not folder.is_dir():
        return {}
    return {
        each: (each.lstat().st_size, each.lstat().st_mtime_ns)
        for each in folder.rglob("*")
        if not each.is_dir()
    }
