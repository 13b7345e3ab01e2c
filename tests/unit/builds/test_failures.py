import os
import time
from pathlib import Path

import pytest

from chandlery.builds.failures import FailedBuilds
from chandlery.errors import (
    BuildError,
    BuildTooLargeError,
    ChandleryError,
    DownloadError,
    LowDiskError,
    PackagesNotFoundError,
    evaluation_error,
)
from chandlery.machine.download import DownloadFailedError


@pytest.mark.parametrize(
    "error",
    [
        PackagesNotFoundError(["gti"], {"gti": ["git", "gri"]}),
        BuildError("git", "its builder failed", ["make: error"]),
        DownloadError("git", "404", []),
        BuildTooLargeError("git", "has 101 packages of 100", 101, 100, "max_packages"),
        LowDiskError("/data", 1, 2, 3),
        evaluation_error({"steam": {"reason": "unfree", "message": ""}}),
    ],
)
def test_another_process_is_told_what_one_has_seen(tmp_path: Path, error: ChandleryError) -> None:
    error.build = "20240101-120000-0123abcd"
    FailedBuilds(tmp_path, 60).remember("key", error)
    told = FailedBuilds(tmp_path, 60).recent("key")
    assert type(told) is type(error)
    assert str(told) == str(error)
    assert told.build == error.build
    assert vars(told).keys() == vars(error).keys()
    assert FailedBuilds(tmp_path, 60).recent("other") is None


def test_an_error_of_another_module_is_told_as_what_it_is_a_kind_of(tmp_path: Path) -> None:
    failures = FailedBuilds(tmp_path, 60)
    failures.remember("key", DownloadFailedError("https://example.com/", "404"))
    assert isinstance(failures.recent("key"), ChandleryError)


def test_a_failure_is_over_after_a_while_and_its_file_goes(tmp_path: Path) -> None:
    failures = FailedBuilds(tmp_path, 0.0)
    failures.remember("key", BuildError("git", "no", []))
    assert failures.recent("key") is None
    (file,) = tmp_path.iterdir()
    os.utime(file, (time.time() - 1, time.time() - 1))
    failures.sweep()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"until": 9e9, "kind": "Popen", "arguments": [], "attributes": {}}']
)
def test_what_is_no_failure_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key.failed").write_bytes(content)
    assert FailedBuilds(tmp_path, 60).recent("key") is None


def test_where_nothing_can_be_written_a_failure_is_forgotten(tmp_path: Path) -> None:
    failures = FailedBuilds(tmp_path / "missing", 60)
    failures.remember("key", BuildError("git", "no", []))
    assert failures.recent("key") is None
