from pathlib import Path

from tests.support.command_line import run
from tests.support.package_sets import SOURCE
from tests.support.servers import free_port

# doctor


def test_doctor_says_that_a_machine_is_well(tmp_path: Path) -> None:
    finished = run(
        *("doctor", "--data-dir", str(tmp_path / "data")),
        CHANDLERY_SOURCE=SOURCE,
        CHANDLERY_PORT=str(free_port()),
        CHANDLERY_MIN_FREE_DISK="0",
    )
    assert finished.returncode == 0, finished
    assert finished.stderr == ""
    *lines, empty, summary = finished.stdout.splitlines()
    assert empty == ""
    assert "no failures" in summary
    checked = {line[9:22].strip() for line in lines if line[:1] != " "}
    assert {"nix", "sandbox", "data folder", "disk", "source", "storage", "clock", "address"} <= checked
    assert not (tmp_path / "data").exists()
