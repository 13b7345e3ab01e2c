"""Running Python as a user who has no rights, for what must work without root."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
# For a Python that is in a folder of root's: it may read everything, and still write nothing.
_READER = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")


@contextmanager
def ordinary_folder() -> Iterator[Path]:
    """Make a folder that belongs to the ordinary user."""
    with tempfile.TemporaryDirectory(prefix="chandlery-") as folder:
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody", "nogroup")
        yield Path(folder)


def run_as_ordinary_user(script: str, *arguments: str) -> str:
    """Run a script with arguments; give what it printed."""
    python: tuple[str, ...] = (sys.executable, "-c")
    if os.geteuid() == 0:
        can_run = subprocess.run([*_NOBODY, "test", "-x", sys.executable], check=False).returncode == 0
        python = (*_NOBODY, *(() if can_run else _READER), *python)
    return subprocess.run(
        [*python, script, *arguments],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=60,
        cwd="/",
    ).stdout
