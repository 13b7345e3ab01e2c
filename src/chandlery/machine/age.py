"""How old a file is, whatever the clock said when it was written."""

import math
import time
from pathlib import Path

# Seconds by which file systems and clocks may disagree.
_CLOCK_STEP = 2.0


def age_of(file: Path) -> float:
    """Return how many seconds ago a file was written; infinity if it isn't there, or is dated in the future.

    A clock that was ahead once would otherwise make what was written then look new until it has caught up.
    """
    try:
        age = time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return math.inf
    return max(0.0, age) if age > -_CLOCK_STEP else math.inf
