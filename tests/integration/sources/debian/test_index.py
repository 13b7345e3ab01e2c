import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from chandlery.errors import SourceUnavailableError
from chandlery.sources.debian.index import (
    KEPT_REVISIONS,
    ArchitectureNotFoundError,
    DebianIndex,
    DebianMirrors,
    load_aliases,
)
from chandlery.sources.debian.progress import FetchProgress
from chandlery.sources.debian.snapshot import DebianSnapshot, parse_packages
from tests.support.debian_packages import Deb
from tests.support.debian_repository import (
    SECURITY,
    SUITE,
    UPDATES,
    DebianRepository,
    Fault,
    debian_repository,
    new_key,
)
from tests.support.debian_snapshots import packages_file, put, state_of
from tests.support.ordinary_user import ordinary_folder, run_as_ordinary_user
from tests.support.processes import running
from tests.support.tasks import all_others_ended, until

PACKAGES_OF_AMD64 = "main/binary-amd64/Packages.xz"


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[DebianRepository]:
    with debian_repository(tmp_path) as repository:
        repository.publish(Deb("bash"), Deb("libc-bin"), Deb("git", fields={"Depends": "bash"}))
        yield repository


@pytest.fixture
def index(tmp_path: Path, repository: DebianRepository) -> DebianIndex:
    return DebianIndex(tmp_path / "index", SUITE, "amd64", repository.mirrors)


def names(index: DebianIndex) -> list[str]:
    pinned = index.current()
    assert pinned is not None
    return (pinned.snapshot / "names.txt").read_text().splitlines()


async def test_a_refresh_makes_a_lock_of_the_suite_its_updates_and_its_security_updates(
    repository: DebianRepository, index: DebianIndex
) -> None:
    repository.publish(Deb("git", "2"), release=UPDATES)
    repository.publish(Deb("git", "3", "any"), Deb("new"), release=SECURITY)

    pinned = await index.refresh()

    assert pinned == index.current()
    main, security = repository.mirrors.main, repository.mirrors.security
    assert pinned.mirrors == (main, main, security)
    assert {"bash", "git", "new", "bashInteractive"} <= set(names(index))
    shards = "".join(path.read_text() for path in pinned.snapshot.glob("*.json"))
    assert '"filename":"pool/main/git_3_amd64.deb","installed_size":0,"name":"git","repository":2' in shards
    assert "git_1_all.deb" not in shards
    assert "git_2_all.deb" not in shards


async def test_an_index_that_did_not_change_gives_the_same_lock_and_is_not_fetched_again(
    repository: DebianRepository, index: DebianIndex
) -> None:
    first = await index.refresh()
    assert await index.refresh() == first

    fetched = [path for path in repository.requests if path.endswith(PACKAGES_OF_AMD64)]
    assert fetched == [f"/debian/dists/{SUITE}/{PACKAGES_OF_AMD64}"]


async def test_an_update_is_another_revision_and_the_one_before_can_still_be_had(
    repository: DebianRepository, index: DebianIndex
) -> None:
    first = await index.refresh()
    repository.publish(Deb("jq"))
    second = await index.refresh()

    assert "jq" in names(index)
    assert index.current() == second != first
    assert index.at(first.revision) == first
    assert index.at(first.revision[:16]) == first
    assert "jq" not in (first.snapshot / "names.txt").read_text()


def test_before_the_first_refresh_there_is_nothing(index: DebianIndex) -> None:
    assert index.current() is None
    assert index.at("0" * 64) is None
    assert index.age() == float("inf")


async def test_an_index_of_another_architecture_has_its_packages(
    tmp_path: Path, repository: DebianRepository
) -> None:
    repository.publish(Deb("git", "2", "any"))
    index = DebianIndex(tmp_path / "arm64", SUITE, "arm64", repository.mirrors)

    snapshot = (await index.refresh()).snapshot

    assert any("git_2_arm64.deb" in path.read_text() for path in snapshot.glob("*.json"))


# What can't be trusted


async def fails(index: DebianIndex, reason: str) -> None:
    """Refresh, which fails for this reason, and see that what was kept before stays in force."""
    before = index.current()
    with pytest.raises(SourceUnavailableError, match=reason):
        await index.refresh()
    assert index.current() == before


async def test_an_index_without_a_signature_is_refused(
    repository: DebianRepository, index: DebianIndex
) -> None:
    repository.publish(Deb("evil"), signed=False)
    await fails(index, "is not signed")

    repository.publish()
    await index.refresh()
    repository.publish(Deb("evil"), signed=False)
    await fails(index, "is no longer signed")


async def test_an_index_that_somebody_else_signed_is_refused(
    repository: DebianRepository, index: DebianIndex
) -> None:
    with new_key() as key:
        repository.publish(Deb("evil"), signer=key)
        await fails(index, "is not signed")

        repository.publish()
        await index.refresh()
        repository.publish(Deb("evil"), signer=key)
        await fails(
            index, "(NO_PUBKEY|Missing key).*: install a newer debian-archive-keyring, or name the keys"
        )


@pytest.mark.parametrize(
    ("fault", "end"),
    [
        (Fault.CORRUPT, PACKAGES_OF_AMD64),
        (Fault.TRUNCATE, PACKAGES_OF_AMD64),
        (Fault.NOT_FOUND, PACKAGES_OF_AMD64),
        (Fault.CORRUPT, "InRelease"),
        (Fault.NOT_FOUND, "InRelease"),
    ],
)
async def test_an_index_that_comes_wrong_or_not_at_all_is_refused(
    repository: DebianRepository, index: DebianIndex, fault: Fault, end: str
) -> None:
    await index.refresh()
    repository.publish(Deb("new"))
    with repository.misbehaving(fault, end) as met:
        await fails(index, "apt said: ")
        assert met.is_set()
    await index.refresh()
    assert "new" in names(index)


async def test_a_mirror_without_the_suites_packages_is_told_from_an_empty_release(
    tmp_path: Path, repository: DebianRepository
) -> None:
    index = DebianIndex(tmp_path / "riscv64", SUITE, "riscv64", repository.mirrors)

    await fails(index, f"debian has no packages of {SUITE} for riscv64")


# A mirror that is down


async def test_a_mirror_that_is_down_leaves_the_last_good_index(
    repository: DebianRepository, index: DebianIndex
) -> None:
    await index.refresh()
    with repository.misbehaving(Fault.REFUSE):
        await fails(index, "can't be reached: apt said: E: Failed to fetch")


async def test_a_refresh_that_is_cancelled_leaves_no_apt_behind_and_no_lock_held(
    repository: DebianRepository, index: DebianIndex
) -> None:
    with repository.misbehaving(Fault.STALL, PACKAGES_OF_AMD64) as met:
        refresh = asyncio.create_task(index.refresh())
        await asyncio.to_thread(met.wait)
        refresh.cancel()
        # Far less than apt waits for a mirror that says nothing.
        async with asyncio.timeout(10):
            with pytest.raises(asyncio.CancelledError):
                await refresh
        assert running(str(index._folder)) == []

    assert (await index.refresh()).revision


# When it is fetched


def told(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what was logged, without the same again."""
    names = [event["event"] for event in events]
    return [name for number, name in enumerate(names) if names[:number][-1:] != [name]]


async def test_a_fetch_that_takes_long_tells_how_far_it_is(
    tmp_path: Path, repository: DebianRepository
) -> None:
    often = partial(FetchProgress, first=0.0, again=0.001)
    index = DebianIndex(tmp_path / "index", SUITE, "amd64", repository.mirrors, often)
    with capture_logs() as events:
        await index.refresh()
    assert told(events) == ["fetching the debian index", "reading the debian index", "debian index fetched"]
    assert {(event["suite"], event["architecture"]) for event in events} == {(SUITE, "amd64")}
    percents = [event["percent"] for event in events if "percent" in event]
    assert percents
    assert percents == sorted(percents)


async def test_a_mirror_that_says_nothing_is_told_of(tmp_path: Path, repository: DebianRepository) -> None:
    often = partial(FetchProgress, first=0.0, again=0.001)
    refresh = DebianIndex(tmp_path / "index", SUITE, "amd64", repository.mirrors, often).refresh()
    with repository.misbehaving(Fault.HANG, "InRelease"), capture_logs() as events:
        task = asyncio.create_task(refresh)
        await until(lambda: any("file" in event for event in events))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # Nothing goes on telling of it.
        await all_others_ended()
    assert told(events) == ["fetching the debian index"]


async def test_a_fetch_that_is_quick_says_so_once(tmp_path: Path, repository: DebianRepository) -> None:
    seldom = partial(FetchProgress, first=1e6)
    with capture_logs() as events:
        await DebianIndex(tmp_path / "index", SUITE, "amd64", repository.mirrors, seldom).refresh()
    assert told(events) == ["debian index fetched"]


async def test_two_refreshes_at_once_fetch_once(
    tmp_path: Path, repository: DebianRepository, index: DebianIndex
) -> None:
    other = DebianIndex(tmp_path / "index", SUITE, "amd64", repository.mirrors)

    first, second = await asyncio.gather(index.refresh(), other.refresh())

    assert first == second
    assert repository.requests.count(f"/debian/dists/{SUITE}/InRelease") == 1


async def test_an_index_that_was_fetched_when_the_clock_was_ahead_is_fetched_again(
    repository: DebianRepository, index: DebianIndex
) -> None:
    before = await index.refresh()
    ahead = time.time() + 864_000
    os.utime(index._folder / "current", (ahead, ahead))
    repository.publish(Deb("bash", "99"), release=SECURITY)
    after = await index.refresh(max_age=3600.0)
    assert after.revision != before.revision
    assert index.age() < 3600.0


async def test_only_an_index_that_is_old_enough_is_fetched(
    tmp_path: Path, repository: DebianRepository, index: DebianIndex
) -> None:
    await index.refresh(max_age=3600)
    assert index.age() < 3600
    an_hour_ago = time.time() - 3600
    os.utime(tmp_path / "index/current", (an_hour_ago, an_hour_ago))
    assert index.age() >= 3600
    fetched = len(repository.requests)

    await index.refresh(max_age=7200)
    assert len(repository.requests) == fetched
    await index.refresh(max_age=3600)
    assert len(repository.requests) > fetched
    assert index.age() < 3600


# This machine's apt


class MachineApt:
    """What this machine's apt is configured with; its state is in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "apt.conf"
        self._folder = folder
        (folder / "lists/partial").mkdir(parents=True)
        self.configure()

    def configure(self, *options: str, sources: str = "") -> None:
        (self._folder / "sources.list").write_text(sources)
        own = (
            f'Dir::Etc::sourcelist "{self._folder}/sources.list";',
            'Dir::Etc::sourceparts "/dev/null";',
            f'Dir::State "{self._folder}";',
            f'Dir::Cache "{self._folder}";',
        )
        self.file.write_text("\n".join([*own, *options]))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MachineApt:
    apt = MachineApt(tmp_path / "machine")
    monkeypatch.setenv("APT_CONFIG", str(apt.file))
    return apt


async def test_the_hooks_and_additions_of_this_machines_apt_are_left_alone(
    tmp_path: Path, repository: DebianRepository, index: DebianIndex, machine: MachineApt
) -> None:
    hooks = ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success")
    machine.configure(
        *(f'APT::Update::{hook} {{ "touch {tmp_path}/a-hook-ran"; }};' for hook in hooks),
        'APT::Architectures { "amd64"; "arm64"; };',
        "Acquire::IndexTargets::deb::Other "
        '{ MetaKey "main/binary-arm64/Packages"; ShortDescription "-"; Description "-"; };',
    )

    await index.refresh()

    assert not (tmp_path / "a-hook-ran").exists()
    assert [path for path in repository.requests if "arm64" in path] == []


async def test_the_mirrors_are_those_of_this_machine_where_no_others_are_set(
    tmp_path: Path, repository: DebianRepository, machine: MachineApt
) -> None:
    main, security = repository.mirrors.main, repository.mirrors.security
    machine.configure(
        sources="deb http://127.0.0.1:1/other stable main\n"
        f"deb http://127.0.0.1:1/tools {SUITE} tools\n"
        f"deb mirror+file:/mirrors.list {SUITE} main\n"
        f"deb {main} {SUITE} contrib main\n"
        f"deb {security} {SUITE}-security main\n"
    )
    index = DebianIndex(tmp_path / "index", SUITE, "amd64", DebianMirrors(keyring=repository.mirrors.keyring))

    assert (await index.refresh()).mirrors == (main, main, security)


async def test_without_any_mirror_the_error_names_the_setting(tmp_path: Path, machine: MachineApt) -> None:
    machine.configure(sources="deb http://127.0.0.1:1/other stable main\n")
    index = DebianIndex(tmp_path / "index", SUITE, "amd64", DebianMirrors())

    await fails(index, "no Debian mirror configured; set CHANDLERY_DEBIAN_MIRROR")


async def test_without_apt_the_error_says_what_is_needed(
    index: DebianIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")

    await fails(index, "apt-get was not found: this package set needs Debian's apt")


def test_an_ordinary_user_can_fetch_an_index() -> None:
    script = """
import asyncio, sys
from pathlib import Path
from chandlery.sources.debian.index import DebianIndex, DebianMirrors

folder, *mirrors = sys.argv[1:]
index = DebianIndex(Path(folder), "bookworm", "amd64", DebianMirrors(*mirrors))
print((asyncio.run(index.refresh()).snapshot / "names.txt").read_text())
"""
    with ordinary_folder() as folder, debian_repository(folder) as repository:
        repository.publish(Deb("bash"))
        mirrors = repository.mirrors
        printed = run_as_ordinary_user(
            script, str(folder / "index"), mirrors.main, mirrors.security, mirrors.keyring
        )

    assert "bash" in printed.splitlines()


# Locks on disk


def an_index(folder: Path) -> DebianIndex:
    return DebianIndex(folder, SUITE, "amd64", DebianMirrors())


def test_a_revision_does_not_depend_on_the_mirrors(tmp_path: Path) -> None:
    index, text = an_index(tmp_path), packages_file("bash")
    first = put(tmp_path, text, mirror="http://one.localhost")
    second = put(tmp_path, text, mirror="http://two.localhost")

    assert first == second
    pinned = index.at(first)
    assert pinned is not None
    assert pinned.mirrors == ("http://two.localhost",)


def test_what_is_no_kept_revision_is_not_found(tmp_path: Path) -> None:
    revision = put(tmp_path, packages_file("bash"))
    index = an_index(tmp_path)

    assert index.at(revision[:12]) == index.current()
    for other in ("latest", "", "../current", "0" * 64, revision[:11], f"{revision}0", f"{revision[:12]}*"):
        assert index.at(other) is None


def test_the_latest_locks_are_kept_and_older_ones_removed(tmp_path: Path) -> None:
    revision = put(tmp_path, packages_file("bash"))
    others = [f"{number:064x}" for number in range(KEPT_REVISIONS)]
    for age, other in enumerate(others):
        (tmp_path / "revisions" / other / "amd64").mkdir(parents=True)
        os.utime(tmp_path / "revisions" / other, (time.time() - age, time.time() - age))
    # One that comes back is the latest.
    os.utime(tmp_path / "revisions" / revision, (0, 0))
    put(tmp_path, packages_file("bash"))

    index = an_index(tmp_path)
    assert [other for other in others if index.at(other)] == others[:-1]
    assert index.at(revision) is not None


def test_the_locks_that_images_need_are_removed_last_and_of_those_the_least_wanted_first(
    tmp_path: Path,
) -> None:
    revisions = [f"{number:064x}" for number in range(KEPT_REVISIONS + 1)]
    for age, revision in enumerate(revisions):
        (tmp_path / "revisions" / revision / "amd64").mkdir(parents=True)
        os.utime(tmp_path / "revisions" / revision, (time.time() - 1000 - age, time.time() - 1000 - age))
    index = an_index(tmp_path)
    index.keep([*revisions[:0:-1], "f" * 64])
    new = put(tmp_path, packages_file("bash"))

    assert [other for other in revisions if not index.at(other)] == revisions[:2]
    assert index.at(new) is not None


def is_whole(folder: Path, text: str) -> bool:
    """Return whether the snapshot of a Packages file is the one in force, with all of its files."""
    snapshot = DebianSnapshot.of(parse_packages(text, 0), load_aliases())
    pinned = an_index(folder).current()
    assert pinned is not None
    on_disk = {path.name: path.read_bytes() for path in pinned.snapshot.iterdir()}
    files = {**dict(snapshot.files()), "popularity.json": snapshot.popularity().encode()}
    return pinned.revision == state_of(text, "amd64").revision(load_aliases()) and on_disk == files


def test_a_kill_while_a_lock_is_made_leaves_the_old_one_in_force_and_nothing_in_the_way(
    tmp_path: Path,
) -> None:
    old, new = packages_file("old"), packages_file("new")
    put(tmp_path, old)
    script = (
        "import sys; from pathlib import Path; from tests.support.debian_snapshots import put; "
        "put(Path(sys.argv[1]), sys.argv[2])"
    )
    half_made = tmp_path / "snapshot.new"
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path), new]) as process:
        while not half_made.exists() or len(os.listdir(half_made)) < 100:
            assert process.poll() is None
        process.kill()

    assert half_made.exists()
    assert is_whole(tmp_path, old)
    put(tmp_path, new)
    assert is_whole(tmp_path, new)


def test_a_kill_between_making_a_lock_and_naming_it_leaves_the_old_one_in_force(tmp_path: Path) -> None:
    old, new = packages_file("old"), packages_file("new")
    put(tmp_path, old)
    named = (tmp_path / "current").read_bytes()
    put(tmp_path, new)
    (tmp_path / "current").write_bytes(named)
    (tmp_path / "current.new").write_bytes(b"half")

    assert is_whole(tmp_path, old)
    put(tmp_path, new)
    assert is_whole(tmp_path, new)


# One revision of all architectures


@pytest.fixture
def other(tmp_path: Path, repository: DebianRepository) -> DebianIndex:
    """Return the same suite for another architecture, whose packages are others."""
    repository.publish(Deb("libc6", architecture="any"))
    return DebianIndex(tmp_path / "index", SUITE, "arm64", repository.mirrors)


async def test_all_architectures_have_one_revision_and_each_has_its_packages(
    repository: DebianRepository, index: DebianIndex, other: DebianIndex
) -> None:
    repository.publish(Deb("microcode", architecture="any"), architectures=["amd64"])

    amd64 = await index.refresh(max_age=3600.0)
    assert not any("binary-arm64" in path for path in repository.requests)
    assert other.current() is None
    arm64 = await other.refresh(max_age=3600.0)

    assert arm64.revision == amd64.revision
    assert other.current() == other.at(amd64.revision) == arm64
    assert "microcode" in names(index)
    assert "microcode" not in names(other)
    # What the Release files list is fetched once.
    assert repository.requests.count(f"/debian/dists/{SUITE}/InRelease") == 1


@pytest.mark.parametrize("release", [SUITE, UPDATES, SECURITY])
async def test_a_change_of_one_architecture_is_a_new_revision_of_all(
    repository: DebianRepository, index: DebianIndex, other: DebianIndex, release: str
) -> None:
    before = await index.refresh()
    await other.refresh(max_age=3600.0)
    repository.requests.clear()
    repository.publish(Deb("firmware", architecture="any"), release=release, architectures=["arm64"])

    after = await index.refresh(also=["arm64"])

    assert after.revision != before.revision
    assert other.current() == other.at(after.revision) != other.at(before.revision)
    assert "firmware" in names(other)
    # The one file that is another.
    [fetched] = [path for path in repository.requests if "/binary-" in path]
    assert fetched.endswith(f"/dists/{release}/main/binary-arm64/Packages.xz")


async def test_machines_that_see_the_same_packages_agree_on_the_revision(
    tmp_path: Path, repository: DebianRepository, index: DebianIndex
) -> None:
    """Whichever architecture each has fetched, and whenever its mirror was signed."""
    mine = await index.refresh()
    repository.publish()
    theirs = await DebianIndex(tmp_path / "elsewhere", SUITE, "arm64", repository.mirrors).refresh()
    assert theirs.revision == mine.revision


async def test_an_architecture_is_fetched_later_at_the_same_revision_though_the_mirror_has_moved_on(
    repository: DebianRepository, index: DebianIndex, other: DebianIndex
) -> None:
    repository.by_hash = True
    repository.publish()
    amd64 = await index.refresh()
    repository.publish(Deb("new"))

    arm64 = await other.refresh(max_age=3600.0)

    assert arm64.revision == amd64.revision
    assert "new" not in names(other)


async def test_where_a_mirror_keeps_nothing_by_hash_all_architectures_move_on_with_it(
    repository: DebianRepository, index: DebianIndex, other: DebianIndex
) -> None:
    before = await index.refresh()
    repository.publish(Deb("new"))

    arm64 = await other.refresh(max_age=3600.0, also=["amd64"])

    assert arm64.revision != before.revision
    amd64 = index.current()
    assert amd64 is not None
    assert amd64.revision == arm64.revision
    assert {"new"} <= set(names(index)) & set(names(other))


async def test_a_mirror_that_lists_files_by_hash_and_has_none_is_asked_for_them_by_name(
    repository: DebianRepository, index: DebianIndex
) -> None:
    repository.by_hash = True
    repository.publish(Deb("new"))
    for path in [path for path in repository.files if "/by-hash/" in path]:
        del repository.files[path]
    await index.refresh()
    assert "new" in names(index)


async def test_an_older_revision_is_completed_with_another_architecture(
    repository: DebianRepository, index: DebianIndex, other: DebianIndex
) -> None:
    repository.by_hash = True
    repository.publish()
    first = await index.refresh()
    repository.publish(Deb("new"))
    second = await index.refresh()

    assert other.revision(first.revision[:16]) == first.revision
    assert other.at(first.revision) is None
    await other.make(first.revision)

    made = other.at(first.revision)
    assert made is not None
    assert "new" not in (made.snapshot / "names.txt").read_text().splitlines()
    assert index.current() == second


async def test_a_revision_is_in_force_only_with_all_architectures_that_are_in_use(
    repository: DebianRepository, index: DebianIndex, other: DebianIndex
) -> None:
    before = await index.refresh()
    await other.refresh(max_age=3600.0)
    repository.publish(Deb("new"))
    with repository.misbehaving(Fault.NOT_FOUND, "main/binary-arm64/Packages.xz"):
        with pytest.raises(SourceUnavailableError, match="404"):
            await index.refresh(also=["arm64"])
        assert index.current() == before
        assert other.current() == other.at(before.revision)
        # Without anybody who uses the other, it keeps nobody from what is new.
        await index.refresh()
    assert "new" in names(index)


async def test_an_architecture_that_the_suite_has_no_longer_keeps_nobody_from_what_is_new(
    repository: DebianRepository, index: DebianIndex, other: DebianIndex
) -> None:
    await index.refresh()
    await other.refresh(max_age=3600.0)
    repository.architectures = ("amd64",)
    repository.publish(Deb("new"))
    await index.refresh(also=["arm64"])
    assert "new" in names(index)
    with pytest.raises(ArchitectureNotFoundError, match=f"no packages of {SUITE} for arm64"):
        await other.refresh(max_age=3600.0)


async def test_a_mirror_that_is_changed_between_its_release_files_and_its_packages_is_asked_once_more(
    repository: DebianRepository, index: DebianIndex
) -> None:
    repository.after(f"/dists/{SECURITY}/InRelease", lambda: repository.publish(Deb("new")))
    await index.refresh()
    assert "new" in names(index)


async def test_a_mirror_that_sends_more_than_is_listed_is_stopped(
    repository: DebianRepository, index: DebianIndex
) -> None:
    repository.files[f"/debian/dists/{SUITE}/{PACKAGES_OF_AMD64}"] += bytes(50 << 20)
    await fails(index, "apt said: ")
    # apt 3 keeps what it knows of the machine's own packages in caches, whatever a mirror sends.
    files = (path for path in index._folder.rglob("*") if path.is_file() and path.suffix != ".bin")
    written = sum(path.stat().st_size for path in files)
    assert written < 1 << 20


async def test_of_another_mirror_nothing_is_taken_from_the_one_before(
    tmp_path: Path, repository: DebianRepository, index: DebianIndex
) -> None:
    await index.refresh()
    with debian_repository(tmp_path) as moved:
        moved.publish(Deb("moved"))
        pinned = await DebianIndex(tmp_path / "index", SUITE, "amd64", moved.mirrors).refresh()
    assert pinned.mirrors[0] == moved.mirrors.main
    assert "moved" in names(index)
    assert "git" not in names(index)


def test_a_kill_while_an_architecture_is_added_leaves_the_others_as_they_were(
    tmp_path: Path, repository: DebianRepository, index: DebianIndex, other: DebianIndex
) -> None:
    before = asyncio.run(index.refresh())
    script = f"""
import asyncio, sys
from pathlib import Path
from chandlery.sources.debian.index import DebianIndex, DebianMirrors
index = DebianIndex(Path({str(tmp_path / "index")!r}), {SUITE!r}, "arm64", DebianMirrors(*sys.argv[1:]))
asyncio.run(index.refresh(max_age=3600.0))
"""
    mirrors = repository.mirrors
    command = [sys.executable, "-c", script, mirrors.main, mirrors.security, mirrors.keyring]
    with (
        repository.misbehaving(Fault.STALL, "binary-arm64/Packages.xz") as met,
        subprocess.Popen(command) as process,
    ):
        met.wait()
        process.kill()
    assert index.current() == before
    assert other.current() is None
    assert asyncio.run(other.refresh(max_age=3600.0)).revision == before.revision
