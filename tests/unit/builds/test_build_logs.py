import os
from pathlib import Path

from chandlery.builds.build_logs import BuildLogs


def a_log(logs: BuildLogs, number: int, size: int = 0) -> Path:
    file = logs.file(f"build-{number}")
    file.write_bytes(b"x" * size)
    os.utime(file, (number, number))
    return file


async def test_the_newest_logs_are_kept_and_those_of_builds_that_run(tmp_path: Path) -> None:
    logs = BuildLogs(tmp_path, 3)
    files = [a_log(logs, number) for number in range(6)]
    (tmp_path / "key.building").write_text("build-1")
    (tmp_path / "key.unfinished").touch()
    await logs.trim()
    assert [file.exists() for file in files] == [False, True, False, True, True, True]
    assert (tmp_path / "key.unfinished").exists()


async def test_fewer_logs_than_are_kept_all_stay(tmp_path: Path) -> None:
    logs = BuildLogs(tmp_path, 3)
    files = [a_log(logs, number) for number in range(2)]
    await logs.trim()
    assert all(file.exists() for file in files)


async def test_the_newest_logs_are_kept_that_have_so_many_bytes_together(tmp_path: Path) -> None:
    logs = BuildLogs(tmp_path, 100, 250)
    files = [a_log(logs, number, size=100) for number in range(5)]
    await logs.trim()
    assert [file.exists() for file in files] == [False, False, False, True, True]
