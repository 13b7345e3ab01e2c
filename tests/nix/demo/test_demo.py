import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.package_sets import SOURCE
from tests.support.processes import running
from tests.support.servers import LIMIT, environment, wait_until

# What takes far longer to evaluate than a test may run.
ENDLESS = """{ system }:
let numbers = builtins.genList (number: number) 100000; in
builtins.foldl' (sum: _: builtins.foldl' (one: other: one + other) sum numbers) 0 numbers
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_that_the_demo_started_and_removes_what_it_made(
    tmp_path: Path, number: signal.Signals
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "default.nix").write_text(ENDLESS)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    argv = [sys.executable, "-m", "chandlery", "demo", "--source", f"path!{packages}"]
    with subprocess.Popen(
        argv,
        env=environment(TMPDIR=str(temporary)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as demo:
        # The server has begun with its data folder, which is in the demo's own.
        wait_until(lambda: bool(list(temporary.glob("chandlery-demo-*/data/nix-stores"))))
        demo.send_signal(number)
        _, complaint = demo.communicate(timeout=LIMIT)
    assert demo.returncode == 130, complaint
    assert "Traceback" not in complaint
    wait_until(lambda: not running(str(temporary)))
    assert not list(temporary.iterdir())


def test_what_does_not_work_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    # The set has no git, which the demo pulls.
    finished = subprocess.run(
        [sys.executable, "-m", "chandlery", "demo", "--source", SOURCE],
        env=environment(TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert finished.returncode == 1
    assert "not in the package set: git" in finished.stderr
    assert "Traceback" not in finished.stderr
    wait_until(lambda: not running(str(tmp_path)))
    assert not list(tmp_path.iterdir())
