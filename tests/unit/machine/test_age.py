import math
import os
import time
from pathlib import Path

import pytest

from chandlery.machine.age import age_of


@pytest.mark.parametrize(
    ("written", "least", "most"),
    [
        (-1000.0, 1000.0, 1010.0),
        (0.0, 0.0, 10.0),
        (1.0, 0.0, 0.0),
        (864_000.0, math.inf, math.inf),
    ],
)
def test_what_is_dated_in_the_future_is_old(
    tmp_path: Path, written: float, least: float, most: float
) -> None:
    file = tmp_path / "file"
    file.touch()
    moment = time.time() + written
    os.utime(file, (moment, moment))
    assert least <= age_of(file) <= most


def test_what_is_not_there_is_old(tmp_path: Path) -> None:
    assert age_of(tmp_path / "missing") == math.inf
