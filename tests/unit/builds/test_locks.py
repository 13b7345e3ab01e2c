import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chandlery.builds.locks import BuildClaims
from chandlery.machine.locks import try_lock

CLAIM_AND_WAIT = """
import sys, time
from pathlib import Path
from chandlery.builds.locks import BuildClaims

claims = BuildClaims(Path(sys.argv[1]), 1)
held = claims.claim("git", "build-1"), claims.slot()
print("claimed", flush=True)
time.sleep(60)
"""


@pytest.fixture
def claims(tmp_path: Path) -> BuildClaims:
    claims = BuildClaims(tmp_path, 2)
    claims.open()
    return claims


def test_a_key_is_claimed_once_and_again_when_it_was_given_back(tmp_path: Path, claims: BuildClaims) -> None:
    other = BuildClaims(tmp_path, 2)
    claim = claims.claim("git", "build-1")
    assert claim
    with claim:
        assert other.claim("git", "build-2") is None
        assert other.holder("git") == "build-1"
        assert other.holder("jq") is None
    assert other.holder("git") is None
    again = other.claim("git", "build-2")
    assert again
    assert claims.holder("git") == "build-2"
    again.give_back()
    assert not list(tmp_path.glob("*.building"))


def test_a_key_that_is_given_back_while_it_is_claimed_is_claimed_once(
    tmp_path: Path, claims: BuildClaims, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gives it back removes the file, which another one has opened by then, and locks in vain."""
    before = claims.claim("git", "build-1")
    assert before

    def lock_a_moment_later(descriptor: int) -> bool:
        monkeypatch.undo()
        before.give_back()
        return try_lock(descriptor)

    monkeypatch.setattr("chandlery.builds.locks.try_lock", lock_a_moment_later)
    now = BuildClaims(tmp_path, 2).claim("git", "build-2")
    assert now
    assert claims.claim("git", "build-3") is None
    assert claims.holder("git") == "build-2"
    now.give_back()


def test_there_are_as_many_slots_as_may_be_taken_at_once_over_all(
    tmp_path: Path, claims: BuildClaims
) -> None:
    other = BuildClaims(tmp_path, 2)
    first, second = claims.slot(), other.slot()
    assert first
    assert second
    assert claims.slot() is other.slot() is None
    second.close()
    third = claims.slot()
    assert third
    for each in (first, third):
        each.close()


def test_what_a_process_had_is_free_when_it_is_killed(tmp_path: Path, claims: BuildClaims) -> None:
    argv = [sys.executable, "-c", CLAIM_AND_WAIT, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "claimed\n"
        assert claims.holder("git") == "build-1"
        process.kill()
    assert claims.holder("git") is None
    claims.open()
    assert not list(tmp_path.glob("*.building"))
    first, second = claims.slot(), claims.slot()
    assert first
    assert second


def test_it_is_known_when_somebody_last_waited_for_a_build(tmp_path: Path, claims: BuildClaims) -> None:
    claim = claims.claim("git")
    assert claim
    long_ago = time.time() - 1000
    os.utime(tmp_path / "git.building", (long_ago, long_ago))
    assert claims.waited_for("git") > 900
    BuildClaims(tmp_path, 2).wait_for("git")
    assert claims.waited_for("git") < 900
    assert claims.waited_for("jq") == float("inf")


def test_where_nothing_can_be_written_builds_are_not_kept_apart(tmp_path: Path) -> None:
    claims = BuildClaims(tmp_path / "missing", 1)
    for _ in range(2):
        assert claims.claim("git")
        assert claims.slot()
    assert claims.holder("git") is None
